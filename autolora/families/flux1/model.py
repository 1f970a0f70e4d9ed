"""FLUX.1's transformer at any size. Importing this module imports DiffSynth."""

from __future__ import annotations

from collections.abc import Sequence

from diffsynth.models.flux_dit import (
    AdaLayerNormContinuous,
    FluxDiT,
    FluxJointTransformerBlock,
    FluxSingleTransformerBlock,
    RoPEEmbedding,
)
from diffsynth.models.general_modules import TimestepEmbeddings
from torch import nn

from autolora.families.flux1.sizes import FluxSizes

ROPE_THETA = 10_000


class SizedFluxDiT(FluxDiT):
    """DiffSynth's FLUX transformer at any size.

    Its constructor knows one size only, so the modules are built here; patchify, position ids and
    masks are inherited.

    Args:
        sizes: The sizes.
        rope_axes: Channels per head for index, row and column; None is FLUX.1's proportion.
    """

    def __init__(self, sizes: FluxSizes, rope_axes: Sequence[int] | None = None) -> None:
        nn.Module.__init__(self)
        width = sizes.width
        self.sizes = sizes
        self.input_dim = sizes.taken
        axes = list(rope_axes or sizes.rope_axes)
        self.pos_embedder = RoPEEmbedding(width, ROPE_THETA, axes)
        self.time_embedder = TimestepEmbeddings(sizes.time_dim, width)
        self.guidance_embedder = (
            TimestepEmbeddings(sizes.time_dim, width) if sizes.guidance else None
        )
        self.pooled_text_embedder = nn.Sequential(
            nn.Linear(sizes.pooled_dim, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.context_embedder = nn.Linear(sizes.text_dim, width)
        self.x_embedder = nn.Linear(sizes.taken, width)
        self.blocks = nn.ModuleList(
            FluxJointTransformerBlock(width, sizes.heads) for _ in range(sizes.double_blocks)
        )
        self.single_blocks = nn.ModuleList(
            FluxSingleTransformerBlock(width, sizes.heads) for _ in range(sizes.single_blocks)
        )
        self.final_norm_out = AdaLayerNormContinuous(width)
        self.final_proj_out = nn.Linear(width, sizes.patch)
