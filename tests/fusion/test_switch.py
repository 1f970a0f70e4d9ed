"""Switching: only what differs is touched, and the result is that of attaching afresh."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autolora.errors import FusionError
from autolora.fusion import (
    FusedLinear,
    GateBank,
    add,
    attach,
    attached_layers,
    attached_names,
    detach,
    packed,
    remove,
    set_strengths,
    switch,
)
from autolora.fusion.attach import make_ready
from autolora.fusion.merge import merge_, merge_of
from tests.fusion.reference import (
    FakeAdapter,
    TinyModel,
    model_shapes,
    random_adapter,
    random_gate,
)

LAYER = "single_blocks.0.proj_out"
NAMES = ("a", "b", "c", "d")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TinyModel().eval().requires_grad_(False)


class Counting(FakeAdapter):
    """Counts how often its factors are asked for."""

    def __init__(self, name, factors):
        super().__init__(name, factors)
        self.asked = 0

    def factors(self, layer):
        self.asked += 1
        return super().factors(layer)


def make_adapters(model):
    """Four adapters; each but the first leaves out some layers."""
    shapes = model_shapes(model)
    adapters = {}
    for number, name in enumerate(NAMES):
        kept = {layer: shape for i, (layer, shape) in enumerate(shapes.items()) if i >= number}
        full = random_adapter(name, kept, 2 + number, seed=number)
        adapters[name] = Counting(name, {layer: full.factors(layer) for layer in kept})
    return adapters


def make_gates(model):
    generator = torch.Generator().manual_seed(7)
    shapes = model_shapes(model)
    return GateBank({layer: random_gate(out, generator) for layer, (out, _) in shapes.items()})


def output(model):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        return model(
            torch.randn(2, 5, 16, generator=generator), torch.randn(2, 16, generator=generator)
        )


def state(model):
    return {
        layer: (fused, fused.names, fused.strengths, fused.factors)
        for layer, fused in attached_layers(model).items()
    }


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(("add", "remove", "strength", "switch", "run")),
        st.sampled_from(NAMES),
        st.sampled_from((1.0, 0.5, -0.25, 0.0)),
    ),
    max_size=12,
)


def apply(model, adapters, gates, strategy, wanted, operation):
    """One operation on the model and on ``wanted``, the strengths that are meant to hold."""
    action, name, strength = operation
    if action == "add" and name not in wanted:
        wanted[name] = strength
        add(model, adapters[name], strength, strategy, gates)
    elif action == "remove" and name in wanted:
        del wanted[name]
        remove(model, name)
    elif action == "strength" and name in wanted:
        wanted[name] = strength
        set_strengths(model, {name: strength})
    elif action == "switch":
        kept = [entry for entry in wanted if entry != name]
        new = {name: strength, **{entry: wanted[entry] for entry in kept}}
        wanted.clear()
        wanted.update(new)
        pairs = [(adapters[entry], value) for entry, value in wanted.items()]
        switch(model, pairs, strategy, gates)
    elif action == "run":
        output(model)


@pytest.mark.parametrize("strategy", ["sum", "gated", "merged"])
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(operations=OPERATIONS)
def test_any_sequence_equals_attaching_its_end_afresh(model, strategy, operations):
    detach(model)
    adapters, gates = make_adapters(model), make_gates(model)
    bare, wanted = output(model), {}
    for operation in operations:
        apply(model, adapters, gates, strategy, wanted, operation)
    assert set(attached_names(model)) == set(wanted)
    result = output(model)
    detach(model)
    assert torch.equal(output(model), bare)
    attach(model, [(adapters[name], s) for name, s in wanted.items()], strategy, gates)
    assert torch.equal(output(model), result)


def test_removing_one_leaves_the_others_untouched(model):
    adapters = make_adapters(model)
    attach(model, [(adapters[name], 1.0) for name in NAMES], "sum")
    before = state(model)
    for adapter in adapters.values():
        adapter.asked = 0
    assert remove(model, "b") == 5
    assert all(adapter.asked == 0 for adapter in adapters.values())
    for layer, (fused, names, _, factors) in state(model).items():
        was, was_names, _, was_factors = before[layer]
        assert fused is was and names == tuple(name for name in was_names if name != "b")
        kept = [pair for name, pair in zip(was_names, was_factors, strict=True) if name != "b"]
        for (a, b), (c, d) in zip(factors, kept, strict=True):
            assert a is c and b is d
    bases = {layer: fused.base for layer, fused in attached_layers(model).items()}
    for name in ("a", "c", "d"):
        remove(model, name)
    assert not attached_layers(model)
    assert all(model.get_submodule(layer) is base for layer, base in bases.items())
    with pytest.raises(FusionError, match="'a' is not attached; attached: none"):
        remove(model, "a")


def test_adding_one_asks_only_it_for_factors(model):
    adapters = make_adapters(model)
    attach(model, [(adapters["a"], 1.0), (adapters["b"], 0.5)], "sum")
    before = state(model)
    asked = adapters["a"].asked, adapters["b"].asked
    entry = add(model, adapters["d"], 0.25, "sum")
    assert (entry.name, entry.strength, len(entry.layers)) == ("d", 0.25, 3)
    assert (adapters["a"].asked, adapters["b"].asked) == asked
    for layer, (fused, names, *_) in state(model).items():
        assert fused is before[layer][0]
        assert names == (*before[layer][1], *(["d"] if layer in adapters["d"].layers else []))


def test_layers_where_nothing_differs_are_not_touched(model, monkeypatch):
    adapters, gates = make_adapters(model), make_gates(model)
    attach(model, [(adapters["a"], 1.0), (adapters["d"], 1.0)], "gated", gates)
    before, touched = state(model), []
    change = FusedLinear.set_adapters

    def watched(self, *arguments):
        if self in {entry[0] for entry in before.values()}:
            touched.append(self)
        return change(self, *arguments)

    monkeypatch.setattr(FusedLinear, "set_adapters", watched)
    switch(model, [(adapters["a"], 1.0), (adapters["d"], 0.5)], "gated", gates)
    assert touched == [before[layer][0] for layer in before if layer in adapters["d"].layers]
    assert all(state(model)[layer][0] is before[layer][0] for layer in before)
    switch(model, [(adapters["a"], 1.0), (adapters["d"], 0.5)], "sum", gates)
    assert all(fused.gate is None for fused in attached_layers(model).values())


@pytest.mark.parametrize("function", ["switch", "add"])
def test_a_switch_that_is_refused_changes_nothing(model, function):
    adapters = make_adapters(model)

    class Liar(FakeAdapter):
        def shape(self, layer):
            return 16, 32

    shapes = model_shapes(model)
    good = random_adapter("good", {"single_blocks.0.norm.linear": shapes[LAYER][:1] * 2}, 2, 0)
    lies = {**good._factors, LAYER: (torch.ones(2, 5), torch.ones(16, 2))}
    liar = Liar("liar", lies)
    liar.shape = lambda layer: (16, 32) if layer == LAYER else good.shape(layer)
    wide = random_adapter("wide", {LAYER: (16, 33)}, 2, 0)
    attach(model, [(adapters["a"], 1.0), (adapters["b"], 1.0)], "sum")
    before = state(model)
    for bad, words in ((liar, "proj_out"), (wide, "made for another base model")):
        with pytest.raises(FusionError, match=words):
            if function == "switch":
                switch(model, [(adapters["b"], 0.5), (bad, 1.0)], "sum")
            else:
                add(model, bad, 1.0, "sum")
        assert state(model) == before
    with pytest.raises(FusionError, match="'a' is attached already"):
        add(model, adapters["a"], 1.0, "sum")
    with pytest.raises(FusionError, match="other gates"):
        add(model, adapters["c"], 1.0, "gated", make_gates(model))
    with pytest.raises(FusionError, match="not merged"):
        add(model, adapters["c"], 1.0, "merged")
    assert state(model) == before


def test_merged_and_attached_take_each_others_place(model):
    adapters, bare = make_adapters(model), output(model)
    pair = [(adapters["a"], 1.0)]
    switch(model, pair, "sum")
    summed = output(model)
    switch(model, pair, "merged")
    assert not attached_layers(model)
    torch.testing.assert_close(output(model), summed, rtol=1e-4, atol=1e-5)
    add(model, adapters["b"], 1.0, "merged")
    assert attached_names(model) == ("a", "b")
    remove(model, "b")
    switch(model, pair, "sum")
    assert torch.equal(output(model), summed)
    switch(model, [], "sum")
    assert torch.equal(output(model), bare) and not attached_names(model)


def test_a_merge_that_cannot_be_changed_stays(model):
    adapters, shapes = make_adapters(model), model_shapes(model)
    switch(model, [(adapters["a"], 0.5)], "merged")
    before = output(model)
    wrong = random_adapter("wrong", {LAYER: (shapes[LAYER][0] + 1, shapes[LAYER][1])}, 2, seed=0)
    with pytest.raises(FusionError, match="does not fit this model"):
        add(model, wrong, 1.0, "merged")
    assert attached_names(model) == ("a",) and torch.equal(output(model), before)


def test_a_merge_keeps_its_kind_of_backup(model):
    adapters = make_adapters(model)
    originals = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merge_(model, [(adapters["a"], 1.0)], "reread", originals.__getitem__)
    set_strengths(model, {"a": 0.5})
    add(model, adapters["b"], 1.0, "merged")
    remove(model, "a")
    merge = merge_of(model)
    assert merge.backup == "reread" and all(kept is None for _, _, kept in merge.saved.values())
    remove(model, "b")
    assert merge_of(model) is None
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, originals[name])


def test_nothing_grows(model):
    adapters, gates = make_adapters(model), make_gates(model)
    generator = torch.Generator().manual_seed(1)
    counts = []
    for turn in range(120):
        chosen = torch.randperm(4, generator=generator)[:3].tolist()
        strengths = torch.rand(3, generator=generator).tolist()
        pairs = [(adapters[NAMES[i]], s) for i, s in zip(chosen, strengths, strict=True)]
        switch(model, pairs, "gated", gates)
        output(model)
        if turn in (40, 119):
            switch(model, [(adapters[name], 1.0) for name in NAMES], "gated", gates)
            output(model)
            gc.collect()
            counts.append(sum(type(thing) is torch.Tensor for thing in gc.get_objects()))
    assert counts[0] == counts[1]


def test_what_is_derived_of_factors_is_kept_while_they_live():
    a, b = torch.randn(3, 8), torch.randn(6, 3)
    cpu = torch.device("cpu")
    before = len(packed._KEPT)
    first = packed.derived_factors(a, b, torch.float32, cpu)
    assert packed.derived_factors(a, b, torch.float32, cpu) is first
    assert packed.derived_factors(a.clone(), b, torch.float32, cpu) is not first
    again = packed.derived_factors(a, b, torch.float32, cpu)
    assert again is not first and torch.equal(again.centred, first.centred)
    b.mul_(2)
    doubled = packed.derived_factors(a, b, torch.float32, cpu)
    torch.testing.assert_close(doubled.covariance, 4 * first.covariance)
    assert packed.derived_factors(a, b, torch.bfloat16, cpu).down.dtype == torch.bfloat16
    assert len(packed._KEPT) == before + 1
    del a, b
    gc.collect()
    assert len(packed._KEPT) == before


def test_ready_layers_give_the_same_output(model):
    adapters, gates = make_adapters(model), make_gates(model)
    attach(model, [(adapters["a"], 1.0), (adapters["d"], 0.5)], "gated", gates)
    assert make_ready(model, torch.float32) == 6
    ready = output(model)
    attach(model, [(adapters["a"], 1.0), (adapters["d"], 0.5)], "gated", gates)
    assert torch.equal(output(model), ready)
