"""Qwen-Image and the models of its architecture, Qwen-Image-Edit among them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autolora.families.base import Family, ImageInputs
from autolora.runtime.checkpoints import PartLayout

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor


def _load(config: Any, device: torch.device) -> Any:
    from autolora.families.qwen_image.loading import load

    return load(FAMILY, config, device)


def _decode(pipe: Any, latents: Tensor) -> Image:
    decoded = pipe.vae.decode(latents, device=pipe.device, tiled=pipe.tiled)
    image: Image = pipe.vae_output_to_image(decoded)
    return image


FAMILY = Family(
    name="qwen_image",
    title="Qwen-Image",
    pipeline="diffsynth.pipelines.qwen_image:QwenImagePipeline",
    telling=("transformer_blocks.0.img_mod.1.weight",),
    load=_load,
    decode=_decode,
    text_encoders={"qwen2_5_vl": "text_encoder"},
    parts={
        "transformer": PartLayout(("transformer/*",)),
        "text_encoder": PartLayout(("text_encoder/*",)),
        "vae": PartLayout(("vae/*",)),
        "tokenizer": PartLayout(("tokenizer/*",), folder=True),
        "processor": PartLayout(("processor/*",), folder=True, optional=True),
    },
    images=lambda pipe: ImageInputs(
        mask="inpaint_mask", control="blockwise_controlnet_inputs", reference="edit_image"
    ),
    needs={"blockwise_controlnet_inputs": "blockwise_controlnet", "edit_image": "processor"},
)
