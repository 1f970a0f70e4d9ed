"""Builds Qwen-Image from its files. Importing this module imports DiffSynth."""

from __future__ import annotations

from typing import Any

import torch
from diffsynth.models.qwen_image_dit import QwenImageDiT
from diffsynth.models.qwen_image_vae import QwenImageVAE
from diffsynth.pipelines.qwen_image import QwenImageBlockwiseMultiControlNet
from diffsynth.utils.state_dict_converters.qwen_image_text_encoder import (
    QwenImageTextEncoderStateDictConverter,
)
from transformers import Qwen2Tokenizer, Qwen2VLProcessor

from autolora.families.base import Family
from autolora.families.beside import load_beside
from autolora.families.fitting import fit
from autolora.families.language import build_qwen_vl
from autolora.families.loading import Component, Reader, load_family
from autolora.safetensors_io import Shapes, count_blocks

WIDTH, TEXT = 3072, 3584
"""Channels of a token and of the text in the published model."""
_EMBEDDER = "txt_in.weight"


def build_transformer(shapes: Shapes) -> QwenImageDiT:
    """Qwen-Image's transformer at any size on the meta device."""
    width, text = shapes[_EMBEDDER]
    layered = "time_text_embed.addition_t_embedding.weight" in shapes
    model = QwenImageDiT(
        num_layers=count_blocks(shapes, "transformer_blocks"),
        use_layer3d_rope=layered,
        use_additional_t_cond=layered,
    )
    for block in model.transformer_blocks:
        heads = width // block.attn.head_dim
        block.dim, block.num_attention_heads, block.attn.num_heads = width, heads, heads
    own = {
        name: tuple(_side(side, width, text) for side in value.shape)
        for name, value in model.state_dict().items()
    }
    return fit(model, own, width)


def _side(side: int, width: int, text: int) -> int:
    """A published dimension at another width: multiples of the width stay such multiples."""
    if side == TEXT:
        return text
    return side // WIDTH * width if side % WIDTH == 0 else side


def build_autoencoder(shapes: Shapes) -> QwenImageVAE:
    """Qwen-Image's autoencoder at any size on the meta device."""
    base, channels = shapes["encoder.conv_in.weight"][:2]
    return QwenImageVAE(base_dim=base, image_channels=channels)


COMPONENTS = (
    Component(
        "dit",
        "transformer",
        "Qwen-Image's transformer",
        build_transformer,
        "transformer_blocks.0.img_mod.1.weight",
    ),
    Component(
        "text_encoder",
        "text_encoder",
        "Qwen2.5-VL",
        build_qwen_vl,
        "model.visual.blocks.0.attn.qkv.weight",
        QwenImageTextEncoderStateDictConverter,
        role="text",
    ),
    Component(
        "vae",
        "vae",
        "Qwen-Image's autoencoder",
        build_autoencoder,
        "encoder.conv_in.weight",
        role="autoencoder",
    ),
)


def load(family: Family, config: Any, device: torch.device) -> Any:
    """Load Qwen-Image; see `autolora.families.loading.load_family`."""
    readers = [
        Reader("tokenizer", "tokenizer", Qwen2Tokenizer.from_pretrained),
        Reader("processor", "processor", Qwen2VLProcessor.from_pretrained),
    ]
    pipe = load_family(family, config, device, COMPONENTS, readers)
    # As DiffSynth's own loader leaves it: the loop hands it on even when it is missing.
    pipe.blockwise_controlnet = QwenImageBlockwiseMultiControlNet([])
    load_beside(pipe, config, "blockwise_controlnet", QwenImageBlockwiseMultiControlNet)
    return pipe
