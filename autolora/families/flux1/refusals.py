"""Keys that are not used, and files that are not for FLUX.1: why, as tables."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

NO_FACTORS = "alpha of a layer that has no LoRA factors in the file"
STRAY: Mapping[str, str] = {
    "alpha": NO_FACTORS,
    "magnitude": "DoRA magnitude of a layer that has no LoRA factors in the file",
    "bias": "bias of a layer that has no LoRA factors in the file",
}
"""Why a key that only goes with factors is dropped where there are none, by role."""
UNKNOWN = "unknown name: no FLUX.1 layer is called so"


def _patterns(rows: Iterable[tuple[str, str]]) -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple((re.compile(pattern, re.DOTALL), text) for pattern, text in rows)


_REASONS = _patterns(
    (
        (
            r"(lora_te\d?_|lycoris_te\d?_|(base_model\.model\.)?text_(encoder|model)|te\d?\."
            r"|t5xxl|clip_l)",
            "text encoder: no linear layer of CLIP-L or T5-XXL is called so",
        ),
        (r".*\.(dora_scale|lora_magnitude_vector|magnitude)\b", "DoRA magnitude: unknown layer"),
        (r".*\.lokr_", "LoKr factor: unknown layer"),
        (r".*\.hada_", "LoHa factor: unknown layer"),
        (r".*norm\w*\.(b_norm|diff_b|bias\.diff)$", "normalization bias: FLUX.1's have none"),
        (r".*\.(diff|diff_b|w_norm|b_norm)$", "full weight difference: unknown layer"),
        (r".*\bbias\b", "bias: unknown layer"),
        (r".*norm\w*\.(scale|weight)$", "normalization weight: only changes of it are supported"),
        (r".*\.(on_input|ia3)", "IA3 factor: not supported"),
        (r".*\.[ab][12]\.weight$", "GLoRA factor: not supported"),
    )
)


@dataclass(frozen=True)
class Refusal:
    """A kind of file that is refused as a whole.

    Attributes:
        kind: What it is, to be read after "is".
        advice: What to do instead.
    """

    kind: str
    advice: str = "use one made for FLUX.1"


def _for_model(model: str) -> Refusal:
    return Refusal(f"an adapter for {model}, not for FLUX.1")


_CONTROL = Refusal(
    "an adapter for FLUX.1 Control (Canny or Depth), not for FLUX.1 itself",
    "it needs a Control pipeline, whose input layer is wider; use a plain LoRA instead",
)

_REFUSALS: tuple[tuple[re.Pattern[str], Refusal], ...] = tuple(
    (re.compile(pattern, re.DOTALL), refusal)
    for pattern, refusal in (
        (
            r"(oft_|.*\.(oft_|boft_))",
            Refusal(
                "an OFT adapter: it rotates the base weights, which is not supported",
                "train or convert it as LoRA or LoKr",
            ),
        ),
        (
            r".*(\.|^)(mlp|mlp_context)_fc[12]\.|.*\.qkv_proj(_context)?\.lora_|.*\.wtscale$",
            Refusal(
                "a LoRA converted for Nunchaku, packed for its 4-bit kernels",
                "use the file that it was converted from",
            ),
        ),
        (r".*\.norm\.(query|key)_norm\.scale$", _CONTROL),
        (
            r".*\bip_adapter_|.*\.ip_adapter\b|.*image_proj\.",
            Refusal(
                "an IP-Adapter, which adds layers of its own, and no LoRA",
                "use a LoRA made for FLUX.1",
            ),
        ),
        (
            r".*\.lora_mid\b",
            Refusal(
                "a LoRA with a Tucker core (lora_mid) of a convolution, which FLUX.1 has not",
            ),
        ),
        (
            r".*\.(set_weight|reshape_weight)$",
            Refusal(
                "an adapter that replaces or reshapes base weights, which is not supported",
                "use one that only adds to them",
            ),
        ),
    )
) + tuple(
    (re.compile(pattern, re.DOTALL), _for_model(model))
    for pattern, model in (
        (
            r"(lora_unet_|lycoris_|unet\.|lora_te\d?_unet_)?"
            r"(down_blocks|up_blocks|mid_block|input_blocks|middle_block|output_blocks)[._]",
            "Stable Diffusion 1.5 or SDXL",
        ),
        (
            r"lora_te1_text_model_encoder_layers_(1[2-9]|[23]\d)_|lora_te2_text_model_",
            "SDXL or another model with a larger CLIP",
        ),
        (r".*single_transformer_blocks[._]\d+[._]attn[._]to_qkv_mlp_proj", "FLUX.2"),
        (r".*(double|single)_stream_modulation", "FLUX.2"),
        (r".*\bblocks[._]\d+[._](self|cross)_attn[._]", "Wan"),
        (r"lora_unet_blocks_\d+_(self|cross)_attn_", "Wan"),
        (r".*transformer_blocks[._]\d+[._](img|txt)_(mlp[._]net|mod[._]1)", "Qwen-Image"),
        (r".*joint_blocks[._]\d+[._]", "Stable Diffusion 3"),
        (r".*transformer_blocks[._]\d+[._]attn2[._](to_|add_)", "Stable Diffusion 3.5 Medium"),
        (r".*_blocks[._]\d+[._](img|txt)_(mlp[._]fc\d|mod[._]linear)", "HunyuanVideo"),
        (r".*double_blocks\.\d+\.(img|txt)_attn_(qkv|proj)\b", "HunyuanVideo"),
        (r".*individual_token_refiner", "HunyuanVideo"),
        (r".*(double|single)_stream_blocks[._]", "HiDream"),
        (r".*distilled_guidance_layer", "Chroma"),
        (r".*(noise|context)_refiner[._]\d", "Lumina or Z-Image"),
        (r".*\blayers[._]\d+[._](attention|feed_forward|adaLN_modulation)[._]", "Z-Image"),
        (r"(lora_unet|lycoris)_layers_\d+_(attention|feed_forward|adaLN)", "Z-Image"),
        (r".*\btransformer_blocks[._]\d+[._]attn[12][._]", "LTX-Video, PixArt or a like model"),
    )
)

_HEADER_MODELS = _patterns(
    (
        (r".*flux[-_. ]?2(?!\d)", "FLUX.2"),
        (r".*chroma", "Chroma"),
        (r".*qwen[-_. ]?image", "Qwen-Image"),
        (r".*hunyuan", "HunyuanVideo"),
        (r".*(sd|stable-diffusion-)v?3", "Stable Diffusion 3"),
        (r".*(sdxl|stable-diffusion-xl)", "SDXL"),
        (r".*(sd_?v?|stable-diffusion-v)[12]", "Stable Diffusion 1 or 2"),
        (r".*z[-_ ]?image", "Z-Image"),
        (r".*\bwan", "Wan"),
    )
)

FLUX_WIDTH = 3072
FLUX_BLOCKS: Mapping[str, int] = {"double": 19, "single": 38}
"""Blocks of each kind in FLUX.1; at its width no file for it can have more."""

_OTHER_WIDTHS: Mapping[int, str] = {
    1536: "Stable Diffusion 3 Medium",
    2432: "Stable Diffusion 3.5 Large",
    4096: "FLUX.2 klein 9B",
    6144: "FLUX.2 dev",
}


def reason_for(key: str) -> str:
    """Say why a key that no format knows is not used.

    Args:
        key: The key.

    Returns:
        The reason, as the load report shows it.
    """
    return next((reason for pattern, reason in _REASONS if pattern.match(key)), UNKNOWN)


def refusal(keys: Iterable[str], known: Iterable[str] = ()) -> Refusal | None:
    """Recognize, by its keys, a file that must not be read as a FLUX.1 LoRA.

    Args:
        keys: Keys that no FLUX.1 format knows.
        known: Keys that one knows; some tell another model's text encoders from FLUX.1's.

    Returns:
        What it is and what to do, or None.
    """
    for key in _both(keys, known):
        for pattern, found in _REFUSALS:
            if pattern.match(key):
                return found
    return None


def _both(keys: Iterable[str], known: Iterable[str]) -> Iterator[str]:
    yield from keys
    yield from (key for key in known if key.startswith(("lora_te1_text", "lora_te2_text")))


def refusal_by_header(metadata: Mapping[str, str]) -> Refusal | None:
    """Recognize, by what its header says, a file for another base model.

    Several models share FLUX.1's names and shapes (Chroma, FLUX.2's attention), so that only the
    header tells them apart.

    Args:
        metadata: The header's text entries.

    Returns:
        What it is and what to do, or None when the header is silent or names FLUX.1.
    """
    named = header_model(metadata)
    if named is None:
        return None
    for pattern, model in _HEADER_MODELS:
        # FLUX.2 and Chroma come first; after them, a name with "flux" in it is FLUX.1's.
        if "flux" in named.lower() and model not in ("FLUX.2", "Chroma"):
            return None
        if pattern.match(named.lower()):
            return _for_model(model)
    return None


def refusal_by_size(width: int | None, blocks: Mapping[str, int]) -> Refusal | None:
    """Recognize, by its sizes, a file for another model with FLUX.1's layer names.

    Args:
        width: Model width that its layers have; None when unknown.
        blocks: Highest block number in the file by kind of block.

    Returns:
        What it is and what to do, or None.
    """
    if width is not None and width in _OTHER_WIDTHS:
        return _for_model(f"{_OTHER_WIDTHS[width]} (its layers are {width} wide)")
    if width == FLUX_WIDTH:
        for kind, highest in blocks.items():
            if highest >= FLUX_BLOCKS[kind]:
                return _for_model(
                    f"a model with {highest + 1} or more {kind} blocks, such as Qwen-Image or "
                    "HunyuanVideo"
                )
    return None


def is_control_input(width: int | None, in_features: int) -> bool:
    """Tell whether an input layer is that of FLUX.1 Control.

    Args:
        width: Model width.
        in_features: Input channels of ``x_embedder``.

    Returns:
        True for twice FLUX.1's 64 input channels.
    """
    return width == FLUX_WIDTH and in_features == 128


CONTROL = _CONTROL


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
