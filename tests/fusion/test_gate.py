"""One gate: its equation, its neutral state, its names, its cache."""

from __future__ import annotations

import pytest
import torch

from autolora.errors import FusionError
from autolora.fusion import Gate
from autolora.fusion.gate import PARAMETER_NAMES
from tests.fusion.reference import double, gated_sum, random_factors, random_gate_tensors

CPU = torch.device("cpu")


def test_forward_is_the_equation():
    generator = torch.Generator().manual_seed(0)
    tensors = random_gate_tensors(10, generator)
    factors = random_factors([2, 3], 6, 10, generator)
    x, y = torch.randn(2, 5, 6, generator=generator), torch.randn(2, 5, 10, generator=generator)
    outputs = torch.stack([x @ a.T @ b.T for a, b in factors])
    fused = Gate.from_diffsynth(tensors)(y, outputs)
    factors64 = [(a.double(), b.double()) for a, b in factors]
    truth = gated_sum(y.double(), x.double(), factors64, [1, 1], double(tensors))
    torch.testing.assert_close(fused.double(), truth, rtol=1e-5, atol=1e-5)


def test_from_diffsynth_keeps_every_tensor():
    tensors = random_gate_tensors(7, torch.Generator().manual_seed(1))
    state_dict = Gate.from_diffsynth(tensors).state_dict()
    assert set(state_dict) == set(PARAMETER_NAMES)
    for name, tensor in tensors.items():
        assert torch.equal(state_dict[name], tensor)


def test_the_neutral_gate_is_the_sum_to_the_bit():
    y, outputs = torch.randn(4, 9), torch.randn(1, 4, 9)
    gate = Gate.neutral(9)
    assert gate.is_neutral()
    assert torch.equal(gate(y, outputs), y + outputs[0])


@pytest.mark.parametrize(
    "name", ["weight_base", "weight_lora", "weight_cross", "bias", "weight_out"]
)
def test_one_changed_number_ends_neutrality(name):
    gate = Gate.neutral(9).requires_grad_(False)
    assert gate.terms(torch.float32, CPU) is None
    getattr(gate, name)[3] += 1e-3
    assert not gate.is_neutral()
    assert gate.terms(torch.float32, CPU) is not None


def test_terms_are_cached_until_a_parameter_changes():
    gate = Gate.from_diffsynth(random_gate_tensors(5, torch.Generator().manual_seed(2)))
    with torch.no_grad():
        first = gate.terms(torch.float32, CPU)
        assert gate.terms(torch.float32, CPU) is first
        assert gate.terms(torch.float64, CPU).out.dtype == torch.float64
        gate.weight_base += 1
        changed = gate.terms(torch.float32, CPU)
        gate.norm_lora.bias.data = torch.ones(5)
        replaced = gate.terms(torch.float32, CPU)
    assert not torch.equal(first.base_weight, changed.base_weight)
    assert not torch.equal(changed.base_weight, replaced.base_weight)


def test_terms_cached_under_inference_mode_serve_training():
    gate = Gate.from_diffsynth(random_gate_tensors(5, torch.Generator().manual_seed(3)))
    gate.requires_grad_(False)
    with torch.inference_mode():
        gate.terms(torch.float32, CPU)
    x = torch.randn(5, requires_grad=True)
    (gate.terms(torch.float32, CPU).base_weight * x).sum().backward()
    assert x.grad is not None


def broken(**changes):
    tensors = random_gate_tensors(6, torch.Generator().manual_seed(4))
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    return tensors


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (broken(weight_cross=None), "missing: weight_cross"),
        (broken(weight_new=torch.ones(6)), "unknown: weight_new"),
        (broken(weight_base=torch.ones(5)), r"weight_base has shape \[5\]"),
        (broken(weight_base=torch.ones(1, 6)), r"weight_base has shape \[1, 6\]"),
        (broken(bias=torch.full((6,), float("nan"))), "bias must hold finite"),
        (broken(bias=torch.ones(6, dtype=torch.int32)), "bias must hold finite floating"),
        ({}, "missing: weight_base"),
    ],
)
def test_wrong_tensors_are_refused(tensors, words):
    with pytest.raises(FusionError, match=words):
        Gate.from_diffsynth(tensors)
