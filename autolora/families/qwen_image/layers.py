"""The layers of Qwen-Image: DiffSynth's ``QwenImageDiT``, with one name for all programs."""

from __future__ import annotations

from collections.abc import Iterator

from autolora.families.layers import CANONICAL, LayerRow, LayerTable, Variant, layer
from autolora.families.telling import Telling

_MODULATION_2 = "shift_msa:d scale_msa:d gate_msa:d shift_mlp:d scale_mlp:d gate_mlp:d"


def _block() -> Iterator[LayerRow]:
    here = "transformer_blocks.{i}."
    for names, stream in (
        (("to_q", "to_k", "to_v", "to_out.0"), "img"),
        (("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"), "txt"),
    ):
        for name in names:
            yield layer(f"{here}attn.{name}", "d", "d")
        yield layer(f"{here}{stream}_mlp.net.0.proj", "4d", "d")
        yield layer(f"{here}{stream}_mlp.net.2", "d", "4d")
        yield layer(f"{here}{stream}_mod.1", _MODULATION_2, "d")
    for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        yield layer(f"{here}attn.{name}", "head", "")


def _outer() -> Iterator[LayerRow]:
    for name, out, inner in (
        ("img_in", "d", "patch"),
        ("txt_in", "d", "text"),
        ("time_text_embed.timestep_embedder.linear_1", "d", "time"),
        ("time_text_embed.timestep_embedder.linear_2", "d", "d"),
        ("proj_out", "patch_out", "d"),
        ("norm_out.linear", "scale:d shift:d", "d"),
        ("txt_norm", "text", ""),
    ):
        yield layer(name, out, inner)


LAYERS = LayerTable(
    (*_block(), *_outer()),
    (CANONICAL,),
    (
        Variant(
            "Qwen-Image",
            {"d": 3072, "text": 3584, "patch": 64, "patch_out": 64, "time": 256, "head": 128},
            {"transformer_blocks": 60},
        ),
    ),
)
"""Qwen-Image, 2512, Edit and Layered: one architecture."""

TELLING = Telling("Qwen-Image", (r"qwen[-_. ]?image", r"^qwen$"))
