"""Language models that read prompts, as DiffSynth wraps them, at the sizes of a checkpoint.

Each is built once as published, for the constants that no tensor tells, and built again with the
sizes of the file where they differ. Importing this module imports DiffSynth.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from diffsynth.models.flux2_text_encoder import Flux2TextEncoder
from diffsynth.models.qwen_image_text_encoder import QwenImageTextEncoder
from diffsynth.models.z_image_text_encoder import ZImageTextEncoder
from torch import nn
from transformers import Mistral3ForConditionalGeneration, Qwen2_5_VLModel, Qwen3Model

from autolora.safetensors_io import Shapes, count_blocks

HEAD = 128
"""Channels of an attention head in all of them."""


def build_qwen3(shapes: Shapes) -> ZImageTextEncoder:
    """Qwen3 of any size on the meta device, for Z-Image and FLUX.2 [klein]."""
    model = ZImageTextEncoder()
    config = deepcopy(model.model.config)
    _set_decoder(config, shapes, "model")
    model.model = Qwen3Model(config)
    return model


def build_qwen_vl(shapes: Shapes) -> QwenImageTextEncoder:
    """Qwen2.5-VL of any size on the meta device, for Qwen-Image."""
    model = QwenImageTextEncoder()
    config = deepcopy(model.config)
    _set_decoder(config.text_config, shapes, "model.language_model")
    vision, first = config.vision_config, "model.visual.blocks.0"
    vision.depth = count_blocks(shapes, "model.visual.blocks")
    vision.hidden_size = shapes[f"{first}.norm1.weight"][0]
    vision.intermediate_size = shapes[f"{first}.mlp.gate_proj.weight"][0]
    vision.num_heads = max(vision.hidden_size // 80, 1)
    vision.out_hidden_size = config.text_config.hidden_size
    vision.fullatt_block_indexes = [i for i in vision.fullatt_block_indexes if i < vision.depth]
    model.model = Qwen2_5_VLModel(config)
    vocabulary, width = shapes["lm_head.weight"]
    model.lm_head = nn.Linear(width, vocabulary, bias=False)
    model.config = config
    return model


def build_mistral3(shapes: Shapes) -> Flux2TextEncoder:
    """Mistral 3 of any size on the meta device, for FLUX.2 [dev]."""
    model = Flux2TextEncoder()
    config = deepcopy(model.config)
    _set_decoder(config.text_config, shapes, "model.language_model")
    vision = config.vision_config
    layers = "model.vision_tower.transformer.layers"
    vision.num_hidden_layers = count_blocks(shapes, layers)
    vision.intermediate_size, vision.hidden_size = shapes[
        f"{layers}.0.feed_forward.gate_proj.weight"
    ]
    vision.num_attention_heads = vision.hidden_size // vision.head_dim
    Mistral3ForConditionalGeneration.__init__(model, config)
    return model


def _set_decoder(config: Any, shapes: Shapes, prefix: str) -> None:
    """Set a decoder's sizes in a transformers configuration.

    Raises:
        KeyError: A tensor that tells a size is missing.
    """
    first = f"{prefix}.layers.0"
    config.vocab_size, config.hidden_size = shapes[f"{prefix}.embed_tokens.weight"]
    config.intermediate_size = shapes[f"{first}.mlp.gate_proj.weight"][0]
    config.num_attention_heads = shapes[f"{first}.self_attn.q_proj.weight"][0] // HEAD
    config.num_key_value_heads = shapes[f"{first}.self_attn.k_proj.weight"][0] // HEAD
    config.num_hidden_layers = count_blocks(shapes, f"{prefix}.layers")
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
