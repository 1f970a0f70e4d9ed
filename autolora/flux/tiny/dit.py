"""The tiny FLUX transformer: DiffSynth's own FLUX blocks at small width.

Module names, forward pass (DiffSynth's ``model_fn_flux_image``) and layer layout are those of
FLUX.1; only the sizes differ. Importing this module imports DiffSynth, which takes seconds.
"""

from __future__ import annotations

from diffsynth.models.flux_dit import (
    AdaLayerNormContinuous,
    FluxDiT,
    FluxJointTransformerBlock,
    FluxSingleTransformerBlock,
    RoPEEmbedding,
)
from diffsynth.models.general_modules import TimestepEmbeddings
from torch import nn

from autolora.flux.tiny.config import TinyFluxConfig


class TinyFluxDiT(FluxDiT):
    """FLUX at the sizes of a :class:`TinyFluxConfig`.

    FLUX.1's constructor knows one size only, so the modules are built here; patchify, position
    ids and masks are inherited.
    """

    def __init__(self, config: TinyFluxConfig) -> None:
        nn.Module.__init__(self)
        width, heads = config.width, config.heads
        patch = config.latent_channels * 4
        self.config = config
        self.input_dim = patch
        self.pos_embedder = RoPEEmbedding(width, 10000, list(config.rope_axes))
        self.time_embedder = TimestepEmbeddings(256, width)
        self.guidance_embedder = None  # guidance is classifier-free, not distilled
        self.pooled_text_embedder = nn.Sequential(
            nn.Linear(config.text_dim, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.context_embedder = nn.Linear(config.text_dim, width)
        self.x_embedder = nn.Linear(patch, width)
        self.blocks = nn.ModuleList(
            FluxJointTransformerBlock(width, heads) for _ in range(config.double_blocks)
        )
        self.single_blocks = nn.ModuleList(
            FluxSingleTransformerBlock(width, heads) for _ in range(config.single_blocks)
        )
        self.final_norm_out = AdaLayerNormContinuous(width)
        self.final_proj_out = nn.Linear(width, patch)

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
