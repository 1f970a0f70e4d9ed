"""Layer tables of the text encoders that LoRA files change: CLIP and T5."""

from __future__ import annotations

from autolora.families.layers import CANONICAL, LayerRow, LayerTable, TextEncoder, Variant, layer

_CLIP = (
    ("self_attn.q_proj", "attn.to_q", "d", "d"),
    ("self_attn.k_proj", "attn.to_k", "d", "d"),
    ("self_attn.v_proj", "attn.to_v", "d", "d"),
    ("self_attn.out_proj", "attn.to_out", "d", "d"),
    ("mlp.fc1", "fc1", "4d", "d"),
    ("mlp.fc2", "fc2", "d", "4d"),
)
_CLIP_L = Variant("CLIP-L", {"d": 768}, {"encoders": 12, "model.text_model.encoder.layers": 12})
_CLIP_G = Variant(
    "CLIP-G", {"d": 1280, "projection": 1280}, {"model.text_model.encoder.layers": 32}
)
_DIALECTS = ("transformers", "unwrapped", CANONICAL)


def _clip(diffsynth: bool) -> tuple[LayerRow, ...]:
    """CLIP by DiffSynth's own names, or by transformers' inside a ``model``.

    ``unwrapped`` is transformers 5, where the level of ``text_model`` is gone.
    """
    return tuple(
        layer(
            f"encoders.{{i}}.{ours}"
            if diffsynth
            else f"model.text_model.encoder.layers.{{i}}.{theirs}",
            out,
            inner,
            transformers=f"text_model.encoder.layers.{{i}}.{theirs}",
            unwrapped=f"encoder.layers.{{i}}.{theirs}",
        )
        for theirs, ours, out, inner in _CLIP
    )


_PROJECTION = layer(
    "model.text_projection",
    "projection",
    "d",
    transformers="text_projection",
    unwrapped="text_model.text_projection",
)
_FLUX_CLIP = LayerTable(_clip(True), _DIALECTS, (_CLIP_L,))
_SDXL_CLIP = LayerTable(_clip(False), _DIALECTS, (_CLIP_L,))
_SDXL_CLIP_G = LayerTable((*_clip(False), _PROJECTION), _DIALECTS, (_CLIP_G,))

_T5 = LayerTable(
    tuple(
        layer(f"encoder.block.{{i}}.layer.{path}", out, inner)
        for path, out, inner in (
            *((f"0.SelfAttention.{letter}", "inner", "d") for letter in "qkv"),
            ("0.SelfAttention.o", "d", "inner"),
            ("1.DenseReluDense.wi_0", "ff", "d"),
            ("1.DenseReluDense.wi_1", "ff", "d"),
            ("1.DenseReluDense.wo", "d", "ff"),
        )
    ),
    (CANONICAL,),
    (Variant("T5-XXL", {"d": 4096, "inner": 4096, "ff": 10240}, {"encoder.block": 24}),),
)

_NUMBERED = ("lora_te1_", "lora_te2_", "lora_te3_", "lora_te_", "lycoris_te1_", "lycoris_te2_")
_FIRST = (
    "text_encoder.",
    "base_model.model.text_encoder.",
    "text_encoders.clip_l.transformer.",
    "clip_l.",
)
_SECOND = ("text_encoder_2.", "base_model.model.text_encoder_2.")

CLIP_AND_T5 = (
    TextEncoder("clip", "text_encoder_1", _FLUX_CLIP, (*_NUMBERED, *_FIRST)),
    TextEncoder(
        "t5",
        "text_encoder_2",
        _T5,
        (*_NUMBERED, *_SECOND, "text_encoders.t5xxl.transformer.", "t5xxl."),
    ),
)
"""FLUX.1's two. kohya numbers T5 as 3 and OneTrainer as 2: the layer's name decides."""

CLIP_L_AND_G = (
    TextEncoder("clip", "text_encoder", _SDXL_CLIP, ("lora_te1_", "lycoris_te1_", *_FIRST)),
    TextEncoder(
        "clip_g",
        "text_encoder_2",
        _SDXL_CLIP_G,
        (
            "lora_te2_",
            "lycoris_te2_",
            *_SECOND,
            "text_encoders.clip_g.transformer.",
            "clip_g.",
        ),
    ),
)
"""SDXL's two, whose layers have the same names: the prefix decides."""

CLIP_L_ALONE = (TextEncoder("clip", "text_encoder", _SDXL_CLIP, ("lora_te_", *_FIRST)),)
"""Stable Diffusion 1's only one."""
