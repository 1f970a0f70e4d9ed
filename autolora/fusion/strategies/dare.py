"""DARE: drop entries at random and rescale."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from autolora.fusion.packed import Factors
from autolora.fusion.strategies.base import Strategy, register
from autolora.fusion.strategies.deltas import as_factors, dense

DROP = 0.5


@register
class Dare(Strategy):
    """DARE (Yu et al., 2024, arXiv 2311.03099): ``sum_i s_i (M_i * dW_i) / (1 - p)``.

    Each entry of a change is dropped with probability ``p`` and the rest rescaled, so that the
    expectation stays and changes meet in fewer entries. The draw depends on the adapter's name and
    the layer alone: pictures can be repeated, and another adapter does not change it.
    """

    name = "dare"
    summary = "drops half of the entries at random and rescales the rest (DARE)"
    shapes = True

    def shape(
        self,
        layer: str,
        names: Sequence[str],
        factors: Sequence[Factors],
        strengths: Sequence[float],
    ) -> tuple[list[Factors], list[float]]:
        """Replace the adapters by the sum of their thinned changes."""
        if not factors:
            return [], []
        parts = zip(names, factors, strengths, strict=True)
        thinned = [dense(f, s) * kept(n, layer, f) / (1 - DROP) for n, f, s in parts]
        return [as_factors(torch.stack(thinned).sum(0))], [1.0]


def kept(name: str, layer: str, pair: Factors) -> Tensor:
    """Return which entries of a change stay, 1 or 0 ``[out, in]``."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}\n{layer}".encode()))
    draw = torch.rand(pair[1].shape[0], pair[0].shape[1], generator=generator)
    return (draw >= DROP).to(pair[0].device, torch.float32)
