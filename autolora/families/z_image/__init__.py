"""Z-Image, base and Turbo."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autolora.families.base import Family, ImageInputs
from autolora.runtime.checkpoints import PartLayout

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor


def _load(config: Any, device: torch.device) -> Any:
    from autolora.families.z_image.loading import load

    return load(FAMILY, config, device)


def _decode(pipe: Any, latents: Tensor) -> Image:
    image: Image = pipe.vae_output_to_image(pipe.vae_decoder(latents))
    return image


FAMILY = Family(
    name="z_image",
    title="Z-Image",
    pipeline="diffsynth.pipelines.z_image:ZImagePipeline",
    telling=("cap_embedder.1.weight",),
    load=_load,
    decode=_decode,
    text_encoders={"qwen3": "text_encoder"},
    decoder="vae_decoder",
    parts={
        "transformer": PartLayout(("transformer/*", "diffusion_models/z_image*.safetensors")),
        "text_encoder": PartLayout(("text_encoder/*",)),
        "vae": PartLayout(("vae/*", "ae.safetensors", "vae/ae.safetensors")),
        "tokenizer": PartLayout(("tokenizer/*",), folder=True),
    },
    images=lambda pipe: ImageInputs(control="controlnet_inputs", reference="edit_image"),
    needs={"controlnet_inputs": "controlnet", "edit_image": "image_encoder"},
)
