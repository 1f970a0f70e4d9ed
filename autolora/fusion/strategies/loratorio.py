"""LoRAtorio: adapters are weighed where they depart from the base model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from autolora.fusion.strategies.base import Step, Strategy, register

PATCH = 2
TEMPERATURE = 0.1


@register
class Loratorio(Strategy):
    """LoRAtorio (arXiv 2508.11624), without its change of the unconditional prediction.

    With ``v_0`` the base model's prediction and ``v_i`` that of adapter ``i`` alone, each patch
    ``p`` of the latents is ``sum_i w_ip v_ip`` with ``w_p = softmin_i(cos(v_ip, v_0p) / tau)``: the
    adapter that departs most from the base has the most to say there. N + 1 passes per step.
    """

    name = "loratorio"
    summary = "per patch, whoever departs most from the base model (LoRAtorio)"
    by_step = True

    def predict(self, step: Step) -> Tensor:
        """Make a pass of the base model and one per adapter."""
        base = step.only(None)
        names = [name for name in step.names if step.strengths[name] != 0]
        if not names:
            return base
        return weigh(base, torch.stack([step.only(name) for name in names]))


def weigh(base: Tensor, predictions: Tensor) -> Tensor:
    """Join predictions ``[N, B, C, h, w]`` by their patches' likeness to the base ``[B, C, h, w]``.

    Returns:
        ``[B, C, h, w]``.
    """
    dot, own, other = (
        _patch_sums(value) for value in (predictions * base, predictions**2, base[None] ** 2)
    )
    cosine = dot / (own * other).sqrt().clamp_min(1e-12)
    weights = F.softmax(-cosine / TEMPERATURE, dim=0)
    weights = weights.repeat_interleave(PATCH, -2).repeat_interleave(PATCH, -1)
    height, width = base.shape[-2:]
    return (weights[..., :height, :width] * predictions).sum(0).to(base.dtype)


def _patch_sums(value: Tensor) -> Tensor:
    """Sum over channels and patches: ``[N, B, C, h, w]`` to ``[N, B, 1, h / 2, w / 2]``."""
    summed = value.float().sum(2)
    pooled = F.avg_pool2d(summed, PATCH, ceil_mode=True, count_include_pad=False)
    return pooled[:, :, None]
