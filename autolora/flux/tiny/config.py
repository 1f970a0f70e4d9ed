"""Sizes of the tiny FLUX."""

from __future__ import annotations

from dataclasses import dataclass


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
