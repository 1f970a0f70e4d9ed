"""The tiny FLUX: DiffSynth's own FLUX blocks at small width, and a small autoencoder.

Module names, forward pass (DiffSynth's ``model_fn_flux_image``) and layer layout are those of
FLUX.1; only the sizes differ. The autoencoder scales by 8, has 16 channels and the call signatures
of DiffSynth's; most of its work happens at a quarter of the picture's side, with pixels folded into
channels, which makes it usable on a CPU. Importing this module imports DiffSynth.

Shape legend: B batch, H W picture sides in pixels (multiples of 8).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autolora.families.flux1.model import SizedFluxDiT
from autolora.families.flux1.sizes import FluxSizes


@dataclass(frozen=True)
class TinyFluxConfig:
    """Sizes of the tiny FLUX transformer and of the text it reads.

    Raises:
        ValueError: If the sizes do not fit together.
    """

    width: int = 192  # channels of a token
    heads: int = 3
    rope_axes: tuple[int, int, int] = (16, 24, 24)  # channels per head for index, row and column
    double_blocks: int = 3
    single_blocks: int = 4
    text_dim: int = 384  # channels of MiniLM's token states and of its pooled vector
    text_length: int = 16  # tokens that a prompt is padded to (zeros, after the mask)
    latent_channels: int = 16
    size: int = 128  # side of the pictures it was trained on, in pixels

    def __post_init__(self) -> None:
        if self.width % self.heads or sum(self.rope_axes) != self.width // self.heads:
            raise ValueError(
                f"rope_axes {self.rope_axes} must add up to width/heads = {self.width}/{self.heads}"
            )


class TinyFluxDiT(SizedFluxDiT):
    """FLUX at the sizes of a :class:`TinyFluxConfig`; its guidance is classifier-free."""

    def __init__(self, config: TinyFluxConfig) -> None:
        patch = config.latent_channels * 4
        sizes = FluxSizes(
            width=config.width,
            head_dim=config.width // config.heads,
            double_blocks=config.double_blocks,
            single_blocks=config.single_blocks,
            patch=patch,
            text_dim=config.text_dim,
            pooled_dim=config.text_dim,
            time_dim=256,
            guidance=False,
            taken=patch,
        )
        super().__init__(sizes, config.rope_axes)
        self.config = config

    def init_weights(self) -> None:
        """Sets weights for training from scratch: modulations and the output start at zero.

        Every block is then the identity at the start (adaLN-zero, DiT, arXiv 2212.09748).
        """
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            nn.init.zeros_(module.bias)
            # Modulations are the layers called "linear", in blocks and before the output.
            if name.endswith(".linear") or name == "final_proj_out":
                nn.init.zeros_(module.weight)
            else:
                nn.init.xavier_uniform_(module.weight)


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
