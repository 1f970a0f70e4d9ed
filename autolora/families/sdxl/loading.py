"""Builds Stable Diffusion XL from its files. Importing this module imports DiffSynth."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from diffsynth.diffusion.ddim_scheduler import DDIMScheduler
from diffsynth.models.stable_diffusion_text_encoder import SDTextEncoder
from diffsynth.models.stable_diffusion_vae import StableDiffusionVAE
from diffsynth.models.stable_diffusion_xl_text_encoder import SDXLTextEncoder2
from diffsynth.models.stable_diffusion_xl_unet import SDXLUNet2DConditionModel
from diffsynth.utils.state_dict_converters.stable_diffusion_text_encoder import (
    SDTextEncoderStateDictConverter,
)
from diffsynth.utils.state_dict_converters.stable_diffusion_vae import SDVAEStateDictConverter
from diffsynth.utils.state_dict_converters.stable_diffusion_xl_text_encoder import (
    SDXLTextEncoder2StateDictConverter,
)
from transformers import CLIPTokenizer

from autolora.errors import ConfigError, shown
from autolora.families.base import Family
from autolora.families.beside import load_beside
from autolora.families.loading import Component, Reader, find_parts, load_family, part_names
from autolora.families.sdxl.single_file import (
    AUTOENCODER,
    CLIP_G,
    CLIP_L,
    UNET,
    autoencoder_recipes,
    clip_g_recipes,
    clip_l_recipes,
    unet_recipes,
)
from autolora.safetensors_io import Shapes, count_blocks

_Convert = Callable[[dict[str, Any]], dict[str, Any]]
HEAD = 64
"""Channels of an attention head, in the UNet and in both CLIPs."""
_ADDED = "add_embedding.linear_1.weight"
TIME_CHANNELS = 256
"""Channels that each number of the size condition is embedded in."""


def build_unet(shapes: Shapes) -> SDXLUNet2DConditionModel:
    """SDXL's UNet at any size on the meta device."""
    stages = range(count_blocks(shapes, "down_blocks"))
    channels = [shapes[f"down_blocks.{i}.resnets.0.conv1.weight"][0] for i in stages]
    depths = [
        count_blocks(shapes, f"down_blocks.{i}.attentions.0.transformer_blocks") for i in stages
    ]
    attention = next(f"down_blocks.{i}.attentions.0" for i, depth in enumerate(depths) if depth)
    added = shapes[_ADDED][1]
    return SDXLUNet2DConditionModel(
        in_channels=shapes["conv_in.weight"][1],
        out_channels=shapes["conv_out.weight"][0],
        down_block_types=["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in depths],
        up_block_types=["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(depths)],
        block_out_channels=channels,
        layers_per_block=count_blocks(shapes, "down_blocks.0.resnets"),
        cross_attention_dim=shapes[f"{attention}.transformer_blocks.0.attn2.to_k.weight"][1],
        attention_head_dim=[max(c // HEAD, 1) for c in channels],
        transformer_layers_per_block=[max(depth, 1) for depth in depths],
        use_linear_projection=len(shapes[f"{attention}.proj_in.weight"]) == 2,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_CHANNELS,
        projection_class_embeddings_input_dim=added,
    )


def _clip_sizes(shapes: Shapes) -> dict[str, int]:
    first = "model.text_model.encoder.layers.0"
    vocabulary, width = shapes["model.text_model.embeddings.token_embedding.weight"]
    return {
        "hidden_size": width,
        "intermediate_size": shapes[f"{first}.mlp.fc1.weight"][0],
        "num_hidden_layers": count_blocks(shapes, "model.text_model.encoder.layers"),
        "num_attention_heads": width // HEAD,
        "max_position_embeddings": shapes["model.text_model.embeddings.position_embedding.weight"][
            0
        ],
        "vocab_size": vocabulary,
    }


def _prefixed(convert: _Convert) -> _Convert:
    """Read what newer transformers write, which leave out ``text_model.``, as well."""

    def read(names: dict[str, Any]) -> dict[str, Any]:
        kept = ("text_model.", "text_projection.")
        return convert(
            {n if n.startswith(kept) else f"text_model.{n}": v for n, v in names.items()}
        )

    return read


def build_clip(shapes: Shapes) -> SDTextEncoder:
    """CLIP-L at any size on the meta device."""
    return SDTextEncoder(**_clip_sizes(shapes))


def build_clip_g(shapes: Shapes) -> SDXLTextEncoder2:
    """CLIP-bigG at any size on the meta device."""
    projection = shapes["model.text_projection.weight"][0]
    return SDXLTextEncoder2(**_clip_sizes(shapes), projection_dim=projection)


def build_autoencoder(shapes: Shapes) -> StableDiffusionVAE:
    """SDXL's autoencoder at any size on the meta device."""
    stages = range(count_blocks(shapes, "encoder.down_blocks"))
    channels = [shapes[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"][0] for i in stages]
    return StableDiffusionVAE(
        block_out_channels=channels,
        down_block_types=["DownEncoderBlock2D"] * len(channels),
        up_block_types=["UpDecoderBlock2D"] * len(channels),
        latent_channels=shapes["post_quant_conv.weight"][0],
        scaling_factor=0.13025,
        sample_size=1024,
    )


COMPONENTS = (
    Component("unet", "transformer", "SDXL's UNet", build_unet, _ADDED),
    Component(
        "text_encoder",
        "text_encoder",
        "CLIP-L",
        build_clip,
        "model.text_model.embeddings.token_embedding.weight",
        _prefixed(SDTextEncoderStateDictConverter),
        role="text",
    ),
    Component(
        "text_encoder_2",
        "text_encoder_2",
        "CLIP-bigG",
        build_clip_g,
        "model.text_projection.weight",
        _prefixed(SDXLTextEncoder2StateDictConverter),
        role="text",
    ),
    Component(
        "vae",
        "vae",
        "SDXL's autoencoder",
        build_autoencoder,
        "post_quant_conv.weight",
        SDVAEStateDictConverter,
        role="autoencoder",
    ),
)


def _components(names: Collection[str]) -> list[Component]:
    """Components, out of the one file that the UNet is in where it holds them, too."""
    single = {
        "unet": (UNET, unet_recipes),
        "text_encoder": (CLIP_L, clip_l_recipes),
        "text_encoder_2": (CLIP_G, clip_g_recipes),
        "vae": (AUTOENCODER, autoencoder_recipes),
    }
    found = []
    for component in COMPONENTS:
        prefix, recipes = single[component.attribute]
        there = any(name.startswith(prefix) for name in names)
        found.append(
            replace(component, part="transformer", recipes=recipes) if there else component
        )
    return found


def load(family: Family, config: Any, device: torch.device) -> Any:
    """Load SDXL; see `autolora.families.loading.load_family`."""
    readers = [
        Reader(name, name, CLIPTokenizer.from_pretrained) for name in ("tokenizer", "tokenizer_2")
    ]
    denoiser = find_parts(config, family, ["transformer"])["transformer"]
    components = _components(part_names(denoiser))
    pipe = load_family(family, config, device, components, readers)
    load_beside(pipe, config)
    pipe.scheduler = _scheduler(config, family)
    return pipe


def _scheduler(config: Any, family: Family) -> DDIMScheduler:
    """DiffSynth's scheduler for what the UNet predicts, by the settings beside its folder.

    Raises:
        ConfigError: It predicts something else than noise or v.
    """
    paths = find_parts(config, family, ["transformer"])["transformer"].paths
    path = paths[0].parent.parent / "scheduler" / "scheduler_config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        settings = {}
    prediction = settings.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise ConfigError(
            f"{shown(path)} says that the UNet predicts {shown(prediction, 40)}, which is neither "
            "epsilon nor v_prediction."
        )
    rescale = settings.get("rescale_betas_zero_snr") is True
    return DDIMScheduler(prediction_type=prediction, rescale_zero_terminal_snr=rescale)
