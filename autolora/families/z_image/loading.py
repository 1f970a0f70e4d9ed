"""Builds Z-Image from its files. Importing this module imports DiffSynth."""

from __future__ import annotations

from typing import Any

import torch
from diffsynth.models.z_image_dit import ZImageDiT
from diffsynth.utils.state_dict_converters.z_image_text_encoder import (
    ZImageTextEncoderStateDictConverter,
)
from transformers import AutoTokenizer

from autolora.families.base import Family
from autolora.families.beside import load_beside
from autolora.families.flux1.autoencoder import autoencoders
from autolora.families.language import build_qwen3
from autolora.families.loading import Component, Reader, load_family
from autolora.safetensors_io import Shapes, count_blocks

_EMBEDDER = "cap_embedder.1.weight"


def build_transformer(shapes: Shapes) -> ZImageDiT:
    """Z-Image's transformer at any size on the meta device."""
    width, text = shapes[_EMBEDDER]
    (head,) = shapes["layers.0.attention.norm_q.weight"]
    siglip = shapes.get("siglip_embedder.1.weight")
    patch = shapes["all_x_embedder.2-1.weight"][1]
    return ZImageDiT(
        in_channels=patch // 4,
        dim=width,
        n_layers=count_blocks(shapes, "layers"),
        n_refiner_layers=count_blocks(shapes, "noise_refiner"),
        n_heads=width // head,
        n_kv_heads=shapes["layers.0.attention.to_k.weight"][0] // head,
        cap_feat_dim=text,
        siglip_feat_dim=None if siglip is None else siglip[1],
    )


COMPONENTS = (
    Component("dit", "transformer", "Z-Image's transformer", build_transformer, _EMBEDDER),
    Component(
        "text_encoder",
        "text_encoder",
        "Qwen3",
        build_qwen3,
        "model.layers.0.self_attn.q_norm.weight",
        ZImageTextEncoderStateDictConverter,
        role="text",
    ),
    *autoencoders("vae"),
)


def load(family: Family, config: Any, device: torch.device) -> Any:
    """Load Z-Image; see `autolora.families.loading.load_family`."""
    reader = Reader("tokenizer", "tokenizer", AutoTokenizer.from_pretrained)
    pipe = load_family(family, config, device, COMPONENTS, [reader])
    compute = pipe.torch_dtype
    # DiffSynth hands the time embedding on in bfloat16, whatever the model computes in.
    pipe.dit.t_embedder.mlp.register_forward_pre_hook(lambda _, args: (args[0].to(compute),))
    load_beside(pipe, config, "controlnet")
    return pipe
