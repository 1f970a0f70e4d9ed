"""The fast forms of fusion against the equation in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autolora.fusion import FusedLinear, Gate
from autolora.fusion.kernels import plain
from autolora.fusion.packed import make_gated_plan, make_sum_plan, prepare_factors
from tests.fusion.reference import (
    double,
    double_factors,
    gated_sum,
    layer_norm,
    plain_sum,
    random_factors,
    random_gate,
    random_gate_tensors,
)

CPU = torch.device("cpu")


def relative_error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    return float((actual.double() - truth).norm() / truth.norm())


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    in_features=st.integers(1, 24),
    out_features=st.integers(2, 40),
    lead=st.sampled_from([(), (3,), (2, 5), (1, 7), (2, 3, 4), (0, 3)]),
    gated=st.booleans(),
    data=st.data(),
)
def test_any_shape_matches_float64(seed, ranks, in_features, out_features, lead, gated, data):
    generator = torch.Generator().manual_seed(seed)
    strengths = data.draw(
        st.lists(st.floats(-2, 2), min_size=len(ranks), max_size=len(ranks)), label="strengths"
    )
    base = nn.Linear(in_features, out_features)
    factors = random_factors(ranks, in_features, out_features, generator)
    tensors = random_gate_tensors(out_features, generator)
    gate = Gate.from_diffsynth(tensors) if gated else None
    x = torch.randn(*lead, in_features, generator=generator)
    with torch.no_grad():
        fused = FusedLinear(base, factors, gate, strengths)(x)
        y = F.linear(x.double(), base.weight.double(), base.bias.double())
        if gated:
            truth = gated_sum(y, x.double(), double_factors(factors), strengths, double(tensors))
        else:
            truth = plain_sum(y, x.double(), double_factors(factors), strengths)
    assert fused.shape == (*lead, out_features)
    assert fused.dtype == torch.float32
    # Relative to the size of the vector: elements near zero carry the rounding of large ones. A
    # nearly constant adapter output divides by a small deviation, which magnifies rounding.
    torch.testing.assert_close(fused.double(), truth, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("gated", [False, True])
def test_float32_error_is_rounding(gated):
    generator = torch.Generator().manual_seed(0)
    base = nn.Linear(192, 576)
    factors = random_factors([4, 8, 4], 192, 576, generator)
    tensors = random_gate_tensors(576, generator)
    x = torch.randn(2, 21, 192, generator=generator)
    gate = Gate.from_diffsynth(tensors) if gated else None
    strengths = [1.0, 0.7, -0.4]
    with torch.no_grad():
        fused = FusedLinear(base, factors, gate, strengths)(x)
        y = F.linear(x.double(), base.weight.double(), base.bias.double())
        if gated:
            truth = gated_sum(y, x.double(), double_factors(factors), strengths, double(tensors))
        else:
            truth = plain_sum(y, x.double(), double_factors(factors), strengths)
    assert relative_error(fused, truth) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gated", [False, True])
def test_half_precision_is_no_worse_than_the_naive_form(dtype, gated):
    generator = torch.Generator().manual_seed(1)
    base = nn.Linear(64, 192).to(dtype)
    factors = random_factors([4, 4, 16], 64, 192, generator)
    halves = [(a.to(dtype), b.to(dtype)) for a, b in factors]
    tensors = random_gate_tensors(192, generator)
    x = torch.randn(2, 33, 64, generator=generator).to(dtype)
    strengths = [1.0, 0.5, 1.5]
    gate = Gate.from_diffsynth(tensors) if gated else None
    with torch.no_grad():
        y = base(x)
        fused = FusedLinear(base, factors, gate, strengths)(x)
        if gated:
            half_gate = {name: tensor.to(dtype) for name, tensor in tensors.items()}
            naive = gated_sum(y, x, halves, strengths, half_gate)
            args = (double_factors(factors), strengths, double(tensors))
            truth = gated_sum(y.double(), x.double(), *args)
        else:
            naive = plain_sum(y, x, halves, strengths)
            truth = plain_sum(y.double(), x.double(), double_factors(factors), strengths)
    assert fused.dtype == dtype
    assert relative_error(fused, truth) <= relative_error(naive, truth)


def test_the_covariance_gives_the_layer_norm_of_an_adapter_output():
    generator = torch.Generator().manual_seed(2)
    (a, b) = random_factors([6], 12, 50, generator)[0]
    # A mean a hundred times the deviation: the variance must not come from E[x^2] - E[x]^2.
    b = b * 0.01 + 1
    x = torch.randn(9, 12, generator=generator)
    prepared = prepare_factors(a, b, torch.float32, CPU)
    h = F.linear(x, prepared.down)
    variance = ((h @ prepared.covariance) * h).sum(-1)
    mean = h @ prepared.mean
    normalised = (h / torch.sqrt(variance + 1e-5)[:, None]) @ prepared.centred
    output = x.double() @ a.double().T @ b.double().T
    torch.testing.assert_close(variance.double(), output.var(-1, correction=0), rtol=1e-4, atol=0)
    torch.testing.assert_close(mean.double(), output.mean(-1), rtol=1e-5, atol=1e-5)
    truth = layer_norm(output, torch.ones(50).double(), torch.zeros(50).double())
    torch.testing.assert_close(normalised.double(), truth, rtol=1e-4, atol=5e-5)


def test_an_adapter_with_equal_channels_has_zero_variance_and_stays_finite():
    a = torch.randn(2, 8)
    b = torch.ones(20, 2)
    gate = random_gate(20, torch.Generator().manual_seed(3))
    with torch.no_grad():
        out = FusedLinear(nn.Linear(8, 20), [(a, b)], gate)(torch.randn(5, 8) * 1e3)
    assert torch.isfinite(out).all()


def layer_of(ranks, tokens=37, in_features=10, out_features=24, seed=4, block=1):
    """Arguments of the kernels: ``y``, ``h``, the packed adapters and a gate far from neutral."""
    generator = torch.Generator().manual_seed(seed)
    factors = random_factors(ranks, in_features, out_features, generator)
    prepared = [prepare_factors(a, b, torch.float32, CPU) for a, b in factors]
    strengths = [1.0, -0.5, 2.0, 0.3][: len(ranks)]
    plan = make_gated_plan(prepared, strengths, block)
    terms = random_gate(out_features, generator).requires_grad_(False).terms(torch.float32, CPU)
    assert terms is not None
    x = torch.randn(tokens, in_features, generator=generator)
    y = torch.randn(tokens, out_features, generator=generator)
    return y, F.linear(x, plan.down), plan.ups, terms


@pytest.mark.parametrize("ranks", [[4, 4, 4], [8, 2, 8, 2], [3]])
def test_chunks_and_padding_change_nothing(ranks):
    y, h, ups, terms = layer_of(ranks)
    whole, means = plain.forward(y, h, ups, terms, record=True)
    assert means is not None and means.shape == (len(ranks),)
    for chunk in (1, 24, 5 * 24, 36 * 24):
        parts, again = plain.forward(y, h, ups, terms, True, chunk_elements=chunk)
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(again, means, rtol=1e-5, atol=1e-5)
    y, h, ups, terms = layer_of(ranks, block=16)
    padded, again = plain.forward(y, h, ups, terms, record=True)
    torch.testing.assert_close(padded, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again, means, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("factors", [False, True])
def test_chunks_of_the_backward_pass_change_nothing(factors):
    y, h, ups, terms = layer_of([4, 2, 3])
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    whole = plain.backward(grad, y, h, ups, terms, factors)
    parts = plain.backward(grad, y, h, ups, terms, factors, chunk_elements=5 * 24)
    for name in ("y", "h", "terms", "centred", "mean", "covariance"):
        a, b = getattr(parts, name), getattr(whole, name)
        assert (b is None) == (not factors and name in ("centred", "mean", "covariance"))
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_mean_gates_are_those_of_the_equation():
    generator = torch.Generator().manual_seed(7)
    factors = random_factors([2, 3], 10, 24, generator)
    gate = random_gate(24, generator).requires_grad_(False)
    layer = FusedLinear(nn.Linear(10, 24), factors, gate, [0.8, 0.0])
    x = torch.randn(6, 10, generator=generator)
    seen: list[torch.Tensor] = []
    layer._recorder = seen.append
    with torch.no_grad():
        fused = layer(x)
        y = layer.base(x)
        lora = gate.norm_lora(0.8 * x @ factors[0][0].T @ factors[0][1].T)
        base = gate.norm_base(y)
        argument = base * gate.weight_base + lora * gate.weight_lora + gate.bias
        said = gate.weight_out * torch.sigmoid(argument + base * lora * gate.weight_cross)
    torch.testing.assert_close(seen[0], torch.tensor([float(said.mean()), 0.0]))
    layer._recorder = None
    with torch.no_grad():
        assert torch.equal(layer(x), fused)


def test_inputs_are_left_alone():
    y, h, ups, terms = layer_of([2, 3])
    kept = (y.clone(), h.clone())
    first, _ = plain.forward(y, h, ups, terms)
    second, _ = plain.forward(y, h, ups, terms)
    assert torch.equal(y, kept[0]) and torch.equal(h, kept[1]) and torch.equal(first, second)


def test_the_sum_is_one_low_rank_map():
    factors = random_factors([2, 5], 6, 8, torch.Generator().manual_seed(6))
    plan = make_sum_plan(factors, [2.0, -1.0], torch.float64, CPU)
    delta = 2 * factors[0][1].double() @ factors[0][0].double()
    delta -= factors[1][1].double() @ factors[1][0].double()
    torch.testing.assert_close(plan.up.T @ plan.down, delta)
