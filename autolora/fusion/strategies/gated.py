"""AutoLoRA's published gates."""

from __future__ import annotations

from autolora.fusion.gate import Gate, GateBank
from autolora.fusion.strategies.base import Strategy, register


@register
class Gated(Strategy):
    """AutoLoRA's learned gates (arXiv 2508.02107); a layer without one is the plain sum."""

    name = "gated"
    summary = "learned gates weigh the adapters per channel and token"
    uses_gates = True

    def gate(self, layer: str, gates: GateBank | None) -> Gate | None:
        """Return the layer's gate, where there is one."""
        return None if gates is None else gates.get(layer)
