"""Small LoRA files in every format that people have, as tables of keys and shapes.

The keys are spelled out here, and not taken from the package's tables, so that a mistake there is
not repeated. Widths are tiny: what matters is what keys, shapes and types say about each other.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WIDTH = 4  # stands for 3,072

Shapes = Mapping[str, tuple[int, ...]]

DTYPES = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8, "F8_E4M3": 1, "F8_E5M2": 1}
OTHER_DTYPES = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "U16": 2, "U64": 8}
ALL_DTYPES = {**DTYPES, **OTHER_DTYPES}


def _pairs(modules: str, down: str, up: str, alpha: str = "") -> dict[str, tuple[int, ...]]:
    """Keys of low-rank factors; each module is ``path:out`` in widths, or ``path:out:in``."""
    shapes: dict[str, tuple[int, ...]] = {}
    for module in modules.split():
        path, *sizes = module.split(":")
        out, inner = ([int(size) * WIDTH for size in sizes] + [WIDTH])[:2]
        shapes[path + down] = (2, inner)
        shapes[path + up] = (out, 2)
        if alpha:
            shapes[path + alpha] = ()
    return shapes


_BFL = """
    double_blocks.0.img_attn.qkv:3 double_blocks.0.txt_mlp.2:1:4 double_blocks.11.img_mod.lin:6
    single_blocks.3.linear1:7 single_blocks.3.linear2:1:5 img_in:1 final_layer.linear:1
    final_layer.adaLN_modulation.1:2 guidance_in.in_layer:1
"""
_DIFFUSERS = """
    transformer_blocks.0.attn.to_q:1 transformer_blocks.0.attn.to_k:1
    transformer_blocks.0.attn.add_v_proj:1 transformer_blocks.7.ff.net.2:1:4
    transformer_blocks.0.norm1.linear:6 single_transformer_blocks.2.proj_mlp:4
    single_transformer_blocks.2.attn.to_v:1 norm_out.linear:2 x_embedder:1
"""
_CANONICAL = "blocks.0.attn.a_to_qkv:3 blocks.0.ff_b.2:1:4 single_blocks.1.to_qkv_mlp:7"


def _prefixed(modules: str, prefix: str, joint: str = ".") -> str:
    return " ".join(prefix + module.replace(".", joint) for module in modules.split())


def _kohya_like(prefix: str, modules: str) -> str:
    return _prefixed(modules, prefix, "_")


PEFT = (".lora_A.weight", ".lora_B.weight")
KOHYA = (".lora_down.weight", ".lora_up.weight", ".alpha")

_KOHYA_TEXT = """
    lora_te1_text_model_encoder_layers_0_mlp_fc1:4
    lora_te1_text_model_encoder_layers_3_self_attn_q_proj:1
    lora_te3_encoder_block_0_layer_0_SelfAttention_q:1
