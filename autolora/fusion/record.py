"""Mean gate activation per adapter, layer and step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autolora.fusion.match import attached_layers


@dataclass(frozen=True)
class GateMap:
    """Gates of one picture by adapter, layer and step, counted as `GateRecords` counts them.

    Attributes:
        layers: Names of the layers, in the order in which they run.
        steps: Denoising steps.
        adapters: By adapter, rows by layer of values by step; None where a layer lacks the adapter.
    """

    layers: tuple[str, ...]
    steps: int
    adapters: Mapping[str, Sequence[Sequence[float] | None]]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, rounded to what can be seen."""
        rows = {
            name: [None if row is None else [round(value, 3) for value in row] for row in rows]
            for name, rows in self.adapters.items()
        }
        return {"layers": list(self.layers), "steps": self.steps, "adapters": rows}


class GateRecords:
    """The mean gates of every call of every layer since recording began.

    A gate is counted as it acts, ``w_out * g``, averaged over tokens and channels: 0 is silence,
    1 is what the plain sum lets through.

    Attributes:
        names: The adapters of each layer.
        calls: Per layer, one tensor ``[N]`` per call, on the device of the layer. In a diffusion
            model a call is one denoising step (two with classifier-free guidance).
    """

    def __init__(self) -> None:
        self.names: dict[str, tuple[str, ...]] = {}
        self.calls: dict[str, list[Tensor]] = {}

    def by_layer(self) -> dict[str, dict[str, float]]:
        """Return the mean over calls, by layer and adapter."""
        return {
            layer: dict(zip(self.names[layer], torch.stack(calls).mean(0).tolist(), strict=True))
            for layer, calls in self.calls.items()
            if calls
        }

    def by_adapter(self) -> dict[str, float]:
        """Return the mean over calls and layers, by adapter."""
        gates: dict[str, list[float]] = {}
        for layer in self.by_layer().values():
            for name, gate in layer.items():
                gates.setdefault(name, []).append(gate)
        return {name: sum(values) / len(values) for name, values in gates.items()}

    def by_step(self, steps: int) -> GateMap:
        """Return the means over the calls of each step, by adapter, layer and step.

        Args:
            steps: Denoising steps that were recorded; each has the same number of calls.
        """
        layers = tuple(layer for layer, calls in self.calls.items() if calls)
        rows: dict[str, list[list[float] | None]] = {}
        for number, layer in enumerate(layers):
            calls = torch.stack(self.calls[layer])
            if len(calls) % steps:
                raise ValueError(f"{len(calls)} calls of {layer} do not make {steps} steps.")
            means = calls.unflatten(0, (steps, -1)).mean(1).T.tolist()
            for name, values in zip(self.names[layer], means, strict=True):
                rows.setdefault(name, [None] * len(layers))[number] = values
        return GateMap(layers, steps, rows)


@contextmanager
def record_gates(module: nn.Module) -> Iterator[GateRecords]:
    """Record the gates of all attached layers for the length of a ``with`` block.

    The layers' outputs are the same to the bit as without. Layers without a gate record 1 for each
    adapter, and an adapter of strength 0 records 0.
    """
    records = GateRecords()
    layers = attached_layers(module)
    for name, layer in layers.items():
        records.names[name] = layer.names
        records.calls[name] = []
        layer._recorder = records.calls[name].append
    try:
        yield records
    finally:
        for layer in layers.values():
            layer._recorder = None
