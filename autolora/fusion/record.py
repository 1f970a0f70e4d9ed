"""How much each adapter spoke."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from autolora.fusion.attach import attached_layers


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
