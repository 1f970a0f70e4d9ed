"""Builds FLUX.2 from its files. Importing this module imports DiffSynth."""

from __future__ import annotations

from typing import Any

import torch
from diffsynth.models.flux2_dit import Flux2DiT
from diffsynth.models.flux2_vae import Flux2VAE
from diffsynth.utils.state_dict_converters.flux2_text_encoder import (
    Flux2TextEncoderStateDictConverter,
)
from diffsynth.utils.state_dict_converters.z_image_text_encoder import (
    ZImageTextEncoderStateDictConverter,
)
from transformers import AutoProcessor, AutoTokenizer

from autolora.families.base import Family
from autolora.families.beside import load_beside
from autolora.families.language import build_mistral3, build_qwen3
from autolora.families.loading import Component, Reader, find_parts, load_family, part_names
from autolora.safetensors_io import Shapes, count_blocks

_QWEN = "model.layers.0.self_attn.q_norm.weight"
_GUIDANCE = "time_guidance_embed.guidance_embedder.linear_1.weight"


def build_transformer(shapes: Shapes) -> Flux2DiT:
    """FLUX.2's transformer at any size on the meta device."""
    width, channels = shapes["x_embedder.weight"]
    (head,) = shapes["transformer_blocks.0.attn.norm_q.weight"]
    return Flux2DiT(
        in_channels=channels,
        num_layers=count_blocks(shapes, "transformer_blocks"),
        num_single_layers=count_blocks(shapes, "single_transformer_blocks"),
        attention_head_dim=head,
        num_attention_heads=width // head,
        joint_attention_dim=shapes["context_embedder.weight"][1],
        guidance_embeds=_GUIDANCE in shapes,
    )


def build_autoencoder(shapes: Shapes) -> Flux2VAE:
    """FLUX.2's autoencoder at any size on the meta device."""
    stages = count_blocks(shapes, "encoder.down_blocks")
    channels = [shapes[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(stages)]
    decoder = [
        shapes[f"decoder.up_blocks.{i}.resnets.0.conv1.weight"][0]
        for i in reversed(range(count_blocks(shapes, "decoder.up_blocks")))
    ]
    return Flux2VAE(block_out_channels=channels, decoder_block_out_channels=decoder)


_TRANSFORMER = Component(
    "dit",
    "transformer",
    "FLUX.2's transformer",
    build_transformer,
    "double_stream_modulation_img.linear.weight",
)
_VAE = Component(
    "vae",
    "vae",
    "FLUX.2's autoencoder",
    build_autoencoder,
    "bn.running_mean",
    role="autoencoder",
)
_KLEIN = Component(
    "text_encoder_qwen3",
    "text_encoder",
    "Qwen3",
    build_qwen3,
    _QWEN,
    ZImageTextEncoderStateDictConverter,
    role="text",
)
_DEV = Component(
    "text_encoder",
    "text_encoder",
    "Mistral 3",
    build_mistral3,
    "model.language_model.layers.0.self_attn.q_proj.weight",
    Flux2TextEncoderStateDictConverter,
    role="text",
)


def load(family: Family, config: Any, device: torch.device) -> Any:
    """Load FLUX.2; the text encoder's files tell [klein] from [dev]."""
    text = find_parts(config, family, ["text_encoder"])["text_encoder"]
    klein = _QWEN in part_names(text)
    kind = AutoTokenizer if klein else AutoProcessor
    reader = Reader("tokenizer", "tokenizer", kind.from_pretrained)
    components = [_TRANSFORMER, _KLEIN if klein else _DEV, _VAE]
    pipe = load_family(family, config, device, components, [reader])
    load_beside(pipe, config)
    return pipe
