"""Contrastive losses.

Shape legend: B texts, N LoRAs, D dimensions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def positive_mask(text_ids: Tensor, lora_ids: Tensor) -> Tensor:
    """Which pairs belong together.

    Args:
        text_ids: ``[B]``, the LoRA (or concept) that a text describes.
        lora_ids: ``[N]``.

    Returns:
        ``[B, N]``, true where the ids agree.
    """
    return text_ids[:, None] == lora_ids[None, :]


def multi_positive_info_nce(logits: Tensor, positives: Tensor, ignored: Tensor) -> Tensor:
    """One direction of InfoNCE with several positives per row, as supervised contrastive learning.

    ``-log(p_i)`` averaged over the positives i of a row (Khosla et al. 2020, arXiv 2004.11362,
    eq. 2), where the softmax runs over that positive and the row's negatives only: other
    positives do not compete with it.

    Args:
        logits: ``[B, N]``.
        positives: ``[B, N]``, true for pairs that belong together.
        ignored: ``[B, N]``, true for pairs that are neither (a false negative, such as another
            LoRA of the same concept).

    Returns:
        Loss ``[B]`` in nats, zero in rows without a positive.
    """
    negatives = ~positives & ~ignored
    floor = torch.finfo(logits.dtype).min
    background = torch.logsumexp(logits.masked_fill(~negatives, floor), dim=1, keepdim=True)
    # With no negative in a row the background is the floor and the loss is zero.
    per_pair = F.softplus(background - logits)
    count = positives.sum(1)
    return (per_pair * positives).sum(1) / count.clamp_min(1)


class ContrastiveLoss(nn.Module):
    """Symmetric InfoNCE on cosines with a learnable temperature (CLIP, arXiv 2103.00020).

    Args:
        temperature: Initial temperature; the cosine is divided by it.
        lowest: Lowest temperature that training may reach.
    """

    def __init__(self, temperature: float = 0.07, lowest: float = 0.01) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))
        self.highest = math.log(1 / lowest)

    def forward(
        self,
        text: Tensor,
        lora: Tensor,
        text_ids: Tensor,
        lora_ids: Tensor,
        text_concepts: Tensor | None = None,
        lora_concepts: Tensor | None = None,
    ) -> Tensor:
        """Compare texts with LoRAs.

        Args:
            text: Unit vectors ``[B, D]``.
            lora: Unit vectors ``[N, D]``, each LoRA once.
            text_ids: ``[B]``, which LoRA a text describes.
            lora_ids: ``[N]``.
            text_concepts: ``[B]``, the concept of that LoRA; pairs of the same concept but not of
                the same LoRA are left out.
            lora_concepts: ``[N]``.

        Returns:
            The mean of both directions, a scalar in nats.
        """
        positives = positive_mask(text_ids, lora_ids)
        ignored = torch.zeros_like(positives)
        if text_concepts is not None and lora_concepts is not None:
            ignored = positive_mask(text_concepts, lora_concepts) & ~positives
        logits = text @ lora.T * self.log_scale.clamp(max=self.highest).exp()
        forward = multi_positive_info_nce(logits, positives, ignored)
        backward = multi_positive_info_nce(logits.T, positives.T, ignored.T)
        return (forward.mean() + backward.mean()) / 2
