"""The layers of FLUX.2: DiffSynth's ``Flux2DiT``, whose names are diffusers'.

``original`` is the reference code of Black Forest Labs: q, k and v of a stream are one module, and
the final modulation has its shift rows first. No layer has a bias. ``linear_in`` holds gate and
value of SwiGLU; modulation is shared by all blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

from autolora.families.layers import CANONICAL, LayerRow, LayerTable, Variant, layer
from autolora.families.telling import Telling

_MODULATION = "shift:d scale:d gate:d"
_MODULATION_2 = "shift_msa:d scale_msa:d gate_msa:d shift_mlp:d scale_mlp:d gate_mlp:d"


def _double() -> Iterator[LayerRow]:
    here, bfl = "transformer_blocks.{i}.", "double_blocks.{i}."
    for names, out, stream, suffix in (
        (("to_q", "to_k", "to_v"), "to_out.0", "img", ""),
        (("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "txt", "_context"),
    ):
        for n, name in enumerate(names):
            yield layer(f"{here}attn.{name}", "d", "d", original=f"{bfl}{stream}_attn.qkv@{n}")
        yield layer(f"{here}attn.{out}", "d", "d", original=f"{bfl}{stream}_attn.proj")
        yield layer(f"{here}ff{suffix}.linear_in", "6d", "d", original=f"{bfl}{stream}_mlp.0")
        yield layer(f"{here}ff{suffix}.linear_out", "d", "3d", original=f"{bfl}{stream}_mlp.2")


def _single() -> Iterator[LayerRow]:
    here = "single_transformer_blocks.{i}.attn."
    fused = "q:d k:d v:d mlp:6d"
    yield layer(f"{here}to_qkv_mlp_proj", fused, "d", original="single_blocks.{i}.linear1")
    yield layer(f"{here}to_out", "d", "4d", original="single_blocks.{i}.linear2")


def _outer() -> Iterator[LayerRow]:
    embed = "time_guidance_embed."
    for name, out, inner, original in (
        ("x_embedder", "d", "patch", "img_in"),
        ("context_embedder", "d", "text", "txt_in"),
        (f"{embed}timestep_embedder.linear_1", "d", "time", "time_in.in_layer"),
        (f"{embed}timestep_embedder.linear_2", "d", "d", "time_in.out_layer"),
        (f"{embed}guidance_embedder.linear_1", "d", "time", "guidance_in.in_layer"),
        (f"{embed}guidance_embedder.linear_2", "d", "d", "guidance_in.out_layer"),
        *(
            (f"{name}.linear", out, "d", f"{name}.lin")
            for name, out in (
                ("double_stream_modulation_img", _MODULATION_2),
                ("double_stream_modulation_txt", _MODULATION_2),
                ("single_stream_modulation", _MODULATION),
            )
        ),
        ("proj_out", "patch_out", "d", "final_layer.linear"),
        ("norm_out.linear", "scale:d shift:d", "d", "final_layer.adaLN_modulation.1=shift,scale"),
    ):
        yield layer(name, out, inner, original=original)


def _norms() -> Iterator[LayerRow]:
    here, bfl = "transformer_blocks.{i}.attn.", "double_blocks.{i}."
    for stream, added in (("img", ""), ("txt", "added_")):
        for letter, word in (("q", "query"), ("k", "key")):
            original = f"{bfl}{stream}_attn.norm.{word}_norm"
            yield layer(f"{here}norm_{added}{letter}", "head", "", original=original)
    for letter, word in (("q", "query"), ("k", "key")):
        yield layer(
            f"single_transformer_blocks.{{i}}.attn.norm_{letter}",
            "head",
            "",
            original=f"single_blocks.{{i}}.norm.{word}_norm",
        )


def _variant(name: str, width: int, text: int, double: int, single: int) -> Variant:
    widths = {"d": width, "text": text, "patch": 128, "patch_out": 128, "time": 256, "head": 128}
    blocks = {"transformer_blocks": double, "single_transformer_blocks": single}
    without = () if name == "dev" else ("time_guidance_embed.guidance_embedder",)
    return Variant(name, widths, blocks, without)


LAYERS = LayerTable(
    (*_double(), *_single(), *_outer(), *_norms()),
    ("original", CANONICAL),
    (
        _variant("klein 4B", 3072, 7680, 5, 20),
        _variant("klein 9B", 4096, 12288, 8, 24),
        _variant("dev", 6144, 15360, 8, 48),
    ),
    native="original",
)
"""FLUX.2 dev and both klein models."""

TELLING = Telling("FLUX.2", (r"flux[-_. ]?2(?!\d)", r"klein"))