"""
_LAYER = "lora_unet_double_blocks_0_img_attn_proj"
_SINGLE = "transformer.single_transformer_blocks.0.attn.to_q"

FILES: dict[str, Shapes] = {
    "kohya": _pairs(_kohya_like("lora_unet_", _BFL), *KOHYA),
    "kohya with text encoders": _pairs(_kohya_like("lora_unet_", _BFL) + _KOHYA_TEXT, *KOHYA),
    "diffusers": _pairs(_prefixed(_DIFFUSERS, "transformer."), *PEFT),
    "diffusers with alpha": _pairs(_prefixed(_DIFFUSERS, "transformer."), *PEFT, ".alpha"),
    "peft": _pairs(_prefixed(_DIFFUSERS, "base_model.model."), *PEFT),
    "named": _pairs(_DIFFUSERS, ".lora_A.default.weight", ".lora_B.default.weight"),
    "ai-toolkit": _pairs(_prefixed(_BFL, "diffusion_model."), *PEFT),
    "fal": _pairs(_prefixed(_BFL, "base_model.model."), *PEFT),
    "xlabs": _pairs(
        "double_blocks.0.processor.qkv_lora1:3 double_blocks.0.processor.proj_lora2:1 "
        "single_blocks.0.processor.qkv_lora:3 single_blocks.0.processor.proj_lora:1",
        ".down.weight",
        ".up.weight",
    ),
    "onetrainer": _pairs(_kohya_like("lora_transformer_", _DIFFUSERS), *KOHYA),
    "onetrainer-bfl": _pairs(
        "transformer.double_blocks.0.img_attn.qkv.0:1 transformer.double_blocks.0.img_attn.qkv.2:1 "
        "transformer.single_blocks.0.linear1.3:4 transformer.single_blocks.0.linear1.1:1",
        *KOHYA,
    ),
    "diffsynth": _pairs(_CANONICAL, *PEFT),
    "diffsynth training": _pairs(_CANONICAL, ".lora_A.default.weight", ".lora_B.default.weight"),
    "lokr": {
        f"{_LAYER}.lokr_w1": (2, 2),
        f"{_LAYER}.lokr_w2_a": (2, 1),
        f"{_LAYER}.lokr_w2_b": (1, 2),
        f"{_LAYER}.alpha": (),
        "lycoris_transformer_blocks_0_attn_to_q.lokr_w1": (2, 2),
        "lycoris_transformer_blocks_0_attn_to_q.lokr_w2": (2, 2),
        "lycoris_transformer_blocks_0_attn_to_q.alpha": (),
    },
    "loha": {
        **{
            f"{_LAYER}.hada_w{n}_{side}": shape
            for n in (1, 2)
            for side, shape in (("a", (WIDTH, 2)), ("b", (2, WIDTH)))
        },
        f"{_LAYER}.alpha": (),
    },
    "tucker": {
        f"{_LAYER}.hada_t1": (2, 2, 1, 1),
        f"{_LAYER}.hada_t2": (2, 2, 1, 1),
        **{f"{_LAYER}.hada_w{n}_{side}": (2, WIDTH) for n in (1, 2) for side in "ab"},
    },
    "dora": {
        **_pairs(f"{_LAYER}:1 {_SINGLE}:1 diffusion_model.double_blocks.0.img_mlp.0:4", *KOHYA),
        f"{_LAYER}.dora_scale": (1, WIDTH),
        f"{_SINGLE}.lora_magnitude_vector": (WIDTH,),
        "diffusion_model.double_blocks.0.img_mlp.0.magnitude": (4 * WIDTH,),
    },
    "diff": {
        f"{_LAYER}.diff": (WIDTH, WIDTH),
        f"{_LAYER}.diff_b": (WIDTH,),
        "diffusion_model.double_blocks.0.img_attn.norm.query_norm.scale.diff": (WIDTH,),
        "diffusion_model.single_blocks.0.linear1.diff": (7 * WIDTH, WIDTH),
        "lora_unet_single_blocks_0_norm_key_norm.w_norm": (WIDTH,),
    },
    "bias": {
        **_pairs("double_blocks.0.img_attn.qkv:3", *PEFT),
        "double_blocks.0.img_attn.qkv.lora_B.bias": (3 * WIDTH,),
        "double_blocks.0.img_attn.norm.query_norm.scale": (WIDTH,),
    },
    "oft": {"oft_unet_double_blocks_0_img_attn_proj.oft_blocks": (2, 2, 2)},
    "comfy text": _pairs(
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1:4 "
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q:1",
        *PEFT,
    ),
    "wan": _pairs("diffusion_model.blocks.0.self_attn.q:1", *PEFT),
    "sdxl": _pairs("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q:1", *KOHYA),
    "nothing": {},
}

METADATA: tuple[dict[str, Any], ...] = (
    {},
    {"format": "pt"},
    {"ss_network_alpha": "1", "ss_network_dim": "2", "ss_base_model_version": "flux1"},
    {"modelspec.architecture": "flux-1-dev/lora", "modelspec.title": "x"},
    {
        "lora_adapter_metadata": json.dumps(
            {
                "transformer.r": 2,
                "transformer.lora_alpha": 4,
                "transformer.rank_pattern": {"to_q": 2},
                "transformer.alpha_pattern": {"to_q": 8, "single.*": 1},
                "transformer.use_rslora": False,
            }
        )
    },
)


def real_key_lists(folder: Path) -> dict[str, Shapes]:
    """Key lists of published files, at a tiny width.

    Args:
        folder: Holds JSON files of shapes by key; may be missing.

    Returns:
        Shapes by key and file stem.
    """
    found: dict[str, Shapes] = {}
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        shapes = json.loads(path.read_text(encoding="utf-8"))
        found[path.stem] = {
            key: tuple(size * WIDTH // 3072 if size >= 3072 else min(size, 2) for size in shape)
            for key, shape in shapes.items()
        }
    return found


def lay_out(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], data: bytes = b""
) -> tuple[dict[str, Any], bytes]:
    """Make the header entries and the data of a file.

    Args:
        tensors: Element type and shape by key.
        data: Values, repeated as needed; zeros when empty.

    Returns:
        Entries by key, and the data.
    """
    position = 0
    entries: dict[str, Any] = {}
    for key, (dtype, shape) in tensors.items():
        end = position + ALL_DTYPES[dtype] * math.prod(shape)
        entries[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    repeated = data * (position // len(data) + 1) if data else bytes(position)
    return entries, repeated[:position]


def pack(header: object, data: bytes) -> bytes:
    """Bytes of a safetensors file from its header, which may be any JSON or raw bytes."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data
