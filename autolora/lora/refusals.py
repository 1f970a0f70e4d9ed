"""Keys that are not used, and files that are no LoRA for any family: why, as tables."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

NO_FACTORS = "alpha of a layer that has no LoRA factors in the file"
STRAY: Mapping[str, str] = {
    "alpha": NO_FACTORS,
    "magnitude": "DoRA magnitude of a layer that has no LoRA factors in the file",
    "bias": "bias of a layer that has no LoRA factors in the file",
}
"""Why a key that only goes with factors is dropped without them, by role."""
AGAIN = "the same change again under another name"
UNKNOWN = "unknown name: no {model} layer is called so"

_TOKENS = (
    r"bundle_emb\.|(clip_[lg]|t5|t5xxl|emb_params|text_encoders?(_2)?)(_out)?$"
    r"|string_to_(param|token)\b|emb_params\b"
)
_REASONS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.DOTALL), text)
    for pattern, text in (
        (_TOKENS, "token embedding (textual inversion), which is no layer: not supported"),
        (
            r"(lora_te\d?_|lycoris_te\d?_|(base_model\.model\.)?text_(encoder|model)|te\d?\."
            r"|t5xxl|clip_[lg])",
            "text encoder: no layer that adapters of {model} change is called so",
        ),
        (r".*\.(dora_scale|lora_magnitude_vector|magnitude)\b", "DoRA magnitude: unknown layer"),
        (r".*\.lokr_", "LoKr factor: unknown layer"),
        (r".*\.hada_", "LoHa factor: unknown layer"),
        (r".*norm\w*\.(b_norm|diff_b|bias\.diff)$", "normalization bias: {model}'s have none"),
        (r".*\.(diff|diff_b|w_norm|b_norm)$", "full weight difference: unknown layer"),
        (r".*\bbias\b", "bias: unknown layer"),
        (r".*norm\w*\.(scale|weight)$", "normalization weight: only changes of it are supported"),
        (r".*\.(on_input|ia3)", "IA3 factor: not supported"),
        (r".*\.[ab][12]\.weight$", "GLoRA factor: not supported"),
    )
)
_TOKEN = re.compile(_TOKENS)


@dataclass(frozen=True)
class Refusal:
    """A kind of file that is refused as a whole.

    Attributes:
        kind: What it is, to be read after "is".
        advice: What to do instead.
    """

    kind: str
    advice: str


_PLAIN = "use a plain LoRA instead"
_REFUSALS: tuple[tuple[re.Pattern[str], Refusal], ...] = tuple(
    (re.compile(pattern, re.DOTALL), Refusal(kind, advice))
    for pattern, kind, advice in (
        (
            r"(oft_|.*\.(oft_|boft_))",
            "an OFT adapter: it rotates the base weights, which is not supported",
            "train or convert it as LoRA or LoKr",
        ),
        (
            r".*(\.|^)(mlp|mlp_context)_fc[12]\.|.*\.qkv_proj(_context)?\.lora_|.*\.wtscale$",
            "a LoRA converted for Nunchaku, packed for its 4-bit kernels",
            "use the file that it was converted from",
        ),
        (
            r".*\.norm\.(query|key)_norm\.scale$",
            "an adapter for FLUX.1 Control (Canny or Depth), not for FLUX.1 itself",
            "it needs a Control pipeline, whose input layer is wider; use a plain LoRA instead",
        ),
        (
            r".*\bip_adapter_|.*\.ip_adapter\b|.*image_proj\.",
            "an IP-Adapter, which adds layers of its own, and no LoRA",
            _PLAIN,
        ),
        (
            r".*\.lora_time_(gamma|beta)\b",
            "a timestep LoRA, whose change is another one at every step and cannot be one weight "
            "change",
            _PLAIN,
        ),
        (
            r".*\.(set_weight|reshape_weight)$",
            "an adapter that replaces or reshapes base weights, which is not supported",
            "use one that only adds to them",
        ),
    )
)


def reason_for(key: str, model: str) -> str:
    """Say why a key that no format knows is not used.

    Args:
        key: The key.
        model: What to call the base model.

    Returns:
        The reason, as the load report shows it.
    """
    found = next((reason for pattern, reason in _REASONS if pattern.match(key)), UNKNOWN)
    return found.replace("{model}", model)


def refusal(keys: Iterable[str]) -> Refusal | None:
    """Recognize, by its keys, a file that must not be read as a LoRA.

    Args:
        keys: All keys of the file.

    Returns:
        What it is and what to do, or None.
    """
    listed = list(keys)
    for key in listed:
        for pattern, found in _REFUSALS:
            if pattern.match(key):
                return found
    if listed and all(map(_TOKEN.match, listed)):
        return Refusal(
            "a token embedding (textual inversion), not a LoRA: it changes no layer", _PLAIN
        )
    return None
