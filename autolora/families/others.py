"""Base models that people have LoRAs for and that are not read here: enough of each to name it.

Those that share module names with a family have a table, so that shapes and block numbers tell
them apart; the rest have names of their own. Facts are from the models' published code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from autolora.families.flux1.layers import LAYERS as FLUX1
from autolora.families.layers import CANONICAL, LayerRow, LayerTable, Variant, layer
from autolora.families.telling import Other, Telling
from autolora.families.text import CLIP_L_ALONE
from autolora.families.unet import Shape, unet_rows


def _stable_diffusion(linear: bool, cross: int) -> LayerTable:
    blocks = {"mid_block.attentions.0.transformer_blocks": 1}
    for stage in range(3):
        blocks |= {f"down_blocks.{stage}.attentions.{n}.transformer_blocks": 1 for n in range(2)}
        blocks |= {f"up_blocks.{stage + 1}.attentions.{n}.transformer_blocks": 1 for n in range(3)}
    widths = {"c0": 320, "c1": 640, "c2": 1280, "c3": 1280, "emb": 1280, "cross": cross}
    return LayerTable(
        tuple(unet_rows(Shape((True, True, True, False), linear=linear))),
        ("original", CANONICAL),
        (Variant("base", widths | {"latent": 4, "latent_out": 4}, blocks),),
        text_encoders=CLIP_L_ALONE,
    )


def _stable_diffusion_3() -> Iterator[LayerRow]:
    here = "transformer_blocks.{i}."
    for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"):
        yield layer(f"{here}attn.{name}", "d", "d")
    yield layer(f"{here}attn.to_add_out", "d", "d")
    for suffix in ("", "_context"):
        yield layer(f"{here}ff{suffix}.net.0.proj", "4d", "d")
        yield layer(f"{here}ff{suffix}.net.2", "d", "4d")
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        yield layer(f"{here}attn2.{name}", "d", "d")


def _flux3() -> Iterator[LayerRow]:
    for ours, theirs in (
        ("single_transformer_blocks.{i}", "single_blocks.{i}"),
        ("mode_blocks.image.{i}", "content_mode_blocks.image.{i}"),
        ("mode_blocks.image_cond.{i}", "content_mode_blocks.image_cond.{i}"),
        ("txt_mode_blocks.{i}", "txt_mode_blocks.{i}"),
    ):
        for name, original, out, inner in (
            ("attn.to_q", "q_proj", "d", "d"),
            ("attn.to_k", "k_proj", "d", "d"),
            ("attn.to_v", "v_proj", "d", "d"),
            ("attn.to_out.0", "attn_out", "d", "d"),
            ("ff.linear_in", "mlp_in", "6d", "d"),
            ("ff.linear_out", "mlp_out", "d", "3d"),
        ):
            yield layer(f"{ours}.{name}", out, inner, original=f"{theirs}.{original}")


def _krea2() -> Iterator[LayerRow]:
    here, there = "transformer_blocks.{i}", "blocks.{i}"
    for name, original, out, inner in (
        ("attn.to_q", "attn.wq", "d", "d"),
        ("attn.to_k", "attn.wk", "kv", "d"),
        ("attn.to_v", "attn.wv", "kv", "d"),
        ("attn.to_out.0", "attn.wo", "d", "d"),
        ("attn.to_gate", "attn.gate", "d", "d"),
        ("ff.gate", "mlp.gate", "ff", "d"),
        ("ff.up", "mlp.up", "ff", "d"),
        ("ff.down", "mlp.down", "d", "ff"),
    ):
        yield layer(f"{here}.{name}", out, inner, original=f"{there}.{original}")


def _single_stream(output: str, modulation: str) -> Iterator[LayerRow]:
    """Models whose blocks are called ``layers`` and whose attention is called ``attention``."""
    here = "layers.{i}."
    for path, out, inner in (
        ("attention.qkv", "qkv", "d"),
        ("attention.to_q", "d", "d"),
        ("attention.to_k", "kv", "d"),
        ("attention.to_v", "kv", "d"),
        ("attention.to_out.0", "d", "d"),
        (f"attention.{output}", "d", "d"),
        ("feed_forward.w1", "ff", "d"),
        ("feed_forward.w2", "d", "ff"),
        ("feed_forward.w3", "ff", "d"),
        (modulation, "4d", "time"),
    ):
        yield layer(here + path, out, inner)


def _table(rows: Iterator[LayerRow], *variants: Variant) -> LayerTable:
    return LayerTable(tuple(rows), ("original", CANONICAL), variants)


def _chroma() -> LayerTable:
    """FLUX.1's blocks without modulation, and inputs and outputs without time and pooled text."""
    gone = ("norm", "time_embedder", "guidance_embedder", "pooled_text_embedder")
    rows = (row for row in FLUX1.rows if not row.part.startswith(gone) and not row.is_norm)
    return replace(FLUX1, rows=tuple(rows), text_encoders=())


def _hunyuan_video() -> LayerTable:
    """The layers whose names, joined by ``_``, are those of FLUX.1."""
    kept = ("to_qkv", "to_out", "to_qkv_mlp", "proj_out")
    rows = (row for row in FLUX1.rows if row.group and row.template.endswith(kept))
    variant = replace(FLUX1.variants[0], blocks={"blocks": 20, "single_blocks": 40})
    return replace(FLUX1, rows=tuple(rows), variants=(variant,), text_encoders=())


def _lumina(width: int, kv: int, ff: int, count: int) -> Variant:
    widths = {"d": width, "kv": kv, "qkv": width + 2 * kv, "ff": ff, "time": 1024}
    return Variant("base", widths, {"layers": count})


