"""Keys that are not used, and files that are not for FLUX.1: why, as tables."""

import re
from collections.abc import Iterable, Mapping

TEXT_ENCODER = "text encoder: only the transformer is adapted"
NO_FACTORS = "alpha of a layer that has no LoRA factors in the file"
UNKNOWN = "unknown name: no FLUX.1 layer is called so"

_REASONS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.DOTALL), reason)
    for pattern, reason in (
        (
            r"(lora_te\d?_|(base_model\.model\.)?text_(encoder|model)|te\d?\.|t5xxl|clip_l)",
            TEXT_ENCODER,
        ),
        (r".*\.(dora_scale|lora_magnitude_vector|magnitude)\b", "DoRA magnitude: not supported"),
        (r".*\.lokr_", "LoKr factor: not supported"),
        (r".*\.hada_", "LoHa factor: not supported"),
        (r"(oft_|.*\.oft_)", "OFT block: not supported"),
        (r".*\.lora_mid\b", "Tucker core of a convolution: not supported"),
        (r".*\.(diff|diff_b|w_norm|b_norm)$", "full weight difference: not supported"),
        (r".*\bbias\b", "bias: only low-rank weight changes are supported"),
        (r".*norm\w*\.(scale|weight)$", "normalization weight: only linear layers are supported"),
    )
)

_OTHER_MODELS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.DOTALL), model)
    for pattern, model in (
        (
            r"(lora_unet_|lycoris_|unet\.|lora_te\d?_unet_)?"
            r"(down_blocks|up_blocks|mid_block|input_blocks|middle_block|output_blocks)[._]",
            "Stable Diffusion 1.5 or SDXL",
        ),
        (r".*single_transformer_blocks[._]\d+[._]attn[._]to_qkv_mlp_proj", "FLUX.2"),
        (r".*(double|single)_stream_modulation", "FLUX.2"),
        (r".*\bblocks[._]\d+[._](self|cross)_attn[._]", "Wan"),
        (r"lora_unet_blocks_\d+_(self|cross)_attn_", "Wan"),
        (r".*transformer_blocks[._]\d+[._](img|txt)_(mlp[._]net|mod[._]1)", "Qwen-Image"),
        (r".*joint_blocks[._]\d+[._]", "Stable Diffusion 3"),
        (r".*_blocks[._]\d+[._](img|txt)_(mlp[._]fc\d|mod[._]linear)", "HunyuanVideo"),
        (r".*individual_token_refiner", "HunyuanVideo"),
        (r".*(double|single)_stream_blocks[._]", "HiDream"),
        (r".*distilled_guidance_layer", "Chroma"),
        (r".*(noise|context)_refiner[._]\d", "Lumina or Z-Image"),
        (r".*\btransformer_blocks[._]\d+[._]attn[12][._]", "LTX-Video, PixArt or a like model"),
        (r".*\.norm\.(query|key)_norm\.scale$", "FLUX.1 Control (Canny or Depth)"),
    )
)


def reason_for(key: str) -> str:
    """Say why a key that no format knows is not used.

    Args:
        key: The key.

    Returns:
        The reason, as the load report shows it.
    """
    return next((reason for pattern, reason in _REASONS if pattern.match(key)), UNKNOWN)


def is_text_encoder(key: str) -> bool:
    """Tell whether a key belongs to a text encoder.

    Args:
        key: The key.

    Returns:
        True for CLIP and T5 keys under any spelling known.
    """
    return _REASONS[0][0].match(key) is not None


def other_model(keys: Iterable[str]) -> str | None:
    """Recognize an adapter for another base model by its keys.

    Args:
        keys: Keys that no FLUX.1 format knows.

    Returns:
        Name of the base model, or None.
    """
    for key in keys:
        for pattern, model in _OTHER_MODELS:
            if pattern.match(key):
                return model
    return None


def header_model(metadata: Mapping[str, str]) -> str | None:
    """Base model that a file's header names.

    Args:
        metadata: The header's text entries.

    Returns:
        The name as written there, or None.
    """
    for key in ("modelspec.architecture", "ss_base_model_version"):
        if metadata.get(key):
            return metadata[key]
    return None
