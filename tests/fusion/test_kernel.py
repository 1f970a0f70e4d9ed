"""The kernels behind the gate: Triton (interpreted here, real on a GPU), native C, plain."""

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

from autolora.fusion import FusedLinear
from autolora.fusion.kernels import gated, native, plain
from autolora.fusion.plans import make_gated_plan, prepare_factors
from tests.fusion import kernel_cases as cases
from tests.fusion.reference import random_factors, random_gate

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")

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


KERNELS = {
    "forward": {
        "statistics_kernel": {"KEEP": True, "BT": 16, "BC": 512, "BK": 16},
        "fuse_kernel": {"RECORD": True, "APPROXIMATE": True, "BT": 32, "BC": 64, "BK": 64},
    },
    "backward": {
        "adapter_kernel": {"APPROXIMATE": True, "BT": 32, "BC": 64, "W": 16},
        "channel_kernel": {"APPROXIMATE": True, "BT": 32, "BC": 64, "BK": 16},
        "base_kernel": {"BT": 4, "BC": 512},
        "factor_kernel": {"APPROXIMATE": True, "BT": 32, "BC": 64, "W": 16},
    },
}
HALF = ["y", "h", "scaled", "fused", "centred", "grad", "grad_h", "grad_z", "grad_y"]
SIZES = ["T", "C", "count", "tiles"]


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("module", KERNELS)
def test_the_kernels_compile_for_gpus_that_are_not_here(module):
    if torch.version.cuda is None:
        pytest.skip("this build of PyTorch brings no CUDA assembler")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = importlib.import_module(f"autolora.fusion.kernels.triton_{module}")
    for name, constants in KERNELS[module].items():
        kernel = getattr(source, name)
        signature = {}
        for argument in kernel.arg_names:
            number = "i32" if argument.endswith("stride") or argument in SIZES else "*fp32"
            number = "fp32" if argument.startswith("eps") else number
            signature[argument] = "*bf16" if argument in HALF else number
            if argument == "offsets":
                signature[argument] = "*i32"
        signature |= dict.fromkeys(constants, "constexpr")
        for capability in (80, 90):
            compiled = triton.compile(
                ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32)
            )
            assert len(compiled.asm["cubin"]) > 0
            assert compiled.metadata.shared <= 99 * 1024  # what a program may have on any of them


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


def layer(ranks, tokens, out, dtype=torch.float32, block=1, strengths=None):
    generator = torch.Generator().manual_seed(len(ranks) + out)
    factors = random_factors(ranks, 16, out, generator)
    prepared = [prepare_factors(a, b, torch.float32, CPU) for a, b in factors]
    plan = make_gated_plan(prepared, strengths or [0.5] * len(ranks), block)
    terms = random_gate(out, generator).requires_grad_(False).terms(torch.float32, CPU)
    x = torch.randn(tokens, 16, generator=generator)
    y = torch.randn(tokens, out, generator=generator).to(dtype)
    return y, x @ plan.down.T, plan.ups, terms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("ranks", "tokens", "out"),
    [([1], 1, 2), ([3, 8], 5, 33), ([4] * 16, 66, 600), ([64, 1, 128], 9, 1030)],
)
@pytest.mark.skipif(not native.available(), reason="no C compiler")
def test_the_native_kernel_agrees_with_the_plain_form(dtype, ranks, tokens, out):
    for block in (1, 16):
        arguments = layer(ranks, tokens, out, dtype, block)
        if arguments[2].centred.shape[0] > native.MAX_ROWS:
            assert not native.supports(*arguments)
            continue
        assert native.supports(*arguments)
        kept = arguments[0].clone()
        truth, true_means = plain.forward(*arguments, record=True)
        fused, means = native.forward(*arguments, record=True)
        assert fused.dtype == dtype and torch.equal(arguments[0], kept)
        # In bfloat16 both round the same number, up to a tie.
        bound = 1e-5 if dtype == torch.float32 else 8e-3
        torch.testing.assert_close(fused, truth, rtol=bound, atol=1e-4)
        torch.testing.assert_close(means, true_means, rtol=1e-4, atol=1e-4)
        again, _ = native.forward(*arguments, inplace=True)
        assert again is arguments[0] and torch.equal(again, fused)


@pytest.mark.skipif(not native.available(), reason="no C compiler")
def test_the_native_kernel_passes_strides_infinities_and_threads_on():
    y, h, ups, terms = layer([3, 8], 70, 700)
    truth, _ = native.forward(y, h, ups, terms)
    wide = torch.zeros(70, 900)
    wide[:, :700] = y
    torch.testing.assert_close(native.forward(wide[:, :700], h, ups, terms)[0], truth)
    spread = y.T.contiguous().T
    torch.testing.assert_close(native.forward(spread, h.T.contiguous().T, ups, terms)[0], truth)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(native.forward(y, h, ups, terms)[0], truth)
    finally:
        torch.set_num_threads(threads)
    y[3, 5] = float("nan")
    fused, _ = native.forward(y, h, ups, terms)
    assert fused[3].isnan().all() and not fused[4].isnan().any()
    # Arguments of the sigmoid far outside of what its exponential can hold.
    y, h, ups, terms = layer([3], 4, 40)
    fused, _ = native.forward(y * 1e4, h * 1e4, ups, terms)
    torch.testing.assert_close(fused, plain.forward(y * 1e4, h * 1e4, ups, terms)[0])


def test_without_a_compiler_the_plain_form_serves(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    factors = random_factors([3, 5], 8, 24, generator)
    fused = FusedLinear(torch.nn.Linear(8, 24), factors, random_gate(24, generator))
    x = torch.randn(4, 8, generator=generator)
    with torch.no_grad():
        usual = fused(x)
        monkeypatch.setattr(native, "_tried", False)
        monkeypatch.setenv("CC", "no-such-compiler")
        assert not native.available()
        assert gated.kernel_name(CPU) == "plain"
        torch.testing.assert_close(fused(x), usual, rtol=1e-5, atol=1e-5)
        monkeypatch.setattr(native, "_tried", False)
        monkeypatch.setenv("AUTOLORA_NATIVE", "0")
        assert not native.available()
    monkeypatch.undo()
    native._tried = False


@pytest.mark.skipif(not native.available(), reason="no C compiler")
def test_a_kernel_that_computes_something_else_is_not_used(monkeypatch, tmp_path):
    right = native._SOURCE.read_text(encoding="utf-8")
    wrong = right.replace("-1.44269504f", "-1.5f")
    assert wrong != right
    (tmp_path / "gated.c").write_text(wrong, encoding="utf-8")
    monkeypatch.setattr(native, "_SOURCE", tmp_path / "gated.c")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native._load() is None
    assert list((tmp_path / "autolora").glob("gated-*.so"))
