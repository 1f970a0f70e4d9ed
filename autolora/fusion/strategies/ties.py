"""TIES: trim, elect signs, merge."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autolora.fusion.packed import Factors
from autolora.fusion.strategies.base import Strategy, register
from autolora.fusion.strategies.deltas import as_factors, dense

DENSITY = 0.2


@register
class Ties(Strategy):
    """TIES-Merging (Yadav et al., 2023, arXiv 2306.01708).

    Of every change ``s_i dW_i`` the 20 % largest entries are kept; at each entry the sign with the
    larger total wins; what remains is the mean of the kept entries of that sign (the paper's scale
    lambda is 1), so that adapters that do not meet act in full.
    """

    name = "ties"
    summary = "largest entries only, one sign per entry (TIES)"
    shapes = True

    def shape(
        self,
        layer: str,
        names: Sequence[str],
        factors: Sequence[Factors],
        strengths: Sequence[float],
    ) -> tuple[list[Factors], list[float]]:
        """Replace the adapters by their merged change."""
        if not factors:
            return [], []
        deltas = torch.stack([dense(f, s) for f, s in zip(factors, strengths, strict=True)])
        return [as_factors(ties(deltas))], [1.0]


def ties(deltas: Tensor, density: float = DENSITY) -> Tensor:
    """Merge changes ``[N, out, in]`` to one ``[out, in]``."""
    kept = max(1, round(density * deltas[0].numel()))
    sizes = deltas.abs().flatten(1)
    least = sizes.kthvalue(sizes.shape[1] - kept + 1, dim=1).values
    trimmed = deltas * (deltas.abs() >= least[:, None, None])
    sign = trimmed.sum(0).sign()
    agreeing = trimmed * (trimmed.sign() == sign)
    count = (agreeing != 0).sum(0).clamp_min(1)
    return agreeing.sum(0) / count
