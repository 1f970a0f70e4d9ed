"""Float8 widened and multiplied on a CPU, against PyTorch's own conversion and float64."""

from __future__ import annotations

import copy
import os
import shutil

import pytest
import torch
from diffsynth.core import AutoWrappedLinear
from torch import nn

from autolora.c_library import CLibrary
from autolora.runtime import float8
from autolora.runtime.float8 import FLOAT8_TYPES, Float8Linear, Float8Module, widen

needs_compiler = pytest.mark.skipif(
    os.environ.get("AUTOLORA_NATIVE") == "0"
    or not any(map(shutil.which, (os.environ.get("CC", ""), "cc", "gcc"))),
    reason="no C compiler",
)
WIDE = [torch.float32, torch.bfloat16]
# Instruction sets by the compiler's name; each is also tried where the machine has a larger one.
SETS = {"x86-64": None, "haswell": "avx2", "skylake-avx512": "avx512bw"}


def library(march):
    """The kernel compiled for one instruction set."""
    made = CLibrary(float8.KERNEL.source, float8._bind, float8._agrees)
    made.flags = ((f"-march={march}", "-fopenmp"), (f"-march={march}",))
    return made


def runs(march):
    with open("/proc/cpuinfo", encoding="utf-8") as info:
        flags = info.read().split()
    return SETS[march] is None or SETS[march] in flags


@needs_compiler
def test_where_there_is_a_compiler_there_is_a_kernel():
    assert float8.KERNEL.get() is not None


@needs_compiler
@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="needs to know the processor")
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="instruction sets of x86-64")
@pytest.mark.parametrize("march", SETS)
def test_every_number_is_widened_exactly_by_every_instruction_set(march, monkeypatch, tmp_path):
    if not runs(march):
        pytest.skip(f"this processor lacks {SETS[march]}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernel = library(march)
    monkeypatch.setattr(float8, "KERNEL", kernel)
    assert kernel.get() is not None
    every = torch.arange(256).to(torch.uint8).repeat(3)
    for dtype in FLOAT8_TYPES:
        for wide in WIDE:
            for count in (1, 31, 32, 33, 700, 768):
                for start in (0, 3):
                    stored = every[start:count].view(dtype)
                    truth, widened = stored.to(wide), widen(stored, wide)
                    assert widened.dtype is wide and widened.shape == truth.shape
                    assert torch.equal(widened.isnan(), truth.isnan())
                    assert torch.equal(widened.nan_to_num(9), truth.nan_to_num(9))
                    number = ~truth.isnan()
                    assert torch.equal(widened.signbit()[number], truth.signbit()[number])


@needs_compiler
def test_widening_takes_strides_threads_and_flushed_denormals():
    stored = torch.arange(256).to(torch.uint8).view(torch.float8_e5m2).view(16, 16)
    assert torch.equal(widen(stored.T, WIDE[0]).nan_to_num(9), stored.T.float().nan_to_num(9))
    large = torch.randint(0, 127, (70_000,), dtype=torch.uint8).view(torch.float8_e4m3fn)
    threads, flushed = torch.get_num_threads(), torch.set_flush_denormal(True)
    try:
        torch.set_num_threads(2)
        for wide in WIDE:
            assert torch.equal(widen(large, wide), large.to(wide))
    finally:
        torch.set_num_threads(threads)
        if flushed:
            torch.set_flush_denormal(False)


def layer(inner, out, dtype, stored=torch.float8_e4m3fn, bias=True, kind=Float8Linear):
    torch.manual_seed(inner + out)
    linear = nn.Linear(inner, out, bias=bias).requires_grad_(False).to(stored)
    return kind(
        linear,
        **{f"{stage}_dtype": stored for stage in ("offload", "onload", "preparing")},
        **{f"{stage}_device": "cpu" for stage in ("offload", "onload", "preparing")},
        computation_dtype=dtype,
        computation_device="cpu",
    )


@needs_compiler
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("stored", FLOAT8_TYPES)
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_layer_is_the_product_with_its_numbers(dtype, stored, bias, monkeypatch):
    fast, x = layer(40, 300, dtype, stored, bias), torch.randn(2, 3, 40).to(dtype)
    monkeypatch.setattr(AutoWrappedLinear, "forward", None)  # it must not be needed
    truth = x.double() @ fast.weight.double().T
    if bias:
        truth += fast.bias.double()
    bound = 1e-6 if dtype == torch.float32 else 4e-3
    whole = fast(x)
    monkeypatch.setattr(float8, "BLOCK_BYTES", 1)  # 64 rows at a time: four blocks and a rest
    for y in (whole, fast(x)):
        assert y.dtype is dtype and y.shape == (2, 3, 300)
        assert (y.double() - truth).norm() <= bound * truth.norm()
    assert fast(x[:0]).shape == (0, 3, 300) and fast(x[0, 0]).shape == (300,)


@needs_compiler
@torch.no_grad()
def test_layers_one_after_the_other_and_changed_weights_do_not_mix():
    layers = [layer(24, out, torch.float32) for out in (80, 24, 80, 200)]
    x = torch.randn(5, 24)
    first = [one(x) for one in layers]
    copies = [y.clone() for y in first]
    for one, y in zip(reversed(layers), reversed(copies), strict=True):
        assert torch.equal(one(x), y)
    assert all(torch.equal(y, kept) for y, kept in zip(first, copies, strict=True))
    layers[0].weight.view(torch.uint8).zero_()
    assert torch.equal(layers[0](x), layers[0].bias.float().expand(5, 80))


@needs_compiler
def test_gradients_and_autocast_are_those_of_diffsynths_layer():
    ours, theirs = (layer(12, 70, torch.float32, kind=k) for k in (Float8Linear, AutoWrappedLinear))
    inputs = [torch.linspace(-1, 1, 36).view(3, 12).requires_grad_() for _ in range(2)]
    for one, x in zip((ours, theirs), inputs, strict=True):
        one(x).square().sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert ours(inputs[0]).dtype is theirs(inputs[0]).dtype is torch.bfloat16


@torch.no_grad()
def test_without_the_kernel_diffsynths_layer_serves(monkeypatch):
    fast, x = layer(12, 70, torch.float32), torch.randn(3, 12)
    with_kernel = fast(x)
    monkeypatch.setattr(float8.KERNEL, "get", lambda: None)
    torch.testing.assert_close(fast(x), with_kernel)
    stored = fast.weight.detach()
    assert torch.equal(widen(stored, torch.float32), stored.float())


@torch.no_grad()
def test_a_module_is_copied_widened_and_stays_as_it_was():
    feed = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 4)).requires_grad_(False)
    feed.to(torch.float8_e4m3fn)
    truth = copy.deepcopy(feed).float()
    wrapped = Float8Module(
        feed,
        **{f"{stage}_dtype": torch.float8_e4m3fn for stage in ("offload", "onload", "preparing")},
        **{f"{stage}_device": "cpu" for stage in ("offload", "onload", "preparing")},
        computation_dtype=torch.float32,
        computation_device="cpu",
    )
    x = torch.randn(5, 6)
    assert torch.equal(wrapped(x), truth(x))
    assert {p.dtype for p in wrapped.parameters()} == {torch.float8_e4m3fn}
