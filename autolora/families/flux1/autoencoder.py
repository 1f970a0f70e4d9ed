"""FLUX.1's autoencoder, which Z-Image shares. Importing this module imports DiffSynth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from diffsynth.models.flux_vae import FluxVAEDecoder, FluxVAEEncoder
from diffsynth.utils.state_dict_converters.flux_vae import (
    FluxVAEDecoderStateDictConverter,
    FluxVAEEncoderStateDictConverter,
)

from autolora.families.fitting import fit
from autolora.families.flux1.checkpoint_names import autoencoder_names
from autolora.families.loading import Component
from autolora.safetensors_io import Recipe, Shapes, TensorInfo

_Convert = Callable[[dict[str, Any]], dict[str, Any]]


def build_encoder(shapes: Shapes) -> FluxVAEEncoder:
    """The encoder at any size on the meta device."""
    return _with_heads(fit(FluxVAEEncoder(), shapes))


def build_decoder(shapes: Shapes) -> FluxVAEDecoder:
    """The decoder at any size on the meta device."""
    return _with_heads(fit(FluxVAEDecoder(), shapes))


def _with_heads(model: Any) -> Any:
    for module in model.modules():
        if hasattr(module, "head_dim"):  # the attention in the middle, over all channels
            module.head_dim = module.to_q.out_channels // module.num_heads
    return model


def _recipes(convert: _Convert) -> Callable[[Mapping[str, TensorInfo]], dict[str, Recipe]]:
    def read(tensors: Mapping[str, TensorInfo]) -> dict[str, Recipe]:
        recipes = autoencoder_names(tensors)
        renamed = convert({name: name for name in recipes})
        return {ours: recipes[bfl] for ours, bfl in renamed.items()}

    return read


def autoencoders(part: str) -> tuple[Component, Component]:
    """Encoder and decoder, which DiffSynth keeps apart.

    Args:
        part: The part whose files hold both.
    """
    parts = (
        ("vae_encoder", build_encoder, FluxVAEEncoderStateDictConverter),
        ("vae_decoder", build_decoder, FluxVAEDecoderStateDictConverter),
    )
    encoder, decoder = (
        Component(
            attribute,
            part,
            "FLUX.1's autoencoder",
            build,
            "conv_in.weight",
            role="autoencoder",
            recipes=_recipes(convert),
        )
        for attribute, build, convert in parts
    )
    return encoder, decoder
