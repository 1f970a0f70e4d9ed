"""The tiny autoencoder: 8x down, 16 channels, with the call signatures of DiffSynth's FLUX VAE.

Most of the work happens at a quarter of the picture's side (pixels are folded into channels
first), which is what makes it usable on a CPU.

Shape legend: B batch, H W picture sides in pixels (multiples of 8).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

LATENT_CHANNELS = 16
DOWN = 8


class ResidualBlock(nn.Module):
    """Norm, SiLU and a 3x3 convolution, twice, around an identity path."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, C, h, w] to the same shape."""
        y: Tensor = self.body(x)
        return x + y


class TinyEncoder(nn.Module):
    """Pictures [B, 3, H, W] in [-1, 1] to normalized latents [B, 16, H/8, W/8]."""

    mean: Tensor
    std: Tensor

    def __init__(self, wide: int = 64, deep: int = 96) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.PixelUnshuffle(4),
            nn.Conv2d(48, wide, 3, padding=1),
            ResidualBlock(wide),
            ResidualBlock(wide),
            nn.Conv2d(wide, deep, 4, stride=2, padding=1),
            ResidualBlock(deep),
            ResidualBlock(deep),
            nn.GroupNorm(8, deep),
            nn.SiLU(),
            nn.Conv2d(deep, LATENT_CHANNELS, 3, padding=1),
        )
        # Per-channel statistics measured after training, so that latents have unit variance.
        self.register_buffer("mean", torch.zeros(LATENT_CHANNELS))
        self.register_buffer("std", torch.ones(LATENT_CHANNELS))

    def raw(self, image: Tensor) -> Tensor:
        """Latents before normalization, [B, 16, H/8, W/8]."""
        z: Tensor = self.body(image)
        return z

    def forward(
        self, image: Tensor, tiled: bool = False, tile_size: int = 64, tile_stride: int = 32
    ) -> Tensor:
        """Encodes pictures; tiling is accepted for DiffSynth's sake and not needed at this size."""
        z = self.raw(image)
        mean, std = (s.to(z)[None, :, None, None] for s in (self.mean, self.std))
        return (z - mean) / std


class TinyDecoder(nn.Module):
    """Normalized latents [B, 16, H/8, W/8] to pictures [B, 3, H, W], about [-1, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, wide: int = 64, deep: int = 96, fine: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(LATENT_CHANNELS, deep, 3, padding=1),
            ResidualBlock(deep),
            ResidualBlock(deep),
            ResidualBlock(deep),
            nn.Conv2d(deep, wide * 4, 3, padding=1),
            nn.PixelShuffle(2),
            ResidualBlock(wide),
            ResidualBlock(wide),
            nn.GroupNorm(8, wide),
            nn.SiLU(),
            nn.Conv2d(wide, fine * 16, 3, padding=1),
            nn.PixelShuffle(4),
            nn.SiLU(),
            nn.Conv2d(fine, 3, 3, padding=1),
        )
        self.register_buffer("mean", torch.zeros(LATENT_CHANNELS))
        self.register_buffer("std", torch.ones(LATENT_CHANNELS))

    def raw(self, z: Tensor) -> Tensor:
        """Decodes latents that were not normalized."""
        picture: Tensor = self.body(z)
        return picture

    def forward(
        self,
        latents: Tensor,
        device: torch.device | str | None = None,
        tiled: bool = False,
        tile_size: int = 64,
        tile_stride: int = 32,
    ) -> Tensor:
        """Decodes normalized latents; the other arguments are DiffSynth's and have no effect."""
        mean, std = (s.to(latents)[None, :, None, None] for s in (self.mean, self.std))
        return self.raw(latents * std + mean)
