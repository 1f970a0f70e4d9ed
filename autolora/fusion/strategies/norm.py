"""Adapters of equal size in every layer."""

from __future__ import annotations

from collections.abc import Sequence

from autolora.fusion.packed import Factors
from autolora.fusion.strategies.base import Strategy, register
from autolora.fusion.strategies.deltas import delta_norm


@register
class Norm(Strategy):
    """``y + sum_i s_i (m / |dW_i|) dW_i x`` with ``m`` the mean of the norms in that layer.

    Adapters in the wild differ in size by an order of magnitude; equal Frobenius norms keep the
    loudest from drowning the others. The sum of the norms stays what it was.
    """

    name = "norm"
    summary = "adapters made equally large in every layer"
    shapes = True

    def shape(
        self,
        layer: str,
        names: Sequence[str],
        factors: Sequence[Factors],
        strengths: Sequence[float],
    ) -> tuple[list[Factors], list[float]]:
        """Scale the strengths."""
        norms = [delta_norm(pair) for pair in factors]
        mean = sum(norms) / max(1, len(norms))
        scaled = [s * mean / n if n > 0 else s for s, n in zip(strengths, norms, strict=True)]
        return list(factors), scaled
