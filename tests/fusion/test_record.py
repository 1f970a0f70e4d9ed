"""Gates by adapter, layer and step."""

import numpy as np
import pytest
import torch

from autolora.fusion import GateRecords


def recorded(calls: int) -> tuple[GateRecords, dict[str, np.ndarray]]:
    """Records of two layers, one of which has one adapter only, and their values."""
    generator = torch.Generator().manual_seed(0)
    records = GateRecords()
    values = {}
    for layer, names in (("blocks.0.a", ("cat", "neon")), ("single_blocks.0.b", ("neon",))):
        tensors = [torch.rand(len(names), generator=generator) for _ in range(calls)]
        records.names[layer], records.calls[layer] = names, tensors
        values[layer] = np.array([tensor.tolist() for tensor in tensors])
    records.names["blocks.1.never"], records.calls["blocks.1.never"] = ("cat",), []
    return records, values


@pytest.mark.parametrize("per_step", [1, 2])
def test_calls_of_a_step_are_averaged(per_step: int) -> None:
    records, values = recorded(3 * per_step)
    gates = records.by_step(3)
    assert gates.layers == ("blocks.0.a", "single_blocks.0.b") and gates.steps == 3
    for name, layer, column in (("cat", 0, 0), ("neon", 0, 1), ("neon", 1, 0)):
        series = values[gates.layers[layer]][:, column]
        expected = [
            sum(series[step * per_step : (step + 1) * per_step]) / per_step for step in range(3)
        ]
        assert gates.adapters[name][layer] == pytest.approx(expected, abs=1e-6)
    assert gates.adapters["cat"][1] is None
    mean = records.by_layer()["blocks.0.a"]["cat"]
    assert np.mean(gates.adapters["cat"][0]) == pytest.approx(mean, abs=1e-6)


def test_plain_data_is_rounded() -> None:
    records, _ = recorded(2)
    plain = records.by_step(2).to_dict()
    assert plain["adapters"]["cat"][1] is None and plain["steps"] == 2
    assert all(round(value, 3) == value for value in plain["adapters"]["neon"][0])


def test_calls_that_do_not_make_steps_are_an_error() -> None:
    with pytest.raises(ValueError, match="do not make 2 steps"):
        recorded(3)[0].by_step(2)
