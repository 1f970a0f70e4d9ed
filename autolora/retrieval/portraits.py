"""Portraits: what a LoRA does, as the change of the base model's first guess of the picture.

A portrait is made elsewhere, ``delta_x0 = -sigma * (v_lora - v_base)`` for a few fixed noises and
settings (noise level, neutral prompt); here it is a tensor. It is invariant to everything about
the LoRA's file. Its mean over noises is the direction; how strong it is, and how much the noises
agree, are features apart.

Shape legend: n LoRAs, S settings, K noises, C latent channels, h x w latent, g grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from autolora.errors import RetrievalError

_TINY = 1e-8


@dataclass(frozen=True)
class PortraitSpec:
    """What portraits an encoder takes.

    Attributes:
        settings: S, number of settings.
        channels: C, latent channels.
        grid: g, portraits are averaged down to ``g x g``; larger ones than that are blurred.
    """

    settings: int
    channels: int
    grid: int = 8

    @property
    def size(self) -> int:
        """Numbers of one setting's picture."""
        return self.channels * self.grid * self.grid

    def check(self, portraits: Tensor) -> None:
        """Make sure that portraits have this shape.

        Args:
            portraits: ``[n, S, K, C, h, w]``.

        Raises:
            RetrievalError: They have not.
        """
        good = portraits.ndim == 6 and portraits.shape[1] == self.settings
        if not good or portraits.shape[3] != self.channels or portraits.shape[2] < 1:
            raise RetrievalError(
                f"Portraits of shape {list(portraits.shape)} do not fit the retriever, which was "
                f"trained on [n, {self.settings}, noises, {self.channels}, h, w]; make them with "
                "the same settings."
            )


@dataclass
class PortraitTokens:
    """Portrait tokens of n LoRAs.

    Attributes:
        pictures: ``[n, S, C, g, g]``, mean over noises, each of unit norm.
        scalars: ``[n, S, 2]``: natural logarithm of the norm, and agreement of the noises (norm of
            the mean over mean of the norms, in [0, 1]).
    """

    pictures: Tensor
    scalars: Tensor

    def __len__(self) -> int:
        """Count the LoRAs."""
        return len(self.pictures)

    def __getitem__(self, rows: Tensor | slice) -> PortraitTokens:
        """Select some of the LoRAs."""
        return PortraitTokens(self.pictures[rows], self.scalars[rows])


def portrait_tokens(
    portraits: Tensor, spec: PortraitSpec, noises: Tensor | None = None
) -> PortraitTokens:
    """Make portrait tokens.

    Args:
        portraits: ``[n, S, K, C, h, w]``, or ``[S, K, C, h, w]`` of one LoRA.
        spec: Shape of the tokens.
        noises: Indices of the noises to use; all when None. Random subsets augment training.

    Returns:
        The tokens.

    Raises:
        RetrievalError: The portraits do not fit `spec`.
    """
    if portraits.ndim == 5:
        portraits = portraits[None]
    spec.check(portraits)
    if noises is not None:
        portraits = portraits[:, :, noises]
    portraits = portraits.float()
    mean = portraits.mean(2)  # [n, S, C, h, w]
    each = portraits.flatten(3).norm(dim=-1).mean(2)  # [n, S]
    norm = mean.flatten(2).norm(dim=-1)
    pictures = F.adaptive_avg_pool2d(mean.flatten(0, 1), spec.grid)
    pictures = F.normalize(pictures.flatten(1), dim=-1, eps=_TINY)
    pictures = pictures.view(*mean.shape[:3], spec.grid, spec.grid)
    scalars = torch.stack([norm.clamp_min(_TINY).log(), norm / each.clamp_min(_TINY)], -1)
    return PortraitTokens(pictures, scalars)
