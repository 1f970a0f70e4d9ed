"""Attaching to a model: what is matched, what is refused, what is restored."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from autolora.errors import FusionError
from autolora.fusion import (
    Adapter,
    FusedLinear,
    GateBank,
    attach,
    attached,
    attached_layers,
    detach,
    linear_shapes,
    record_gates,
    set_strengths,
    strategy_names,
)
from tests.fusion.reference import (
    FakeAdapter,
    TinyModel,
    model_shapes,
    random_adapter,
    random_gate,
)

LAYER = "single_blocks.0.proj_out"


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TinyModel().eval().requires_grad_(False)


@pytest.fixture
def inputs():
    return torch.randn(2, 5, 16), torch.randn(2, 16)


def adapters_for(model, count=2):
    shapes = model_shapes(model)
    return [(random_adapter(f"lora{i}", shapes, 2 + i, seed=i), 1.0) for i in range(count)]


def gates_for(model):
    generator = torch.Generator().manual_seed(7)
    shapes = model_shapes(model)
    return GateBank({layer: random_gate(out, generator) for layer, (out, _) in shapes.items()})


def state_bytes(model):
    return {
        name: (t.dtype, t.data_ptr(), t.numpy().tobytes()) for name, t in model.state_dict().items()
    }


def test_attach_run_detach_leaves_the_model_as_it_was(model, inputs):
    before, modules, output = state_bytes(model), dict(model.named_modules()), model(*inputs)
    shapes = model_shapes(model)
    report = attach(model, adapters_for(model), gates=gates_for(model))
    assert linear_shapes(model) == shapes and set(report.layers) == set(shapes)
    assert not torch.allclose(model(*inputs), output)
    assert detach(model) == len(shapes)
    after = dict(model.named_modules())
    assert after.keys() == modules.keys() and all(after[k] is modules[k] for k in modules)
    assert state_bytes(model) == before
    assert torch.equal(model(*inputs), output)
    assert detach(model) == 0


def test_the_sum_is_that_of_merged_weights(model, inputs):
    adapters = [(a, s) for (a, _), s in zip(adapters_for(model), (0.8, -0.3), strict=True)]
    with attached(model, adapters, "sum"):
        fused = model(*inputs)
    merged = TinyModel().requires_grad_(False)
    merged.load_state_dict(model.state_dict())
    for layer in model_shapes(model):
        for adapter, strength in adapters:
            a, b = adapter.factors(layer)
            merged.get_submodule(layer).weight += strength * b @ a
    torch.testing.assert_close(fused, merged(*inputs), rtol=1e-4, atol=1e-5)


def test_gated_uses_each_layers_own_gate(model):
    gates = gates_for(model)
    attach(model, adapters_for(model), "gated", gates)
    for layer, fused in attached_layers(model).items():
        assert fused.gate is gates[layer]
    attach(model, adapters_for(model), "sum", gates)
    assert all(fused.gate is None for fused in attached_layers(model).values())


def test_without_gates_gated_is_the_sum_to_the_bit(model, inputs):
    outputs = []
    neutral = GateBank.neutral(model_shapes(model))
    for strategy, gates in (("sum", None), ("gated", None), ("gated", neutral)):
        with attached(model, adapters_for(model), strategy, gates), torch.no_grad():
            outputs.append(model(*inputs))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_attaching_again_replaces_and_never_nests(model, inputs):
    linear = model.get_submodule(LAYER)
    attach(model, adapters_for(model, 3))
    attach(model, adapters_for(model, 1))
    once = model(*inputs)
    fused = model.get_submodule(LAYER)
    assert isinstance(fused, FusedLinear) and fused.base is linear and fused.names == ("lora0",)
    detach(model)
    attach(model, adapters_for(model, 1))
    assert torch.equal(model(*inputs), once)


def test_no_adapters_means_the_base(model, inputs):
    output = model(*inputs)
    attach(model, adapters_for(model))
    report = attach(model, [])
    assert report.layers == () and attached_layers(model) == {}
    assert torch.equal(model(*inputs), output)


def test_the_report_names_what_was_skipped_and_why(model):
    shapes = model_shapes(model)
    partial = random_adapter("partial", {LAYER: shapes[LAYER]}, 2, 0)
    extra = random_adapter("extra", {**shapes, "blocks.9.ff_a.0": (4, 4)}, 2, 1)
    gates = gates_for(model)
    del gates.model_dict[LAYER.replace(".", "___")]
    report = attach(model, [(partial, 0.5), (extra, 1)], "gated", gates)
    first, second = report.adapters
    assert (first.name, first.strength) == ("partial", 0.5)
    assert (first.layers, first.skipped) == ((LAYER,), {})
    assert set(second.layers) == set(shapes)
    assert second.skipped == {"blocks.9.ff_a.0": "the model has no linear layer of this name"}
    assert report.ungated == (LAYER,)
    assert model.get_submodule(LAYER).names == ("partial", "extra")
    assert json.loads(json.dumps(report.to_dict()))["strategy"] == "gated"


def refused(model, adapters, words, **arguments):
    modules = dict(model.named_modules())
    with pytest.raises(FusionError, match=words):
        attach(model, adapters, **arguments)
    after = dict(model.named_modules())
    assert after.keys() == modules.keys() and all(after[k] is modules[k] for k in modules)


@pytest.mark.parametrize("occupied", [False, True])
def test_refusals_change_nothing(model, occupied):
    if occupied:
        attach(model, adapters_for(model, 1))
    good = (random_adapter("good", {LAYER: (16, 32)}, 2, 0), 1.0)
    wide = random_adapter("wide", {LAYER: (16, 33)}, 2, 0)
    alien = random_adapter("alien", {"down_blocks.0.to_q": (4, 4)}, 2, 0)
    norm = random_adapter("norm", {"single_blocks.0.activation": (4, 4)}, 2, 0)
    refused(model, [good, (wide, 1.0)], r"'wide' .*proj_out is \[16, 32\] here and \[16, 33\]")
    refused(model, [good, (alien, 1.0)], "'alien' matches no layer .*down_blocks.0.to_q")
    refused(model, [good, (norm, 1.0)], "'norm' matches no layer")
    refused(model, [good, good], "'good' is given twice")
    refused(model, [(good[0], float("inf"))], "strength inf of adapter 'good'")
    refused(model, [(good[0], "1")], "strength '1' of adapter 'good'")
    refused(
        model,
        [good],
        "unknown strategy 'ties2'; choose one of autolora, gated, sum",
        strategy="ties2",
    )
    other = GateBank.neutral({"blocks.0.ff_a.0": (16, 4)})
    refused(model, [good], "gates are for another model: .*missing here", gates=other)
    other = GateBank.neutral({LAYER: (15, 32)})
    refused(model, [good], "15 channels has 16 channels here", gates=other)


def test_factors_that_break_their_promise_change_nothing(model):
    class Liar(FakeAdapter):
        def shape(self, layer):
            return 16, 32

    refused(model, [(Liar("liar", {LAYER: (torch.ones(2, 5), torch.ones(16, 2))}), 1)], "proj_out")


def test_the_context_restores_after_an_exception(model, inputs):
    output = model(*inputs)
    with pytest.raises(ZeroDivisionError), attached(model, adapters_for(model)):
        assert attached_layers(model)
        raise ZeroDivisionError
    assert attached_layers(model) == {}
    assert torch.equal(model(*inputs), output)


def test_the_context_restores_what_was_attached_before(model):
    attach(model, adapters_for(model, 1))
    before = attached_layers(model)
    with attached(model, adapters_for(model, 2)):
        assert attached_layers(model)[LAYER].names == ("lora0", "lora1")
    assert attached_layers(model) == before
    with pytest.raises(FusionError), attached(model, [], "nonsense"):
        pass
    assert attached_layers(model) == before


def test_strengths_change_without_attaching_again(model, inputs):
    adapters = adapters_for(model, 2)
    attach(model, adapters, gates=gates_for(model))
    fused = model.get_submodule(LAYER)
    set_strengths(model, {"lora1": -0.25})
    changed = model(*inputs)
    assert model.get_submodule(LAYER) is fused and fused.strengths == (1.0, -0.25)
    attach(model, [(adapters[0][0], 1.0), (adapters[1][0], -0.25)], gates=gates_for(model))
    assert torch.equal(model(*inputs), changed)


def test_wrong_strengths_change_nothing(model):
    attach(model, adapters_for(model, 2))
    fused = model.get_submodule(LAYER)
    with pytest.raises(FusionError, match="'lora9' is not attached; attached: lora0, lora1"):
        set_strengths(model, {"lora0": 0.5, "lora9": 1.0})
    with pytest.raises(FusionError, match="strength nan"):
        set_strengths(model, {"lora0": 0.5, "lora1": float("nan")})
    assert fused.strengths == (1.0, 1.0)
    detach(model)
    with pytest.raises(FusionError, match="attached: none"):
        set_strengths(model, {"lora0": 0.5})


def test_recording_gates_changes_no_bit_and_tells_who_speaks(model, inputs):
    adapters = adapters_for(model, 3)
    adapters[2] = (adapters[2][0], 0.0)
    gates = gates_for(model)
    attach(model, adapters, "gated", gates)
    plain = model(*inputs)
    with record_gates(model) as records:
        assert torch.equal(model(*inputs), plain)
        model(*inputs)
    assert all(len(calls) == 2 for calls in records.calls.values())
    seen = records.by_layer()
    assert set(seen) == set(model_shapes(model))

    fused = model.get_submodule("single_blocks.0.to_qkv_mlp")
    gate, x = gates["single_blocks.0.to_qkv_mlp"], inputs[0]
    for i, name in enumerate(("lora0", "lora1")):
        a, b = adapters[i][0].factors("single_blocks.0.to_qkv_mlp")
        base, lora = gate.norm_base(fused.base(x)), gate.norm_lora(x @ a.T @ b.T)
        argument = base * gate.weight_base + lora * gate.weight_lora
        argument = argument + base * lora * gate.weight_cross + gate.bias
        truth = (gate.weight_out * torch.sigmoid(argument)).mean().item()
        assert seen["single_blocks.0.to_qkv_mlp"][name] == pytest.approx(truth, abs=1e-5)
    assert records.by_adapter()["lora2"] == 0
    model(*inputs)
    assert all(len(calls) == 2 for calls in records.calls.values())


def test_the_plain_sum_records_ones(model, inputs):
    attach(model, adapters_for(model, 2), "sum")
    with record_gates(model) as records:
        model(*inputs)
    assert records.by_adapter() == {"lora0": 1.0, "lora1": 1.0}
    assert isinstance(adapters_for(model)[0][0], Adapter)


def test_a_quantized_layer_with_a_linear_inside_is_wrapped_once():
    class Quantized(nn.Module):
        in_features, out_features = 4, 6

        def __init__(self):
            super().__init__()
            self.module = nn.Linear(4, 6)

        def forward(self, x):
            return self.module(x)

    model = nn.Sequential(Quantized(), nn.Linear(6, 3))
    adapter = random_adapter("a", {"0": (6, 4), "1": (3, 6)}, 2, 0)
    inner = random_adapter("b", {"0.module": (6, 4), "1": (3, 6)}, 2, 0)
    report = attach(model, [(adapter, 1.0), (inner, 1.0)])
    assert report.layers == ("0", "1")
    assert set(report.adapters[1].skipped) == {"0.module"}
    assert isinstance(model[0], FusedLinear) and isinstance(model[0].base, Quantized)


def test_strategies_are_listed():
    assert strategy_names()[:4] == ("autolora", "gated", "sum", "merged")
