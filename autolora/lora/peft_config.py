"""Alpha that is not in tensors: the PEFT configuration in a file's header or beside it.

diffusers writes the configuration as JSON under the header key ``lora_adapter_metadata``, its names
prefixed by the component (``transformer.lora_alpha``); PEFT itself writes ``adapter_config.json``
next to ``adapter_model.safetensors``.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autolora.errors import LoRAFormatError, shown
from autolora.lora.fields import finite_number
from autolora.lora.formats import DENOISER, Part
from autolora.safetensors_io import LARGEST_VALUE

_HEADER_KEY = "lora_adapter_metadata"
_COMPONENTS: Mapping[Part, tuple[str, ...]] = {
    DENOISER: ("transformer.", "unet."),
    "clip": ("text_encoder.",),
    "clip_g": ("text_encoder_2.",),
    "t5": ("text_encoder_2.",),
}
"""What diffusers puts before the names of each model's entries."""
_CHANGES_BASE = re.compile(r"pissa|olora|corda|loftq|lora_ga", re.IGNORECASE)
"""Initializations that change the base weights before training (PEFT's ``init_lora_weights``)."""
_SIDECAR = "adapter_config.json"


@dataclass(frozen=True)
class PeftConfig:
    """The part of a PEFT LoRA configuration that sets the scale.

    Attributes:
        alpha: ``lora_alpha`` of layers without their own; None means the rank.
        alpha_pattern: Alpha by module name pattern, first match wins.
        use_rslora: Divide by the square root of the rank (https://arxiv.org/abs/2312.03732).
        rank: ``r`` of layers without their own; only kept for PEFT's LoKr, which counts it even
            where both matrices are stored whole and no rank shows.
        rank_pattern: Rank by module name pattern, first match wins.
    """

    alpha: float | None = None
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    rank: float | None = None
    rank_pattern: Mapping[str, float] = field(default_factory=dict)

    def scale(self, module: str, rank: int) -> float:
        """Factor on ``B @ A`` of a module.

        Args:
            module: Module path without the component's prefix.
            rank: Rank of its factors; a ``rank_pattern`` shows in the factors themselves.

        Returns:
            ``alpha / rank``, or ``alpha / sqrt(rank)`` for rank-stabilized LoRA.
        """
        alpha = _of_module(self.alpha_pattern, module, self.alpha)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def whole_scale(self, module: str) -> float:
        """Factor on a Kronecker product of two matrices that are stored whole.

        Args:
            module: Module path without the component's prefix.

        Returns:
            ``alpha / r`` for PEFT's LoKr, 1 for everyone else's.
        """
        alpha = _of_module(self.alpha_pattern, module, self.alpha)
        rank = _of_module(self.rank_pattern, module, self.rank)
        return 1.0 if alpha is None or not rank else alpha / rank


def _of_module(patterns: Mapping[str, float], module: str, other: float | None) -> float | None:
    """The value of the first pattern that a module's name matches."""
    return next(
        (value for pattern, value in patterns.items() if _pattern_matches(pattern, module)), other
    )


def read_peft_config(path: Path, metadata: Mapping[str, str], part: Part = DENOISER) -> PeftConfig:
    """Read the configuration that belongs to a file.

    Args:
        path: The LoRA file.
        metadata: Its header's text entries.
        part: The model that it is wanted for.

    Returns:
        The configuration; without one, a scale of 1.

    Raises:
        LoRAFormatError: It is there but cannot be understood, so that the strength is unknown.
    """
    text = metadata.get(_HEADER_KEY)
    source = f"header entry {_HEADER_KEY}"
    # `pool add` names the configuration after the file, which may then have any name.
    sidecar = path.with_name(f"{path.stem}.{_SIDECAR}")
    if path.stem.startswith("adapter_model") and not sidecar.is_file():
        sidecar = path.with_name(_SIDECAR)
    if text is None and sidecar.is_file():
        source = sidecar.name
        try:
            text = sidecar.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise _unreadable(path, source, "cannot be read") from error
    if text is None:
        return PeftConfig()
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, source, "is not JSON") from error
    if not isinstance(entries, dict):
        raise _unreadable(path, source, "is not a JSON object")
    return _from_entries(path, source, entries, _COMPONENTS.get(part, ()))


def _from_entries(
    path: Path, source: str, entries: Mapping[str, Any], components: tuple[str, ...]
) -> PeftConfig:
    def entry(name: str) -> Any:
        found = (entries[key] for c in (*components, "") if (key := c + name) in entries)
        return next(found, None)

    def number(name: str, value: object) -> float:
        found = None if isinstance(value, str) else finite_number(value)
        if found is None or abs(found) > LARGEST_VALUE:
            raise _unreadable(path, source, f"has {name} {shown(value)!r}, not a usable number")
        return found

    def patterns(of: str) -> dict[str, float]:
        found = entry(of) or {}
        if not isinstance(found, dict):
            raise _unreadable(path, source, f"has an {of} that is not a JSON object")
        for name in found:
            if not _is_safe(name):
                problem = f"has a pattern {shown(name)!r} that is not supported"
                raise _unreadable(path, source, problem)
        return {str(name): number(of, value) for name, value in found.items()}

    start = entry("init_lora_weights")
    if isinstance(start, str) and _CHANGES_BASE.match(start):
        raise LoRAFormatError(
            f"{shown(path)}: {source} says that the adapter was initialized with {shown(start)}, "
            "which changed the base weights that it was trained on; save it again with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes it "
            "a plain LoRA."
        )
    # PEFT's LoKr and LoHa call it plain alpha.
    alpha = entry("alpha") if entry("lora_alpha") is None else entry("lora_alpha")
    is_lokr = entry("peft_type") == "LOKR" and entry("r") is not None
    return PeftConfig(
        alpha=None if alpha is None else number("lora_alpha", alpha),
        alpha_pattern=patterns("alpha_pattern"),
        use_rslora=entry("use_rslora") is True,
        rank=number("r", entry("r")) if is_lokr else None,
        rank_pattern=patterns("rank_pattern") if is_lokr else {},
    )


def _is_safe(pattern: str) -> bool:
    """Refuse expressions from a file that could take very long to match."""
    repeats = sum(pattern.count(sign) for sign in "*+{")
    if len(pattern) > 256 or repeats > 2 or (repeats and "(" in pattern):
        return False
    try:
        re.compile(pattern)
    except (re.error, OverflowError):
        return False
    return True


def _pattern_matches(pattern: str, module: str) -> bool:
    """PEFT's rule: the pattern, as an expression, is the module's path or its end after a dot."""
    return re.fullmatch(rf"(.*\.)?({pattern})", module) is not None


def _unreadable(path: Path, source: str, problem: str) -> LoRAFormatError:
    return LoRAFormatError(
        f"{shown(path)}: {source} {problem}, so the adapter's strength is unknown; "
        "save it again or remove that entry."
    )
