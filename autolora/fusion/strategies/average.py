"""The mean of all adapters."""

from __future__ import annotations

from collections.abc import Sequence

from autolora.fusion.packed import Factors
from autolora.fusion.strategies.base import Strategy, register


@register
class Average(Strategy):
    """``y + (1 / N) sum_i s_i B_i A_i x``, N all adapters that act somewhere.

    Weight averaging as in model soups (Wortsman et al., 2022, arXiv 2203.05482), of the changes.
    """

    name = "average"
    summary = "the mean of all adapters"
    shapes = True

    def __init__(self) -> None:
        self._count = 1

    def begin(self, names: Sequence[str]) -> None:
        """Count the adapters."""
        self._count = max(1, len(names))

    def shape(
        self,
        layer: str,
        names: Sequence[str],
        factors: Sequence[Factors],
        strengths: Sequence[float],
    ) -> tuple[list[Factors], list[float]]:
        """Divide the strengths by the number of adapters."""
        return list(factors), [strength / self._count for strength in strengths]
