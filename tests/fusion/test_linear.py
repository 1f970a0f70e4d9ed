"""One fused layer: exactness of the trivial cases, caching, gradients, autocast, bases."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autolora.errors import FusionError
from autolora.fusion import FusedLinear, Gate, packed
from autolora.fusion.kernels import native
from autolora.fusion.packed import prepare_factors
from tests.fusion.reference import (
    gated_sum,
    plain_sum,
    random_factors,
    random_gate,
    random_gate_tensors,
)


def make(ranks=(2, 4), in_features=8, out_features=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    factors = random_factors(ranks, in_features, out_features, generator)
    gate = random_gate(out_features, generator)
    x = torch.randn(2, 5, in_features, generator=generator)
    return nn.Linear(in_features, out_features), factors, gate, x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_without_adapters_the_base_speaks_alone(dtype):
    base, factors, gate, x = make()
    base, x = base.to(dtype), x.to(dtype)
    assert torch.equal(FusedLinear(base)(x), base(x))
    assert torch.equal(FusedLinear(base, gate=gate)(x), base(x))
    assert torch.equal(FusedLinear(base, factors, gate, strengths=[0, 0])(x), base(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_neutral_gate_is_the_plain_sum_to_the_bit(dtype):
    base, factors, _, x = make()
    base, x = base.to(dtype), x.to(dtype)
    neutral = FusedLinear(base, factors, Gate.neutral(12), [0.5, 2.0])(x)
    assert torch.equal(neutral, FusedLinear(base, factors, None, [0.5, 2.0])(x))


@torch.no_grad()
def test_an_adapter_of_strength_zero_is_as_if_not_there():
    base, factors, gate, x = make((2, 4, 3))
    with_it = FusedLinear(base, factors, gate, [1.0, 0.0, 0.5])(x)
    assert torch.equal(with_it, FusedLinear(base, factors[::2], gate, [1.0, 0.5])(x))


@pytest.mark.parametrize("gated", [False, True])
@torch.no_grad()
def test_strengths_factors_and_gate_may_change_in_place(gated):
    base, factors, gate, x = make()
    gate = gate if gated else None
    fused = FusedLinear(base, factors, gate)
    before = fused(x)
    assert torch.equal(fused(x), before)
    fused.set_strengths([0.3, -1.0])
    assert fused.strengths == (0.3, -1.0)
    assert torch.equal(fused(x), FusedLinear(base, factors, gate, [0.3, -1.0])(x))
    fused.set_strengths([1, 1])
    assert torch.equal(fused(x), before)
    factors[0][0].mul_(2)
    assert torch.equal(fused(x), FusedLinear(base, factors, gate)(x))
    assert not torch.equal(fused(x), before)
    if gate is not None:
        gate.bias -= 3
        assert torch.equal(fused(x), FusedLinear(base, factors, copy.deepcopy(gate))(x))


@torch.no_grad()
def test_an_exchange_prepares_only_what_is_new(monkeypatch):
    base, factors, gate, x = make((2, 4, 3))
    prepared = []

    def counted(a, *args):
        prepared.append(a)
        return prepare_factors(a, *args)

    monkeypatch.setattr(packed, "prepare_factors", counted)
    monkeypatch.setattr(native, "available", lambda: False)  # it takes factors as they are
    fused = FusedLinear(base, factors[:2], gate)
    fused(x)
    assert [id(a) for a in prepared] == [id(a) for a, _ in factors[:2]]
    prepared.clear()
    fused.set_strengths([0.5, -1.0])
    fused(x)
    fused.set_adapters(["b", "a"], factors[1::-1], [1.0, 1.0])
    fused(x)
    assert not prepared
    fused.set_adapters(["a", "c"], [factors[0], factors[2]], [0.2, 1.0])
    out = fused(x)
    assert [id(a) for a in prepared] == [id(factors[2][0])]
    assert torch.equal(out, FusedLinear(base, factors[::2], gate, [0.2, 1.0])(x))


@torch.no_grad()
def test_other_factors_at_the_same_address_are_other_factors():
    base, factors, gate, x = make((2, 4))
    fused = FusedLinear(base, factors, gate)
    for seed in range(20):  # the allocator soon hands out the memory of the ones before
        fused(x)
        exchanged = random_factors((2, 4), 8, 12, torch.Generator().manual_seed(seed))
        fused.set_adapters(["a", "b"], exchanged)
        assert torch.equal(fused(x), FusedLinear(base, exchanged, gate)(x))


@torch.no_grad()
def test_a_base_that_keeps_its_output_finds_it_unchanged():
    base, factors, gate, x = make()
    kept = []
    base.register_forward_hook(lambda module, inputs, output: kept.append(output))
    fused = FusedLinear(base, factors, gate)(x)
    base._forward_hooks.clear()
    assert torch.equal(kept[0], base(x)) and not torch.equal(fused, kept[0])


@torch.no_grad()
def test_a_layer_serves_several_dtypes_in_turn():
    base, factors, gate, x = make()
    fused = FusedLinear(base, factors, gate)
    single = fused(x)
    double = fused.double()(x.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, rtol=1e-4, atol=1e-5)
    assert torch.equal(fused.float()(x), single)


@torch.no_grad()
def test_inputs_with_strides_and_kept_arguments():
    base, factors, gate, _ = make()
    fused = FusedLinear(base, factors, gate)
    x = torch.randn(2, 9, 8)
    torch.testing.assert_close(fused(x[:, 2:7]), fused(x[:, 2:7].contiguous()))
    transposed = torch.randn(8, 5).T
    kept = transposed.clone()
    torch.testing.assert_close(fused(transposed), fused(kept))
    assert torch.equal(transposed, kept)


def parameters_of(tensors):
    return {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}


@pytest.mark.parametrize("gated", [False, True])
def test_gradients_match_autograd_of_the_naive_form(gated):
    generator = torch.Generator().manual_seed(1)
    base = nn.Linear(6, 10).double()
    factors = random_factors([2, 3, 2], 6, 10, generator)
    factors = [(a.double().requires_grad_(), b.double().requires_grad_()) for a, b in factors]
    tensors = {k: v.double() for k, v in random_gate_tensors(10, generator).items()}
    strengths = [1.0, -0.5, 2.0]
    x = torch.randn(2, 7, 6, generator=generator).double().requires_grad_()
    target = torch.randn(2, 7, 10, generator=generator).double()
    gate = Gate.from_diffsynth(tensors).double() if gated else None
    if gate is not None:
        gate.load_state_dict(tensors)
    fused = FusedLinear(base, factors, gate, strengths)
    ours = [x, *base.parameters(), *(t for pair in factors for t in pair)]
    ours += [] if gate is None else [p for _, p in sorted(gate.named_parameters())]
    mine = torch.autograd.grad(((fused(x) - target) ** 2).sum(), ours)

    naive_gate = parameters_of(tensors)
    y = F.linear(x, base.weight, base.bias)
    if gated:
        naive = gated_sum(y, x, factors, strengths, naive_gate)
    else:
        naive = plain_sum(y, x, factors, strengths)
    theirs = [x, *base.parameters(), *(t for pair in factors for t in pair)]
    theirs += [naive_gate[name] for name in sorted(naive_gate)] if gated else []
    truth = torch.autograd.grad(((naive - target) ** 2).sum(), theirs)
    assert len(mine) == len(truth)
    for a, b in zip(mine, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_a_neutral_gate_learns():
    base, factors, _, x = make()
    gate = Gate.neutral(12)
    fused = FusedLinear(base, factors, gate)
    torch.testing.assert_close(fused(x), FusedLinear(base, factors)(x), rtol=1e-5, atol=1e-5)
    fused(x).square().sum().backward()
    for name in ("weight_base", "weight_lora", "weight_cross", "weight_out", "bias"):
        assert getattr(gate, name).grad.abs().sum() > 0, name


def test_training_follows_the_optimizer():
    base, factors, gate, x = make()
    base.requires_grad_(False)
    fused = FusedLinear(base, factors, gate)
    target = base(x)
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        loss = (fused(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        final = (fused(x) - target).square().mean()
    assert final < 0.5 * losses[0]


@pytest.mark.parametrize("gated", [False, True])
def test_autocast_forward_and_backward(gated):
    base, factors, gate, x = make((4, 4), 32, 48)
    fused = FusedLinear(base, factors, gate if gated else None)
    with torch.no_grad():
        exact = fused(x)
    x = x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = fused(x)
        assert torch.is_autocast_enabled("cpu")
        with torch.no_grad():
            silent = fused(x)
    assert out.dtype == silent.dtype == base(x).to(torch.bfloat16).dtype
    torch.testing.assert_close(out.float(), exact, rtol=0.05, atol=0.05)
    torch.testing.assert_close(silent.float(), exact, rtol=0.05, atol=0.05)
    out.float().sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0
    if gated:
        assert gate.weight_base.grad.dtype == torch.float32


@torch.no_grad()
def test_autocast_has_no_say_in_what_is_kept():
    base, factors, gate, x = make((4, 4), 32, 48)
    base, x = base.bfloat16(), x.bfloat16()
    usual = FusedLinear(base, factors, gate)(x)
    again = [(a.clone(), b.clone()) for a, b in factors]  # of which nothing is kept yet
    fused = FusedLinear(base, again, copy.deepcopy(gate))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused(x), usual)
    assert torch.equal(fused(x), usual)


def test_caches_filled_under_inference_mode_serve_training():
    base, factors, gate, x = make()
    fused = FusedLinear(base, factors, gate)
    with torch.inference_mode():
        fused(x)
    x = x.clone().requires_grad_()
    fused(x).sum().backward()
    assert x.grad is not None and gate.bias.grad is not None


def test_gate_and_factors_stay_with_their_owners():
    base, factors, gate, _ = make()
    fused = FusedLinear(base, factors, gate)
    assert {id(p) for p in fused.parameters()} == {id(p) for p in base.parameters()}
    fused.to(torch.bfloat16).requires_grad_(False)
    assert gate.bias.dtype == torch.float32 and gate.bias.requires_grad
    assert factors[0][0].dtype == torch.float32


@pytest.mark.parametrize("gated", [False, True])
@torch.no_grad()
def test_a_copy_goes_its_own_way(gated):
    base, factors, gate, x = make()
    fused = FusedLinear(base, factors, gate if gated else None)
    before = fused(x)
    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(copied(x), before)
        copied.factors[0][1].zero_()
        assert not torch.equal(copied(x), before) and torch.equal(fused(x), before)


def test_it_looks_like_its_base():
    base, factors, _, _ = make()
    fused = FusedLinear(base.eval(), factors, names=["neon", "elephant"])
    assert (fused.in_features, fused.out_features) == (8, 12)
    assert fused.weight is base.weight and fused.bias is base.bias
    assert not fused.training
    assert "neon:1 (rank 2)" in repr(fused)
    with pytest.raises(AttributeError):
        fused.nonsense  # noqa: B018


class OddBase(nn.Module):
    """A base whose weight nobody may touch, as of a quantized or offloaded layer."""

    in_features, out_features = 8, 12

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(8, 12)
        self.seen: tuple[object, ...] = ()

    @property
    def weight(self):
        raise RuntimeError("the weight was read")

    def forward(self, x, *args, **kwargs):
        self.seen = (*args, *kwargs.items())
        return self.hidden(x)


@torch.no_grad()
def test_the_base_is_only_called():
    _, factors, gate, x = make()
    base = OddBase()
    fused = FusedLinear(base, factors, gate)
    truth = FusedLinear(base.hidden, factors, gate)(x)
    assert torch.equal(fused(x, 1, scale=2), truth)
    assert base.seen == (1, ("scale", 2))


A, B = torch.ones(2, 8), torch.ones(12, 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"factors": [(torch.ones(2, 7), B)]}, r"A \[2, 7\] and B \[12, 2\] .* \[12, 8\]"),
        ({"factors": [(A, torch.ones(11, 2))]}, r"B \[11, 2\]"),
        ({"factors": [(A, torch.ones(12, 3))]}, "do not make"),
        ({"factors": [(torch.ones(0, 8), torch.ones(12, 0))]}, "do not make"),
        ({"factors": [(A, B)], "strengths": [1, 2]}, "1 adapters need as many strengths"),
        ({"factors": [(A, B)], "strengths": [float("nan")]}, "strength nan of adapter 0"),
        ({"factors": [(A, B)], "strengths": [10**400]}, "strength inf of adapter 0 is not"),
        ({"factors": [(A, B)], "strengths": [-1e39]}, r"strength -1e\+39 of adapter 0 is not"),
        ({"factors": [(A, B)], "strengths": ["1"]}, "strength '1' of adapter 0 is not"),
        ({"factors": [(A, B)], "strengths": [None]}, "strength None of adapter 0 is not"),
        ({"factors": [(A, B)] * 2, "names": ["a", "a"]}, "different names"),
        ({"factors": [(A, B)], "names": []}, "different names"),
        ({"gate": Gate(13)}, "13 channels can't serve 12"),
        ({"base": nn.LayerNorm(8)}, "LayerNorm: not a linear"),
        ({"base": FusedLinear(nn.Linear(8, 12))}, "FusedLinear: not a linear"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, words):
    with pytest.raises(FusionError, match=words):
        FusedLinear(**{"base": nn.Linear(8, 12), **arguments})
