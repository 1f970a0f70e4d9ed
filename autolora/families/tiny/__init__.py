"""The model in the package: a small FLUX.1, which draws in seconds on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autolora.families.base import Family, ImageInputs
from autolora.families.flux1 import NEEDS, decode, embeds_guidance

if TYPE_CHECKING:
    import torch


def _load(config: Any, device: torch.device) -> Any:
    from autolora.families.tiny.pipeline import load

    return load(config, device)


def _text_length(pipe: Any, prompts: Sequence[str]) -> dict[str, Any]:
    from autolora.families.tiny.pipeline import text_length

    return {"t5_sequence_length": text_length(pipe, list(prompts))}


FAMILY = Family(
    name="tiny",
    title="The tiny model",
    pipeline="diffsynth.pipelines.flux_image:FluxImagePipeline",
    load=_load,
    decode=decode,
    packaged=Path(__file__).parent / "weights" / "tiny-flux.safetensors",
    text_encoders={"clip": "text_encoder_1", "t5": "text_encoder_2"},
    decoder="vae_decoder",
    text_layer="blocks.0.attn.b_to_qkv",
    embeds_guidance=embeds_guidance,
    inputs=_text_length,
    images=lambda pipe: ImageInputs(control="controlnet_inputs", reference="kontext_images"),
    needs=NEEDS,
    per_image=("prompt_emb", "pooled_prompt_emb"),
)