OTHERS: tuple[Other, ...] = (
    Other(
        Telling("Stable Diffusion 1.5", (r"\bsd[-_. ]?v?1", r"stable[-_. ]diffusion[-_. ]v?1")),
        _stable_diffusion(False, 768),
    ),
    Other(
        Telling("Stable Diffusion 2", (r"\bsd[-_. ]?v?2", r"stable[-_. ]diffusion[-_. ]v?2")),
        _stable_diffusion(True, 1024),
    ),
    Other(
        Telling("Stable Diffusion 3", (r"\bsd[-_. ]?v?3", r"stable[-_. ]diffusion[-_. ]v?3")),
        _table(
            _stable_diffusion_3(),
            Variant("Medium", {"d": 1536}, {"transformer_blocks": 24}),
            Variant("Large", {"d": 2432}, {"transformer_blocks": 38}),
        ),
    ),
    Other(
        Telling("FLUX.3", (r"flux[-_. ]?3(?!\d)",)),
        _table(_flux3(), Variant("klein", {"d": 3072}, {"single_transformer_blocks": 28})),
    ),
    Other(
        Telling("Krea 2", (r"krea[-_. ]?2",)),
        _table(
            _krea2(),
            Variant("base", {"d": 6144, "kv": 1536, "ff": 16384}, {"transformer_blocks": 28}),
        ),
    ),
    Other(
        Telling("Ideogram 4", (r"ideogram",)),
        _table(
            _single_stream("o", "adaln_modulation"),
            Variant(
                "base",
                {"d": 4608, "kv": 4608, "qkv": 13824, "ff": 12288, "time": 512},
                {"layers": 34},
            ),
        ),
    ),
    Other(
        Telling("Lumina 2", (r"lumina",)),
        _table(_single_stream("out", "adaLN_modulation.1"), _lumina(2304, 768, 9216, 26)),
    ),
    Other(Telling("Chroma", (r"chroma",)), _chroma(), header_only=True),
    Other(Telling("HunyuanVideo", (r"hunyuan[-_. ]?video",)), _hunyuan_video(), header_only=True),
)
"""Those that share module names with a family."""

_NAMES: tuple[tuple[str, str], ...] = (
    (r"(double|single)_stream_modulation", "FLUX.2"),
    (r"^single_blocks_\d+_([qkv]_proj|attn_out|mlp_(in|out))$", "FLUX.3"),
    (r"(mode_blocks|(early|single)_stream_modulations|emb_in_image)", "FLUX.3"),
    (r"(txtfusion|text_fusion)_|^blocks_\d+_(attn_w[qkvo]|mlp_(gate|up|down))$", "Krea 2"),
    (r"distilled_guidance_layer", "Chroma"),
    (r"^blocks_\d+_(cross_attn_(q_proj|k_proj|v_proj|output_proj)|mlp_layer[12])", "Anima"),
    (r"^blocks_\d+_self_attn_(q|k|v|output)_proj|llm_adapter_", "Anima"),
    (r"^blocks_\d+_((self|cross)_attn_|ffn_[02]$|ffn_net_|attn[12]_(to_|add_))", "Wan"),
    (r"joint_blocks_\d+_", "Stable Diffusion 3"),
    (r"_blocks_\d+_(img|txt)_(mlp_fc\d|mod_linear)", "HunyuanVideo"),
    (r"individual_token_refiner", "HunyuanVideo"),
    (r"(double|single)_stream_blocks_", "HiDream"),
    (
        r"^(cap_embedder|layers_\d+_(attention|feed_forward|adaLN_modulation))",
        "Lumina or Z-Image",
    ),
    (
        r"(down_blocks|up_blocks|mid_block|input_blocks|middle_block|output_blocks)_",
        "Stable Diffusion",
    ),
    (
        r"(transformer_blocks|double_layers|single_layers)_\d+_attn[12]_",
        "LTX-Video, PixArt or a like model",
    ),
    (r"(joint_transformer_blocks|double_layers|single_layers)_\d+_", "AuraFlow"),
)
NAMES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), title) for pattern, title in _NAMES
)
"""Names that only one model has, joined by ``_``, and what to call it."""

DOTTED_NAMES = ((re.compile(r"double_blocks\.\d+\.(img|txt)_attn_(qkv|proj)$"), "HunyuanVideo"),)
"""The same for names that differ from a family's only in a ``.`` or ``_``."""

_WORDS: tuple[tuple[str, str], ...] = (
    (r"chroma", "Chroma"),
    (r"anima\b|anima[-_]", "Anima"),
    (r"\bwan[-_. \d]|wan$", "Wan"),
    (r"hidream", "HiDream"),
    (r"hunyuan", "HunyuanVideo or HunyuanImage"),
    (r"\bltx", "LTX-Video"),
    (r"ernie", "ERNIE-Image"),
    (r"boogu", "Boogu"),
    (r"\bmoss", "MOSS"),
    (r"glm[-_. ]?image", "GLM-Image"),
    (r"longcat", "LongCat"),
    (r"\bprx", "PRX"),
    (r"nucleus", "Nucleus"),
    (r"fibo", "Bria FIBO"),
    (r"cogview", "CogView"),
    (r"pixart", "PixArt"),
    (r"\bsana", "Sana"),
    (r"aura[-_. ]?flow", "AuraFlow"),
    (r"kolors", "Kolors"),
    (r"cascade", "Stable Cascade"),
)
WORDS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), title) for pattern, title in _WORDS
)
"""Words of a header that name further models."""
