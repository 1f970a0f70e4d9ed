"""FLUX.2: [klein] 4B and 9B, which read prompts with Qwen3, and [dev], which uses Mistral 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from autolora.families.base import Family, ImageInputs
from autolora.runtime.checkpoints import PartLayout

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor


def _load(config: Any, device: torch.device) -> Any:
    from autolora.families.flux2.loading import load

    return load(FAMILY, config, device)


def _unpack(latents: Tensor, shared: Mapping[str, Any]) -> Tensor:
    """Tokens ``[B, h w, C]`` to a map ``[B, C, h, w]``."""
    height, width = shared["height"] // FAMILY.factor, shared["width"] // FAMILY.factor
    return latents.transpose(1, 2).reshape(len(latents), -1, height, width)


def _decode(pipe: Any, latents: Tensor) -> Image:
    image: Image = pipe.vae_output_to_image(pipe.vae.decode(latents))
    return image


def _embeds_guidance(pipe: Any) -> bool:
    return pipe.dit.time_guidance_embed.guidance_embedder is not None


FAMILY = Family(
    name="flux2",
    title="FLUX.2",
    pipeline="diffsynth.pipelines.flux2_image:Flux2ImagePipeline",
    telling=("double_stream_modulation_img.linear.weight",),
    load=_load,
    decode=_decode,
    text_encoders={"qwen3": "text_encoder_qwen3", "mistral3": "text_encoder"},
    parts={
        "transformer": PartLayout(("transformer/*",)),
        "text_encoder": PartLayout(("text_encoder/*",)),
        "vae": PartLayout(("vae/*",)),
        "tokenizer": PartLayout(("tokenizer/*",), folder=True),
    },
    channels=128,
    factor=16,
    embeds_guidance=_embeds_guidance,
    unpack=_unpack,
    images=lambda pipe: ImageInputs(mask="inpaint_mask", reference="edit_image"),
    per_image=("prompt_embeds",),
)
