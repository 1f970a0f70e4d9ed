"""Detects FLUX.1 transformer checkpoints (BFL or diffusers keys) and names other model families.

The names of other families are facts from their published code (diffusers' transformers, the
models' own repositories). A rule needs one tensor name; rules are checked in the order of the
table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Literal

from autolora.errors import ConfigError, shown
from autolora.safetensors_io import TensorInfo

Layout = Literal["bfl", "diffusers"]

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")
"""What programs put before the transformer's names; other parts in the file keep their own."""

_TELLING: Mapping[Layout, str] = {
    "bfl": "double_blocks.0.img_attn.qkv.weight",
    "diffusers": "transformer_blocks.0.attn.add_q_proj.weight",
}
_INPUT: Mapping[Layout, str] = {"bfl": "img_in.weight", "diffusers": "x_embedder.weight"}
LATENT_CHANNELS, FILL_CHANNELS = 64, 384
"""Channels of a patch: 16 latent channels of 2 x 2; a Fill model takes the masked picture's, too,
and 8 x 8 of the mask for each of its 2 x 2 latents."""


def _named(*names: str) -> Callable[[Collection[str]], bool]:
    return lambda keys: any(name in keys for name in names)


def _matching(*patterns: str) -> Callable[[Collection[str]], bool]:
    regexes = [re.compile(pattern) for pattern in patterns]
    return lambda keys: any(regex.search(key) for key in keys for regex in regexes)


_Rules = tuple[tuple[str, Callable[[Collection[str]], bool]], ...]
_PACKED: _Rules = (
    ("a checkpoint packed by Nunchaku", _matching(r"\.(qweight|wscales)$")),
    ("a checkpoint packed to 4 bits by bitsandbytes", _matching(r"\.quant_state\.bitsandbytes")),
    ("a float8 checkpoint with separate scales", _matching(r"\.(scale_weight|weight_scale)$")),
)
_OTHERS: _Rules = (
    ("a LoRA, not a base model", _matching(r"\.lora_[AB]\.", r"\.lora_(down|up)\.", r"\.lokr_w")),
    *_PACKED,
    ("FLUX.2", _matching(r"^double_stream_modulation_img\.(lin|linear)\.")),
    ("Chroma", _matching(r"^distilled_guidance_layer\.")),
    ("HunyuanVideo", _matching(r"^txt_in\.individual_token_refiner", r"^context_embedder\.token_")),
    ("Qwen-Image", _matching(r"^transformer_blocks\.0\.img_mod\.1\.")),
    ("HiDream", _matching(r"^(double|single)_stream_blocks\.")),
    ("Stable Diffusion 3", _matching(r"^joint_blocks\.", r"^pos_embed\.proj\.")),
    ("AuraFlow", _matching(r"^double_layers\.", r"^joint_transformer_blocks\.")),
    ("Z-Image or Lumina", _matching(r"^(noise_refiner|cap_embedder|context_refiner)\.")),
    ("PixArt, Sana or LTX-Video", _matching(r"^adaln_single\.", r"^caption_projection\.")),
    ("Wan", _matching(r"^blocks\.\d+\.cross_attn\.", r"^condition_embedder\.time_embedder")),
    ("SDXL", _named("label_emb.0.0.weight", "add_embedding.linear_1.weight")),
    ("Stable Diffusion 1 or 2", _named("input_blocks.0.0.weight", "conv_in.weight")),
    ("T5, a text encoder", _named("encoder.block.0.layer.0.SelfAttention.q.weight")),
    ("CLIP, a text encoder", _matching(r"^text_model\.encoder\.layers\.0\.")),
    ("an autoencoder", _matching(r"^decoder\.conv_(in|out)\.")),
)


def strip_prefix(names: Collection[str]) -> dict[str, str]:
    """Names of a transformer without a program's prefix.

    Args:
        names: All names of a file.

    Returns:
        Names in the file by name without prefix. Where one prefix holds a transformer, only names
        under it; a file with all parts of a model is then read for its transformer alone.
    """
    for prefix in PREFIXES:
        inside = {name[len(prefix) :]: name for name in names if name.startswith(prefix)}
        if any(telling in inside for telling in _TELLING.values()) or "img_in.weight" in inside:
            return inside
    return {name: name for name in names}


def check_transformer(tensors: Mapping[str, TensorInfo], path: Path) -> Layout:
    """Tell the layout of a FLUX.1 transformer, and refuse everything else by name.

    Args:
        tensors: The tensors, without prefix.
        path: For messages.

    Returns:
        ``bfl`` or ``diffusers``.

    Raises:
        ConfigError: It is no FLUX.1 transformer, one for another task, or packed.
    """
    family = other_family(tensors)
    if family is not None:
        raise ConfigError(f"{shown(path)} is {family}; give a FLUX.1 checkpoint.")
    layout = next((name for name, telling in _TELLING.items() if telling in tensors), None)
    if layout is None:
        few = ", ".join(shown(name, 60) for name in list(tensors)[:3])
        raise ConfigError(
            f"{shown(path)} is not a FLUX.1 transformer (its tensors are named {few}, ...); "
            "give a FLUX.1 checkpoint."
        )
    check_plain(tensors, path)
    taken = tensors.get(_INPUT[layout])
    if (
        taken is not None
        and len(taken.shape) == 2
        and taken.shape[1]
        not in (
            LATENT_CHANNELS,
            FILL_CHANNELS,
        )
    ):
        raise ConfigError(
            f"{shown(path)} takes {taken.shape[1]} channels per patch, not {LATENT_CHANNELS}: it "
            "is a FLUX.1 Control checkpoint; give FLUX.1 dev, schnell, Kontext, Fill or a model "
            "made from them."
        )
    return layout


def check_plain(tensors: Mapping[str, TensorInfo], path: Path) -> None:
    """Refuse numbers that mean something only together with others.

    Args:
        tensors: The tensors of any part of a model.
        path: For messages.

    Raises:
        ConfigError: Weights are packed, or no floating point numbers at all.
    """
    kind = next((kind for kind, matches in _PACKED if matches(tensors)), None)
    wrong = [
        name for name, info in tensors.items() if name.endswith(".weight") and not info.floating
    ]
    if kind is None and wrong:
        kind = f"packed ({shown(wrong[0], 80)} holds {shown(tensors[wrong[0]].dtype, 20)} numbers)"
    if kind is not None:
        raise ConfigError(
            f"{shown(path)} is {kind}; give the same in float16, bfloat16 or plain float8."
        )


def other_family(names: Collection[str]) -> str | None:
    """Name the family of a checkpoint that is not a FLUX.1 transformer.

    Args:
        names: Names of its tensors, with or without prefix.

    Returns:
        What to call it, or None where no rule matches.
    """
    plain = set(strip_prefix(names))
    for prefix in PREFIXES:
        plain |= {name[len(prefix) :] for name in names if name.startswith(prefix)}
    return next((family for family, matches in _OTHERS if matches(plain)), None)
