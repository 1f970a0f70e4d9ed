"""Ways to let several adapters act in one layer.

A strategy is one small class that turns a base layer and its adapters into a `FusedLinear`, or says
that they are merged into the weight. Adding one means writing the class and decorating it with
`register`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from autolora.errors import FusionError
from autolora.fusion.conv import fused_type
from autolora.fusion.gate import Gate, GateBank
from autolora.fusion.linear import FusedLinear
from autolora.fusion.packed import Factors


class Strategy:
    """How the adapters of one layer are combined.

    A subclass gives `name` and `summary`, and overrides `gate` or `fuse`.
    """

    name: ClassVar[str]
    """The name that users choose it by."""
    summary: ClassVar[str]
    """One line for lists of choices."""
    uses_gates: ClassVar[bool] = False
    """Whether it looks at the gates."""
    merges: ClassVar[bool] = False
    """Whether weights are changed (`autolora.fusion.merge`) and no layer is wrapped."""

    def gate(self, layer: str, gates: GateBank | None) -> Gate | None:
        """Return the gate that a layer's adapters go through; None is the plain sum."""
        return None

    def fuse(
        self,
        layer: str,
        base: nn.Module,
        names: Sequence[str],
        factors: Sequence[Factors],
        strengths: Sequence[float],
        gates: GateBank | None,
    ) -> FusedLinear:
        """Put the adapters around one layer.

        Args:
            layer: Canonical name of the layer.
            base: The layer itself; stays unchanged.
            names: The adapters that have factors for this layer.
            factors: ``(A [r, in], B [out, r])`` of each.
            strengths: Of each.
            gates: The model's gates, where there are any.

        Raises:
            FusionError: A shape does not fit.
        """
        return fused_type(base)(base, factors, self.gate(layer, gates), strengths, names)

    def updates(self, layer: str, fused: FusedLinear, gates: GateBank | None) -> bool:
        """Tell whether other adapters in this very layer make what `fuse` would make anew."""
        return type(fused) is fused_type(fused.base) and fused.gate is self.gate(layer, gates)


_STRATEGIES: dict[str, type[Strategy]] = {}


def register(strategy: type[Strategy]) -> type[Strategy]:
    """Make a strategy available by its name."""
    _STRATEGIES[strategy.name] = strategy
    return strategy


def strategy_names() -> tuple[str, ...]:
    """Return the names of all strategies."""
    return tuple(_STRATEGIES)


def get_strategy(name: str) -> Strategy:
    """Return the strategy of that name.

    Raises:
        FusionError: There is none; the message lists the choices.
    """
    if name not in _STRATEGIES:
        raise FusionError(f"unknown strategy {name!r}; choose one of {', '.join(_STRATEGIES)}")
    return _STRATEGIES[name]()


@register
class Sum(Strategy):
    """``y + sum_i s_i B_i A_i x``, what most tools do."""

    name = "sum"
    summary = "adds all adapters at their strengths"


@register
class Gated(Strategy):
    """AutoLoRA's learned gates; a layer without one is the plain sum."""

    name = "gated"
    summary = "learned gates weigh the adapters per channel and token"
    uses_gates = True

    def gate(self, layer: str, gates: GateBank | None) -> Gate | None:
        """Return the layer's gate, where there is one."""
        return None if gates is None else gates.get(layer)


@register
class Merged(Strategy):
    """``W + sum_i s_i dW_i``, the weights themselves; backed up and restored to the bit.

    No cost per step and every kind of adapter exactly, at the price of a backup of the weights, a
    slower switch, and the rounding of a weight that is stored in few bits.
    """

    name = "merged"
    summary = "adds all adapters to the weights until they are detached"
    merges = True
