"""The layers of the tiny model: those of FLUX.1 at a small width."""

from __future__ import annotations

from autolora.families.flux1.layers import DIALECTS, ROWS
from autolora.families.layers import LayerTable, Variant
from autolora.families.telling import Telling
from autolora.families.text import CLIP_AND_T5

LAYERS = LayerTable(
    ROWS,
    DIALECTS,
    (
        Variant(
            "tiny",
            {"d": 192, "patch": 64, "patch_out": 64, "text": 384, "pooled": 384, "head": 64},
            {"blocks": 3, "single_blocks": 4},
        ),
    ),
    native="original",
    text_encoders=CLIP_AND_T5,
)

TELLING = Telling("the tiny model", ())
