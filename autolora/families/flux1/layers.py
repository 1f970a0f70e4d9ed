"""The layers of FLUX.1: DiffSynth's ``FluxDiT``, with the names of everybody who trains for it.

Stream ``a`` is the image, ``b`` the text. ``original`` is the reference code of Black Forest Labs,
whose fused q/k/v are the canonical layers; ``diffusers`` splits them and keeps the final modulation
scale first; ``xlabs`` are x-flux' attention processors (1 = image, 2 = text), which leave the MLP
rows of single blocks alone; ``onetrainer`` numbers the parts of fused layers.
"""

from __future__ import annotations

from collections.abc import Iterator

from autolora.families.layers import CANONICAL, LayerRow, LayerTable, Variant, layer
from autolora.families.telling import Telling
from autolora.families.text import CLIP_AND_T5

_QKV = "q:d k:d v:d"
_MODULATION = "shift:d scale:d gate:d"
_MODULATION_2 = "shift_msa:d scale_msa:d gate_msa:d shift_mlp:d scale_mlp:d gate_mlp:d"


def _double(stream: str) -> Iterator[LayerRow]:
    image = stream == "a"
    here, bfl = "blocks.{i}.", "double_blocks.{i}." + ("img" if image else "txt")
    there = "transformer_blocks.{i}."
    names = ("to_q", "to_k", "to_v") if image else ("add_q_proj", "add_k_proj", "add_v_proj")
    suffix, number = ("", 1) if image else ("_context", 2)
    yield layer(
        f"{here}attn.{stream}_to_qkv",
        _QKV,
        "d",
        original=f"{bfl}_attn.qkv",
        diffusers=" ".join(f"{there}attn.{n}={s}" for n, s in zip(names, "qkv", strict=True)),
        xlabs=f"double_blocks.{{i}}.processor.qkv_lora{number}",
        onetrainer=" ".join(f"{bfl}_attn.qkv.{n}={s}" for n, s in enumerate("qkv")),
    )
    yield layer(
        f"{here}attn.{stream}_to_out",
        "d",
        "d",
        original=f"{bfl}_attn.proj",
        diffusers=f"{there}attn." + ("to_out.0" if image else "to_add_out"),
        xlabs=f"double_blocks.{{i}}.processor.proj_lora{number}",
        onetrainer=f"{bfl}_attn.proj",
    )
    for name, out, inner, original, diffusers in (
        (f"ff_{stream}.0", "4d", "d", "_mlp.0", f"ff{suffix}.net.0.proj"),
        (f"ff_{stream}.2", "d", "4d", "_mlp.2", f"ff{suffix}.net.2"),
        (f"norm1_{stream}.linear", _MODULATION_2, "d", "_mod.lin", f"norm1{suffix}.linear"),
    ):
        yield layer(
            here + name,
            out,
            inner,
            original=bfl + original,
            diffusers=there + diffusers,
            onetrainer=bfl + original,
        )


def _single() -> Iterator[LayerRow]:
    here, there = "single_blocks.{i}.", "single_transformer_blocks.{i}."
    split = (("attn.to_q", "q"), ("attn.to_k", "k"), ("attn.to_v", "v"), ("proj_mlp", "mlp"))
    yield layer(
        here + "to_qkv_mlp",
        _QKV + " mlp:4d",
        "d",
        original=here + "linear1",
        diffusers=" ".join(f"{there}{name}={part}" for name, part in split),
        xlabs=here + "processor.qkv_lora=q,k,v",
        onetrainer=" ".join(f"{here}linear1.{n}={part}" for n, (_, part) in enumerate(split)),
    )
    yield layer(
        here + "proj_out",
        "d",
        "5d",
        original=here + "linear2",
        diffusers=there + "proj_out",
        xlabs=here + "processor.proj_lora",
        onetrainer=here + "linear2",
    )
    yield layer(
        here + "norm.linear",
        _MODULATION,
        "d",
        original=here + "modulation.lin",
        diffusers=there + "norm.linear",
        onetrainer=here + "modulation.lin",
    )


_GUIDANCE = "guidance_embedder"


def _outer() -> Iterator[LayerRow]:
    for name, out, inner, original, diffusers in (
        ("x_embedder", "d", "patch", "img_in", "x_embedder"),
        ("context_embedder", "d", "text", "txt_in", "context_embedder"),
        *_embedder("time_embedder.timestep_embedder", "time", "time_in", "timestep_embedder"),
        *_embedder(
            "guidance_embedder.timestep_embedder", "time", "guidance_in", "guidance_embedder"
        ),
        *_embedder("pooled_text_embedder", "pooled", "vector_in", "text_embedder"),
        ("final_proj_out", "patch_out", "d", "final_layer.linear", "proj_out"),
    ):
        yield layer(name, out, inner, original=original, diffusers=diffusers, onetrainer=original)
    final = "final_layer.adaLN_modulation.1"
    yield layer(
        "final_norm_out.linear",
        "shift:d scale:d",
        "d",
        original=final,
        diffusers="norm_out.linear=scale,shift",
        onetrainer=final,
    )


def _embedder(here: str, inner: str, original: str, there: str) -> Iterator[tuple[str, ...]]:
    there = f"time_text_embed.{there}.linear"
    yield f"{here}.0", "d", inner, f"{original}.in_layer", f"{there}_1"
    yield f"{here}.2", "d", "d", f"{original}.out_layer", f"{there}_2"


def _norms() -> Iterator[LayerRow]:
    for stream, bfl, added in (("a", "img", ""), ("b", "txt", "added_")):
        for letter, word in (("q", "query"), ("k", "key")):
            yield layer(
                f"blocks.{{i}}.attn.norm_{letter}_{stream}",
                "head",
                "",
                original=f"double_blocks.{{i}}.{bfl}_attn.norm.{word}_norm",
                diffusers=f"transformer_blocks.{{i}}.attn.norm_{added}{letter}",
            )
    for letter, word in (("q", "query"), ("k", "key")):
        yield layer(
            f"single_blocks.{{i}}.norm_{letter}_a",
            "head",
            "",
            original=f"single_blocks.{{i}}.norm.{word}_norm",
            diffusers=f"single_transformer_blocks.{{i}}.attn.norm_{letter}",
        )


ROWS = (*_double("a"), *_double("b"), *_single(), *_outer(), *_norms())
DIALECTS = ("original", "diffusers", "xlabs", "onetrainer", CANONICAL)

LAYERS = LayerTable(
    ROWS,
    DIALECTS,
    (
        Variant(
            "dev",
            {
                "d": 3072,
                "patch": 64,
                "patch_out": 64,
                "text": 4096,
                "pooled": 768,
                "time": 256,
                "head": 128,
            },
            {"blocks": 19, "single_blocks": 38},
        ),
    ),
    native="original",
    text_encoders=CLIP_AND_T5,
    adjustable=frozenset({"patch"}),
    refused={
        ("patch", 128): (
            "an adapter for FLUX.1 Control (Canny or Depth), not for FLUX.1 itself",
            "it needs a Control pipeline, whose input layer is wider; use a plain LoRA instead",
        )
    },
)
"""FLUX.1 dev, schnell, Krea, Kontext and every model made from them: all of one size."""

TELLING = Telling(
    "FLUX.1", (r"flux[-_. ]?1(?!\d)", r"flux[-_. ]?(dev|schnell|krea|kontext)", r"flux$")
)
