"""The Triton kernels: interpreted, compiled for GPUs that are not here, and run where one is."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fusion import kernel_cases as cases

ROOT = Path(__file__).resolve().parents[2]

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """Errors of the Triton kernels, run as Python in a process of their own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.fusion.kernel_cases"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_triton
@pytest.mark.parametrize(("dtype", "number"), cases.FORWARD)
def test_interpreted_forward(interpreted, dtype, number):
    errors = interpreted[f"forward {dtype} {number}"]
    if dtype == "float32":
        assert errors["ours"] < 1e-6
    elif dtype == "float16":
        assert errors["ours"] <= errors["naive"]
    else:
        # Triton's interpreter cuts bits off where a GPU rounds to nearest: twice the error.
        assert errors["ours"] <= 2 * errors["naive"]
    assert errors["means"] < (2e-2 if dtype == "bfloat16" else 2e-3)


@needs_triton
@pytest.mark.parametrize(("dtype", "number"), cases.BACKWARD)
def test_interpreted_gradients(interpreted, dtype, number):
    errors = interpreted[f"backward {dtype} {number}"]
    assert errors["repeats"]
    if dtype == "float32":
        assert max(errors["ours"]) < 1e-5
    for ours, naive in zip(errors["ours"], errors["naive"], strict=True):
        assert ours <= max(1.5 * naive, 1e-5 if dtype == "float32" else 2e-3)


@needs_triton
def test_interpreted_limits(interpreted):
    assert interpreted["unused places"] < 1e-6
    assert interpreted["equal channels"] < 1e-2


@needs_triton
def test_every_kernel_is_checked_ahead_of_time():
    from scripts.check_kernels import smallest_and_largest, variants

    source = importlib.import_module("autolora.fusion.kernels.triton")
    written = {name for name in vars(source) if name.endswith("_kernel")}
    for listing in (variants, smallest_and_largest):
        assert {kernel.fn.__name__ for kernel, _, _ in listing("bf16")} == written


@needs_triton
@pytest.mark.slow
def test_the_kernels_fit_gpus_that_are_not_here():
    if torch.version.cuda is None:
        pytest.skip("this build of PyTorch brings no CUDA assembler")
    from scripts.check_kernels import smallest_and_largest, usage

    for number, variant in enumerate(smallest_and_largest("bf16")):
        used = usage(variant, "bf16", (89, 90, 80)[number % 3])
        assert used.fits, used


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_gpu_forward_and_backward(dtype):
    large = [(512, 3072, 9216, [16, 64, 128], [1.0, 0.5, -0.7]), (1, 3072, 18432, [16], [1.0])]
    for case in [*cases.SMALL, *large]:
        errors = cases.forward_errors(case, cases.DTYPES[dtype], "cuda")
        if dtype == "float32":
            assert errors["ours"] < 3e-6
        else:
            assert errors["ours"] <= errors["naive"]
        gradients = cases.gradient_errors(case, cases.DTYPES[dtype], "cuda")
        assert gradients["repeats"]
        for ours, naive in zip(gradients["ours"], gradients["naive"], strict=True):
            assert ours <= max(1.5 * naive, 1e-5)
