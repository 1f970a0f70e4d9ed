"""Adapters in every family: the same as DiffSynth's own fused LoRA, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from autolora.fusion import Gate, GateBank, attached, linear_shapes
from tests.families.conftest import Model
from tests.families.test_sampling import by_units, picture
from tests.fusion.reference import double, gated_sum, random_adapter, random_gate_tensors

SCALES = (0.7, -0.4)


@pytest.fixture
def adapters(small: Model) -> list:
    """Two adapters on every linear layer of the denoiser that is in a block."""
    shapes = {
        name: shape
        for name, shape in linear_shapes(small.denoiser).items()
        if any(piece.isdigit() for piece in name.split("."))
    }
    assert len(shapes) > 20
    return [(random_adapter(f"adapter-{i}", shapes, 4, i), scale) for i, scale in enumerate(SCALES)]


@contextmanager
def fused_by_diffsynth(small: Model, adapters: list) -> Iterator[None]:
    """DiffSynth's own loader adds the adapters to the weights; afterwards they are as before."""
    model = small.denoiser
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for adapter, scale in adapters:
        state = {}
        for layer in adapter.layers:
            state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"] = adapter.factors(
                layer
            )
        small.pipe.load_lora(model, state_dict=state, alpha=scale, verbose=0)
    try:
        yield
    finally:
        model.load_state_dict(before)


@pytest.fixture
def truth(small: Model, adapters: list, capsys) -> torch.Tensor:
    with fused_by_diffsynth(small, adapters):
        latents = small.theirs()
    assert (latents - small.theirs()).abs().max() > 0.01, "the adapters must act"
    return latents


@pytest.mark.parametrize("strategy", ["sum", "merged"])
def test_as_diffsynths_fused_lora(small: Model, adapters, truth, strategy: str) -> None:
    before = {name: value.clone() for name, value in small.denoiser.state_dict().items()}
    with attached(small.denoiser, adapters, strategy):
        ours = small.latents()
    assert_close(ours, truth)
    after = small.denoiser.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_image_to_image_with_adapters(small: Model, adapters) -> None:
    inputs = {"input_image": picture(), "denoising_strength": 0.6}
    with fused_by_diffsynth(small, adapters):
        theirs = by_units(small, inputs) if small.family.unit_inputs else small.theirs(**inputs)
    with attached(small.denoiser, adapters, "sum"):
        assert_close(small.latents(inputs=inputs), theirs)


def test_gated_as_the_equation_written_out(small: Model, adapters) -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = linear_shapes(small.denoiser)
    tensors = {
        layer: {
            name: 0.3 * t for name, t in random_gate_tensors(shapes[layer][0], generator).items()
        }
        for layer in adapters[0][0].layers
    }
    gates = GateBank({layer: Gate.from_diffsynth(gate) for layer, gate in tensors.items()})
    with written_out(small, adapters, tensors):
        theirs = small.theirs()
    assert (theirs - small.theirs()).abs().max() > 0.01, "the adapters must act"
    with attached(small.denoiser, adapters, "gated", gates):
        assert_close(small.latents(), theirs)


@contextmanager
def written_out(small: Model, adapters: list, gates: dict) -> Iterator[None]:
    """The published equation around every layer, naively and in float64."""
    hooks = []

    def hook_of(layer: str):
        factors = [tuple(f.double() for f in adapter.factors(layer)) for adapter, _ in adapters]
        gate, scales = double(gates[layer]), [scale for _, scale in adapters]

        def hook(module, inputs, output):
            summed = gated_sum(output.double(), inputs[0].double(), factors, scales, gate)
            return summed.to(output.dtype)

        return hook

    for layer in gates:
        module = small.denoiser.get_submodule(layer)
        hooks.append(module.register_forward_hook(hook_of(layer)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
    assert error < 1e-5
