"""Stable Diffusion XL and its finetunes: Illustrious, NoobAI, Pony and others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autolora.families.base import Family, ImageInputs
from autolora.runtime.checkpoints import PartLayout

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor


def _load(config: Any, device: torch.device) -> Any:
    from autolora.families.sdxl.loading import load

    return load(FAMILY, config, device)


def _decode(pipe: Any, latents: Tensor) -> Image:
    decoded = pipe.vae.decode(latents / pipe.vae.scaling_factor)
    image: Image = pipe.vae_output_to_image(decoded)
    return image


FAMILY = Family(
    name="sdxl",
    title="Stable Diffusion XL",
    pipeline="diffsynth.pipelines.stable_diffusion_xl:StableDiffusionXLPipeline",
    telling=("add_embedding.linear_1.weight", "label_emb.0.0.weight"),
    whole_file="first_stage_model.decoder.conv_in.weight",
    load=_load,
    decode=_decode,
    denoiser="unet",
    text_encoders={"clip": "text_encoder", "clip_g": "text_encoder_2"},
    parts={
        "transformer": PartLayout(("unet/*", "*.safetensors")),
        "text_encoder": PartLayout(("text_encoder/*",)),
        "text_encoder_2": PartLayout(("text_encoder_2/*",)),
        "vae": PartLayout(("vae/*",)),
        "tokenizer": PartLayout(("tokenizer/*",), folder=True),
        "tokenizer_2": PartLayout(("tokenizer_2/*",), folder=True),
    },
    multiple=8,
    channels=4,
    images=lambda pipe: ImageInputs(),
    samples_latents=True,
    unit_inputs=frozenset({"input_image", "denoising_strength"}),
    per_image=("prompt_embeds", "pooled_prompt_embeds", "add_time_ids"),
)
