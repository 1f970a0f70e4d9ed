"""The layers of SDXL: DiffSynth's ``SDXLUNet2DConditionModel``, whose names are diffusers'.

``original`` is Stability's checkpoint (sgm), which kohya's trainer names layers after.
"""

from __future__ import annotations

from autolora.families.layers import CANONICAL, LayerTable, Variant
from autolora.families.telling import Telling
from autolora.families.text import CLIP_L_AND_G
from autolora.families.unet import Shape, unet_rows


def _blocks() -> dict[str, int]:
    """Transformer blocks of every stage."""
    counts = {"mid_block.attentions.0": 10}
    for stage, count in ((1, 2), (2, 10)):
        counts |= {f"down_blocks.{stage}.attentions.{n}": count for n in range(2)}
        counts |= {f"up_blocks.{2 - stage}.attentions.{n}": count for n in range(3)}
    return {f"{path}.transformer_blocks": count for path, count in counts.items()}


LAYERS = LayerTable(
    tuple(unet_rows(Shape((False, True, True), conditioned=True))),
    ("original", CANONICAL),
    (
        Variant(
            "SDXL",
            {
                "c0": 320,
                "c1": 640,
                "c2": 1280,
                "emb": 1280,
                "cross": 2048,
                "sizes": 2816,
                "latent": 4,
                "latent_out": 4,
            },
            _blocks(),
        ),
    ),
    native="original",
    text_encoders=CLIP_L_AND_G,
    adjustable=frozenset({"latent"}),
    unet=True,
)
"""SDXL and every model made from it: Pony, Illustrious, NoobAI, Animagine."""

TELLING = Telling(
    "SDXL", (r"sdxl", r"stable[-_. ]diffusion[-_. ]xl", r"\b(pony|illustrious|noobai|animagine)")
)
