"""sd-scripts' three calls: clean before, float32 between, the same bits and memory afterwards."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from autolora.errors import FusionError
from autolora.fusion import WeightExchange, attach, detach, merge_, restore
from tests.fusion.reference import model_shapes, random_adapter


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(16, 24), nn.SiLU(), nn.Linear(24, 16))
    return layers.to(torch.bfloat16).requires_grad_(False)


def adapters(model: nn.Module, count: int = 2, seed: int = 0) -> list:
    shapes = model_shapes(model)
    return [(random_adapter(f"a{i}", shapes, 4, seed + i), 0.5 + i) for i in range(count)]


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def held() -> int:
    """Bytes of all tensors that are alive; none is kept alive by looking."""
    alive = (o for o in gc.get_objects() if isinstance(o, torch.Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in alive)


def test_weights_are_added_in_float32_and_rounded_once(model) -> None:
    before, pairs = bits(model), adapters(model)
    exchange = WeightExchange([(model, pairs)])
    exchange.backup_weights()
    assert same(before, bits(model)) and not exchange.merged
    (report,) = exchange.pre_calculation()
    assert exchange.merged and report.layers == ("0", "2")
    for layer in report.layers:
        exact = before[f"{layer}.weight"].double()
        for adapter, scale in pairs:
            a, b = adapter.factors(layer)
            exact = exact + scale * (b.double() @ a.double())
        ours = model.get_submodule(layer).weight
        assert ours.dtype == torch.bfloat16
        off = ours.double() - exact
        assert (off.abs() <= exact.abs() * 2**-8).all(), "half a step of bfloat16, not two"
    assert exchange.restore_weights() == 2
    assert same(before, bits(model)) and not exchange.merged


def test_ten_exchanges_leave_the_same_bits_and_no_memory(model) -> None:
    before, sizes = bits(model), []
    for seed in range(10):
        with WeightExchange([(model, adapters(model, seed=10 * seed))]) as exchange:
            assert exchange.merged and not same(before, bits(model))
        gc.collect()
        sizes.append(held())
    assert same(before, bits(model))
    assert len(set(sizes[1:])) == 1, "what is held does not grow"


def test_calls_in_the_wrong_order_change_nothing(model) -> None:
    before = bits(model)
    exchange = WeightExchange([(model, adapters(model))])
    with pytest.raises(FusionError, match="no backup of the weights"):
        exchange.pre_calculation()
    with pytest.raises(FusionError, match="nothing to restore"):
        exchange.restore_weights()
    exchange.backup_weights()
    with pytest.raises(FusionError, match="backed up already"):
        exchange.backup_weights()
    exchange.pre_calculation()
    during = bits(model)
    with pytest.raises(FusionError, match="in the weights already"):
        exchange.pre_calculation()
    assert same(during, bits(model))
    exchange.restore_weights()
    with pytest.raises(FusionError, match="nothing to restore"):
        exchange.restore_weights()
    assert same(before, bits(model))


def test_a_model_that_is_not_clean_is_refused(model) -> None:
    pairs = adapters(model)
    merge_(model, pairs)
    with pytest.raises(FusionError, match="not clean"):
        WeightExchange([(model, adapters(model, seed=5))]).backup_weights()
    restore(model)
    attach(model, pairs, "sum")
    with pytest.raises(FusionError, match="not clean"):
        WeightExchange([(model, adapters(model, seed=5))]).backup_weights()
    detach(model)


def test_an_error_in_one_model_restores_the_others(model, monkeypatch) -> None:
    other = nn.Sequential(nn.Linear(16, 24), nn.SiLU(), nn.Linear(24, 16)).requires_grad_(False)
    broken = random_adapter("b", model_shapes(other), 4, 1)
    exchange = WeightExchange([(model, adapters(model)), (other, [(broken, 1.0)])])
    before = bits(model)
    exchange.backup_weights()

    def fail(layer: str):
        raise FusionError("gone")

    monkeypatch.setattr(broken, "factors", fail)
    with pytest.raises(FusionError, match="gone"):
        exchange.pre_calculation()
    assert same(before, bits(model)) and not exchange.merged
    wrong = random_adapter("w", {"0": (8, 8)}, 4, 1)
    with pytest.raises(FusionError):
        WeightExchange([(model, [(wrong, 1.0)])]).backup_weights()
