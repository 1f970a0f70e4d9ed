"""Ways to let several adapters act in one linear layer.

A strategy is one small class that turns a base layer and its adapters into a `FusedLinear`. Adding
one means writing the class and decorating it with `register`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from autolora.errors import FusionError
from autolora.fusion.arithmetic import Factors
from autolora.fusion.bank import GateBank
from autolora.fusion.linear import FusedLinear


class Strategy(ABC):
    """How the adapters of one layer are combined."""

    name: ClassVar[str]
    """The name that users choose it by."""
    summary: ClassVar[str]
    """One line for lists of choices."""
    uses_gates: ClassVar[bool] = False
    """Whether `fuse` looks at the gates."""

    @abstractmethod
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

    def fuse(
        self,
        layer: str,
        base: nn.Module,
        names: Sequence[str],
        factors: Sequence[Factors],
        strengths: Sequence[float],
        gates: GateBank | None,
    ) -> FusedLinear:
        """Ignore the gates."""
        return FusedLinear(base, factors, strengths=strengths, names=names)


@register
class Gated(Strategy):
    """AutoLoRA's learned gates; a layer without one is the plain sum."""

    name = "gated"
    summary = "learned gates weigh the adapters per channel and token"
    uses_gates = True

    def fuse(
        self,
        layer: str,
        base: nn.Module,
        names: Sequence[str],
        factors: Sequence[Factors],
        strengths: Sequence[float],
        gates: GateBank | None,
    ) -> FusedLinear:
        """Use the layer's gate, where there is one."""
        gate = None if gates is None else gates.get(layer)
        return FusedLinear(base, factors, gate, strengths, names)
