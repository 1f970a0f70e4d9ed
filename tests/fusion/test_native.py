"""The C kernel for CPUs against the plain form, the equation in float64, and its own limits."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from torch import nn

from autolora.c_library import CLibrary
from autolora.fusion import Capacity, FusedLinear, Gate, record_gates
from autolora.fusion.kernels import dispatch, native, plain
from autolora.fusion.packed import (
    make_gated_plan,
    make_sum_plan,
    output_statistics,
    prepare_factors,
)
from tests.fusion.reference import (
    double_factors,
    gated_sum,
    plain_sum,
    random_factors,
    random_gate,
    random_gate_tensors,
)

CPU = torch.device("cpu")

# Not `native.available()`: a kernel that is refused must fail here, not be skipped.
needs_compiler = pytest.mark.skipif(
    os.environ.get("AUTOLORA_NATIVE") == "0"
    or not any(map(shutil.which, (os.environ.get("CC", ""), "cc", "gcc"))),
    reason="no C compiler",
)


def laid_out(down, ups, terms):
    """A layer for the kernel, with ``h`` in the place of the input where ``down`` is None."""
    assert native.available()
    return native.PreparedLayer(native.KERNEL.get(), down, ups, terms)


@needs_compiler
def test_where_there_is_a_compiler_there_is_a_kernel():
    assert native.available() and dispatch.kernel_name(CPU) == "native"


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
@needs_compiler
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


@needs_compiler
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
        native.KERNEL.forget()
        monkeypatch.setenv("CC", "no-such-compiler")
        assert not native.available()
        assert dispatch.kernel_name(CPU) == "plain"
        torch.testing.assert_close(fused(x), usual, rtol=1e-5, atol=1e-5)
        native.KERNEL.forget()
        monkeypatch.setenv("AUTOLORA_NATIVE", "0")
        assert not native.available()
    monkeypatch.undo()
    native.KERNEL.forget()


@needs_compiler
def test_a_kernel_that_computes_something_else_is_not_used(monkeypatch, tmp_path):
    right = native.KERNEL.source.read_text(encoding="utf-8")
    wrong = right.replace("-1.44269504f", "-1.5f")
    assert wrong != right
    (tmp_path / "gated.c").write_text(wrong, encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert CLibrary(tmp_path / "gated.c", native._bind, native._agrees).get() is None
    assert list((tmp_path / "autolora").glob("gated-*.so"))


# tokens, inputs, channels, ranks: ragged against every size of the kernel (4 and 64 tokens, 16, 32
# and 128 channels, 512 inputs, two ranks at a time)
SIZES = [
    (1, 1, 2, [1]),
    (3, 513, 17, [3]),
    (4, 512, 128, [2, 2]),
    (6, 33, 130, [5, 1, 8]),
    (65, 1030, 31, [16, 1]),
    (129, 24, 257, [4, 4, 4]),
]


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "inputs", "channels", "ranks"), SIZES)
@torch.no_grad()
def test_a_layer_laid_out_is_the_equation_in_float64(tokens, inputs, channels, ranks, dtype):
    generator = torch.Generator().manual_seed(tokens + channels)
    factors = random_factors(ranks, inputs, channels, generator)
    tensors = random_gate_tensors(channels, generator)
    strengths = [0.8, -0.5, 1.3][: len(ranks)]
    x = torch.randn(tokens, inputs, generator=generator).to(dtype)
    y = torch.randn(tokens, channels, generator=generator).to(dtype)
    terms = Gate.from_diffsynth(tensors).requires_grad_(False).terms(torch.float32, CPU)
    prepared = [prepare_factors(a, b, torch.float32, CPU) for a, b in factors]
    layers = {
        gated_sum: native.prepare_gated(make_gated_plan(prepared, strengths), terms),
        plain_sum: native.prepare_sum(make_sum_plan(factors, strengths, torch.float32, CPU)),
    }
    for equation, layer_of in layers.items():
        kept = y.clone()
        fused, means = layer_of(y, x, record=True)
        assert torch.equal(y, kept) and fused.dtype == dtype and fused is not y
        assert (means is None) == (equation is plain_sum)
        arguments = [double_factors(factors), strengths]
        if equation is gated_sum:
            arguments.append({name: tensor.double() for name, tensor in tensors.items()})
        truth = equation(y.double(), x.double(), *arguments)
        # Two channels have almost no deviation to divide by, which magnifies rounding.
        bound = (1e-5 if channels > 2 else 1e-3) if dtype == torch.float32 else 5e-3
        assert (fused.double() - truth).norm() <= bound * truth.norm()
        over, _ = layer_of(kept, x, inplace=True)
        assert over is kept and torch.equal(over, fused)


@needs_compiler
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "inputs", "channels", "ranks"),
    [*SIZES, (9, 31, 40, [33, 2, 17]), (2, 64, 96, [300]), (5, 1030, 600, [2, 20])],
)
@torch.no_grad()
def test_adapters_are_read_where_they_are(tokens, inputs, channels, ranks, dtype, kept):
    generator = torch.Generator().manual_seed(tokens + channels)
    factors = [
        tuple(factor.to(kept) for factor in pair)
        for pair in random_factors(ranks, inputs, channels, generator)
    ]
    tensors = random_gate_tensors(channels, generator)
    strengths = [0.8, -0.5, 1.3][: len(ranks)]
    x = torch.randn(tokens, inputs, generator=generator).to(dtype)
    y = torch.randn(tokens, channels, generator=generator).to(dtype)
    terms = Gate.from_diffsynth(tensors).requires_grad_(False).terms(torch.float32, CPU)
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    for gate, truth in (
        (terms, gated_sum(y.double(), x.double(), double_factors(factors), strengths, wide)),
        (None, plain_sum(y.double(), x.double(), double_factors(factors), strengths)),
    ):
        layer_of = native.prepare_adapters(factors, strengths, gate)
        fused, means = layer_of(y, x, record=True)
        assert (means is None) == (gate is None)
        bound = (2e-5 if channels > 2 else 1e-3) if dtype == torch.float32 else 1e-2
        assert (fused.double() - truth).norm() <= bound * truth.norm()
        assert torch.equal(layer_of(y, x)[0], fused)


@needs_compiler
@torch.no_grad()
def test_a_small_layer_serves_both_types_in_turn():
    factors = random_factors([5, 9], 21, 50, torch.Generator().manual_seed(4))
    gate = random_gate(50, torch.Generator().manual_seed(1)).requires_grad_(False)
    terms = gate.terms(torch.float32, CPU)
    x, y = torch.randn(3, 21), torch.randn(3, 50)
    for order in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        layer_of = native.prepare_adapters(factors, [1.0, 0.5], terms)
        for dtype in order * 2:
            alone = native.prepare_adapters(factors, [1.0, 0.5], terms)
            again, _ = layer_of(y.to(dtype), x.to(dtype))
            assert torch.equal(again, alone(y.to(dtype), x.to(dtype))[0])


@needs_compiler
@torch.no_grad()
def test_factors_of_any_kind_are_taken_and_their_statistics_kept():
    a, b = random_factors([5], 10, 24, torch.Generator().manual_seed(4))[0]
    x, y = torch.randn(3, 10), torch.randn(3, 24)
    gate = random_gate(24, torch.Generator().manual_seed(1)).requires_grad_(False)
    terms = gate.terms(torch.float32, CPU)
    fused, _ = native.prepare_adapters([(a, b)], [1.0], terms)(y, x)
    for others in ((a.T.contiguous().T, b.T.contiguous().T), (a.double(), b.double())):
        same, _ = native.prepare_adapters([others], [1.0], terms)(y, x)
        torch.testing.assert_close(same, fused, rtol=1e-5, atol=1e-5)
    kept = output_statistics(b)
    assert output_statistics(b) is kept and kept[0].shape == (5,)
    torch.testing.assert_close(kept[1], torch.cov(b.T, correction=0), rtol=1e-5, atol=1e-6)
    b.mul_(2)
    assert torch.equal(output_statistics(b)[0], 2 * kept[0])
    assert native.prepare_adapters([(a, b)] * (native.MAX_ROWS // 5 + 1), [1.0], terms) is None


@needs_compiler
@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="needs to know the processor")
@pytest.mark.parametrize("march", ["x86-64", "haswell", "skylake-avx512"])
def test_other_instruction_sets_compute_the_same(march, monkeypatch, tmp_path):
    flag = {"x86-64": "sse2", "haswell": "avx2", "skylake-avx512": "avx512bw"}[march]
    with open("/proc/cpuinfo", encoding="utf-8") as info:
        if flag not in info.read().split():
            pytest.skip(f"this processor lacks {flag}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernel = CLibrary(native.KERNEL.source, native._bind, native._agrees)
    kernel.flags = ((f"-march={march}", "-fopenmp"), (f"-march={march}",))
    monkeypatch.setattr(native, "KERNEL", kernel)
    assert kernel.get() is not None
    for dtype in (torch.float32, torch.bfloat16):
        for kept in (torch.float32, torch.bfloat16, torch.float16):
            test_adapters_are_read_where_they_are(6, 33, 130, [5, 1, 18], dtype, kept)


@needs_compiler
@torch.no_grad()
def test_a_layer_laid_out_takes_any_leading_shape_and_stride_and_number_of_threads():
    y, _, ups, terms = layer([3, 8], 70, 700)
    generator = torch.Generator().manual_seed(5)
    down, x = torch.randn(11, 16, generator=generator), torch.randn(70, 16, generator=generator)
    truth, _ = plain.forward(y, x @ down.T, ups, terms)
    layer_of = laid_out(down, ups, terms)
    fused, _ = layer_of(y, x)
    torch.testing.assert_close(fused, truth, rtol=1e-5, atol=1e-4)
    shaped, _ = layer_of(y.view(2, 5, 7, 700), x.view(2, 5, 7, 16))
    assert torch.equal(shaped, fused.view(2, 5, 7, 700))
    strided, _ = layer_of(y.T.contiguous().T, x.T.contiguous().T)
    assert torch.equal(strided, fused)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(layer_of(y, x)[0], fused)
    finally:
        torch.set_num_threads(threads)


@needs_compiler
def test_sizes_that_do_not_go_together_never_reach_the_kernel():
    y, h, ups, terms = layer([3], 4, 40)
    layer_of = laid_out(None, ups, terms)
    for base, hidden in ((y, h[:3]), (y[:, :39].contiguous(), h), (y, h[:, :2].contiguous())):
        with pytest.raises(ValueError, match="does not go with an output"):
            layer_of(base, hidden)


def fused_layer(gate, ranks=(2, 5), capacity=None):
    generator = torch.Generator().manual_seed(3)
    factors = random_factors(ranks, 10, 24, generator)
    base = nn.Linear(10, 24).requires_grad_(False)
    x = torch.randn(2, 7, 10, generator=generator)
    return FusedLinear(base, factors, gate, [0.7, -1.1], capacity=capacity), x


def by_torch(fused, x, monkeypatch):
    """The same layer without the kernel."""
    with monkeypatch.context() as patch:
        patch.setattr(native, "available", lambda: False)
        return FusedLinear(fused.base, fused.factors, fused.gate, fused.strengths)(x)


def write_gate(gate, factors):
    gate.weight_cross[3] += 0.5


def write_norm(gate, factors):
    gate.norm_lora.weight[3] += 0.5


def replace_storage(gate, factors):
    gate.weight_lora.data = gate.weight_lora.data + 1


def replace_parameter(gate, factors):
    gate.weight_base = nn.Parameter(torch.full((24,), 0.3), requires_grad=False)


def reuse_memory(gate, factors):
    """Another tensor where the first one was: same address, same version."""
    for shift in (1.0, 2.0, 3.0):
        gate.bias.data = gate.bias.data + shift


def load_state(gate, factors):
    gate.load_state_dict(random_gate(24, torch.Generator().manual_seed(9)).state_dict())


def write_down(gate, factors):
    factors[1][0].mul_(2)


def write_up(gate, factors):
    factors[0][1][5] = 1.0


@needs_compiler
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        write_gate,
        write_norm,
        replace_storage,
        replace_parameter,
        reuse_memory,
        load_state,
        write_down,
        write_up,
    ],
)
def test_no_change_goes_unnoticed(change, inference, monkeypatch):
    gate = random_gate(24, torch.Generator().manual_seed(1)).requires_grad_(False)
    for chosen in (gate, Gate.neutral(24).requires_grad_(False)):
        fused, x = fused_layer(chosen)
        with torch.inference_mode(inference), torch.no_grad():
            before = fused(x)
            change(chosen, fused.factors)
            after = fused(x)
            silent = chosen is not gate and change is write_norm  # norms of a neutral gate
            assert torch.equal(after, before) == silent
            torch.testing.assert_close(after, by_torch(fused, x, monkeypatch))


@needs_compiler
@pytest.mark.parametrize("gated_too", [False, True])
@torch.no_grad()
def test_recording_and_exchanges_on_the_way_through_the_kernel(gated_too, monkeypatch):
    gate = random_gate(24, torch.Generator().manual_seed(1)) if gated_too else None
    fused, x = fused_layer(gate, capacity=Capacity(adapters=3, rank=16))
    model = nn.ModuleDict({"layer": fused})
    for strengths in ([0.7, -1.1], [0.0, 0.4], [1.0, 0.0], [0.2, 0.3]):
        fused.set_strengths(strengths)
        with record_gates(model) as records:
            recorded = fused(x)
        with record_gates(model) as others, monkeypatch.context() as patch:
            patch.setattr(native, "available", lambda: False)
            torch.testing.assert_close(fused(x), recorded)
        assert torch.equal(fused(x), recorded)
        mine, theirs = records.calls["layer"][0], others.calls["layer"][0]
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
        assert [bool(m) for m in mine] == [s != 0 for s in strengths]
    fused.set_adapters(["a"], random_factors([16], 10, 24, torch.Generator().manual_seed(8)))
    torch.testing.assert_close(fused(x), by_torch(fused, x, monkeypatch))


@needs_compiler
@torch.no_grad()
def test_the_output_of_a_base_that_is_no_plain_linear_is_left_alone():
    class Keeper(nn.Module):
        in_features, out_features = 10, 24

        def forward(self, x):
            self.kept = torch.ones(*x.shape[:-1], 24)
            return self.kept

    fused, x = fused_layer(random_gate(24, torch.Generator().manual_seed(1)))
    base = Keeper()
    out = FusedLinear(base, fused.factors, fused.gate)(x)
    assert torch.equal(base.kept, torch.ones_like(out)) and not torch.equal(out, base.kept)


@needs_compiler
@torch.no_grad()
def test_bfloat16_is_rounded_as_torch_rounds_it():
    channels = 2 * 32 + 7  # whole vectors and a ragged rest
    bits = torch.arange(channels, dtype=torch.int16) + 0x3F80  # 1 and the numbers after it
    y, x = bits.view(torch.bfloat16)[None], torch.ones(1, 1, dtype=torch.bfloat16)
    up = torch.full((1, channels), 2.0**-8)  # half a step: a tie in every channel
    layer_of = laid_out(torch.ones(1, 1), up, None)
    truth = (y.float() + up).bfloat16()
    assert torch.equal(layer_of(y, x)[0], truth) and not torch.equal(truth, y)
    up.view(torch.int32).fill_(0x7FFFFFFF)  # NaN, which adding half a step would turn into -0
    assert layer_of(y, x)[0].isnan().all()
