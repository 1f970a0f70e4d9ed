"""FLUX.1: dev, schnell, Krea, Kontext, Fill and models made from them, such as majicflus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from autolora.families.base import Family, ImageInputs
from autolora.runtime.checkpoints import PartLayout

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from autolora.runtime.checkpoints import Located
    from autolora.runtime.memory import ModelSizes

_FOLDERS = ("", "text_encoders/", "clip/")


def _load(config: Any, device: torch.device) -> Any:
    from autolora.families.flux1.loading import load

    return load(FAMILY, config, device)


def decode(pipe: Any, latents: Tensor) -> Image:
    """Decode one picture's latents ``[1, 16, h, w]``."""
    decoded = pipe.vae_decoder(latents, device=pipe.device, tiled=getattr(pipe, "tiled", False))
    image: Image = pipe.vae_output_to_image(decoded)
    return image


def _sizes(located: Mapping[str, Located]) -> ModelSizes:
    from autolora.families.flux1.part_files import model_sizes

    return model_sizes(located)


def _check_part(located: Located) -> None:
    from autolora.families.flux1.part_files import check_part

    check_part(located)


def _read_text(config: Any) -> tuple[Any, Any]:
    from autolora.families.flux1.loading import load_clip

    return load_clip(config)


def _text_length(pipe: Any, prompts: Sequence[str]) -> dict[str, Any]:
    return {"t5_sequence_length": pipe.text_length}


def embeds_guidance(pipe: Any) -> bool:
    """Whether the transformer takes guidance as an input, as dev does and schnell does not."""
    return pipe.dit.guidance_embedder is not None


def _images(pipe: Any) -> ImageInputs:
    from autolora.families.flux1.others import FILL_CHANNELS

    if pipe.dit.x_embedder.in_features == FILL_CHANNELS:
        return ImageInputs(
            "flux_fill_image",
            "flux_fill_mask",
            "controlnet_inputs",
            required=True,
            takes_strength=False,
        )
    return ImageInputs(control="controlnet_inputs", reference="kontext_images")


NEEDS = {
    "controlnet_inputs": "controlnet",
    "ipadapter_images": "ipadapter",
    "flux_redux_image": "flux_redux_image_encoder",
    "infinityou_id_image": "image_proj_model",
    "nexus_gen_reference_image": "nexus_gen",
    "step1x_reference_image": "step1x_connector",
    "value_controller_inputs": "value_controller",
}
"""Inputs of DiffSynth's FLUX.1 pipeline that are for a model beside the transformer."""

FAMILY = Family(
    name="flux1",
    title="FLUX.1",
    pipeline="diffsynth.pipelines.flux_image:FluxImagePipeline",
    load=_load,
    decode=decode,
    sizes=_sizes,
    check_part=_check_part,
    read_text=_read_text,
    text_encoders={"clip": "text_encoder_1", "t5": "text_encoder_2"},
    decoder="vae_decoder",
    text_layer="blocks.0.attn.b_to_qkv",
    parts={
        "transformer": PartLayout(
            (
                "flux1*.safetensors",
                "transformer/*",
                "diffusion_models/flux1*.safetensors",
                "unet/flux1*.safetensors",
                "*.safetensors",
            )
        ),
        "text_encoder": PartLayout(
            ("text_encoder/*", *(f"{f}clip_l*.safetensors" for f in _FOLDERS))
        ),
        "text_encoder_2": PartLayout(
            (
                "text_encoder_2/*",
                *(f"{f}t5xxl_fp16.safetensors" for f in _FOLDERS),
                *(f"{f}t5xxl*.safetensors" for f in _FOLDERS),
            )
        ),
        "vae": PartLayout(("ae.safetensors", "vae/ae.safetensors", "vae/*")),
        "tokenizer": PartLayout(("tokenizer/*",), folder=True),
        "tokenizer_2": PartLayout(("tokenizer_2/*",), folder=True),
    },
    embeds_guidance=embeds_guidance,
    inputs=_text_length,
    images=_images,
    needs=NEEDS,
    per_image=("prompt_emb", "pooled_prompt_emb"),
)
