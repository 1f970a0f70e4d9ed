"""Builds FLUX.1 from its files, in BFL's layout or diffusers'. Importing this imports DiffSynth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffsynth.models.flux_text_encoder_clip import FluxTextEncoderClip
from diffsynth.models.flux_text_encoder_t5 import FluxTextEncoderT5
from diffsynth.pipelines.flux_image import MultiControlNet
from diffsynth.utils.state_dict_converters.flux_text_encoder_clip import (
    FluxTextEncoderClipStateDictConverter,
)
from torch import nn
from transformers import CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from autolora.families.base import Family
from autolora.families.beside import load_beside
from autolora.families.fitting import fit
from autolora.families.flux1.autoencoder import autoencoders
from autolora.families.flux1.model import SizedFluxDiT
from autolora.families.flux1.part_files import read_transformer
from autolora.families.flux1.sizes import FluxSizes, clip_sizes, t5_sizes
from autolora.families.loading import Component, Reader, load_alone, load_family
from autolora.safetensors_io import Recipe, Shapes, TensorInfo

DEV, SCHNELL = "dev", "schnell"
TEXT_LENGTHS = {DEV: 512, SCHNELL: 256}
"""T5 tokens that the published models were trained with."""
_POSITIONS = "text_model.embeddings.position_embedding.weight"
_T5_TABLES = ("shared.weight", "encoder.embed_tokens.weight")


class SizedT5(FluxTextEncoderT5):
    """DiffSynth's T5 encoder at any size."""

    def __init__(self, **sizes: int | float) -> None:
        T5EncoderModel.__init__(
            self,
            T5Config(
                feed_forward_proj="gated-gelu",
                relative_attention_max_distance=128,
                layer_norm_epsilon=1e-6,
                tie_word_embeddings=False,
                **sizes,
            ),
        )


def build_transformer(shapes: Shapes) -> SizedFluxDiT:
    """FLUX.1's transformer at any size on the meta device, for canonical shapes."""
    return SizedFluxDiT(FluxSizes.from_shapes(shapes))


def build_t5(shapes: Shapes) -> SizedT5:
    """T5 on the meta device."""
    return SizedT5(**t5_sizes(shapes))


def build_clip(shapes: Shapes) -> FluxTextEncoderClip:
    """CLIP's text encoder on the meta device; all CLIP models have heads of one size."""
    model = fit(FluxTextEncoderClip(**clip_sizes(shapes)), shapes)
    for layer in model.encoders:
        layer.attn.num_heads = layer.attn.to_q.out_features // layer.attn.head_dim
    return model


def _clip_recipes(tensors: Mapping[str, TensorInfo]) -> dict[str, Recipe]:
    """Files have or leave out ``text_model.``; DiffSynth keeps positions with a batch dimension."""
    names = {n if n.startswith("text_model.") else f"text_model.{n}": n for n in tensors}
    renamed = FluxTextEncoderClipStateDictConverter({n: n for n in names if n != _POSITIONS})
    recipes = {ours: Recipe((names[theirs],)) for ours, theirs in renamed.items()}
    if _POSITIONS in names:
        recipes["position_embeds"] = Recipe((names[_POSITIONS],), leading=1)
    return recipes


def _t5_recipes(tensors: Mapping[str, TensorInfo]) -> dict[str, Recipe]:
    """The table of words may be there under one name or both."""
    recipes = {name: Recipe((name,)) for name in tensors if name.startswith("encoder.")}
    table = next((name for name in _T5_TABLES if name in tensors), None)
    if table is not None:
        recipes |= {name: Recipe((table,)) for name in _T5_TABLES}
    return recipes


_CLIP = Component(
    "text_encoder_1",
    "text_encoder",
    "CLIP's text encoder",
    build_clip,
    "position_embeds",
    role="text",
    recipes=_clip_recipes,
)
COMPONENTS = (
    Component(
        "dit",
        "transformer",
        "FLUX.1's transformer",
        build_transformer,
        "x_embedder.weight",
        read=read_transformer,
    ),
    _CLIP,
    Component(
        "text_encoder_2",
        "text_encoder_2",
        "a T5 text encoder",
        build_t5,
        "encoder.block.0.layer.0.SelfAttention.q.weight",
        role="text",
        recipes=_t5_recipes,
    ),
    *autoencoders("vae"),
)
_CLIP_TOKENIZER = Reader("tokenizer_1", "tokenizer", CLIPTokenizer.from_pretrained)
_READERS = (_CLIP_TOKENIZER, Reader("tokenizer_2", "tokenizer_2", T5TokenizerFast.from_pretrained))


def load(family: Family, config: Any, device: torch.device) -> Any:
    """Load FLUX.1; see `autolora.families.loading.load_family`.

    The pipeline also has ``variant``, ``dev`` for a model that takes guidance as an input and
    ``schnell`` for one that does not, and ``text_length``, the T5 tokens that prompts are padded
    to.
    """
    pipe = load_family(family, config, device, COMPONENTS, _READERS)
    pipe.variant = SCHNELL if pipe.dit.guidance_embedder is None else DEV
    pipe.text_length = TEXT_LENGTHS[pipe.variant]
    load_beside(pipe, config, "controlnet", MultiControlNet)
    return pipe


def load_clip(config: Any) -> tuple[Any, nn.Module]:
    """Load CLIP's text encoder alone, in float32 on the CPU, to read texts for a search.

    Args:
        config: A configuration of kind ``flux1``.

    Returns:
        Tokenizer and model; the model gives pooled vectors first.

    Raises:
        ConfigError: Its files are missing or damaged.
    """
    from autolora.families.flux1 import FAMILY

    return load_alone(FAMILY, config, _CLIP, _CLIP_TOKENIZER)
