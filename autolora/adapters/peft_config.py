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

_HEADER_KEY = "lora_adapter_metadata"
_COMPONENT = "transformer."
_SIDECAR = "adapter_config.json"


@dataclass(frozen=True)
class PeftConfig:
    """The part of a PEFT LoRA configuration that sets the scale.

    Attributes:
        alpha: ``lora_alpha`` of layers without their own; None means the rank.
        alpha_pattern: Alpha by module name pattern, first match wins.
        use_rslora: Divide by the square root of the rank (https://arxiv.org/abs/2312.03732).
    """

    alpha: float | None = None
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False

    def scale(self, module: str, rank: int) -> float:
        """Factor on ``B @ A`` of a module.

        Args:
            module: Module path without the component's prefix.
            rank: Rank of its factors; a ``rank_pattern`` shows in the factors themselves.

        Returns:
            ``alpha / rank``, or ``alpha / sqrt(rank)`` for rank-stabilized LoRA.
        """
        alpha = self.alpha
        for pattern, value in self.alpha_pattern.items():
            if _pattern_matches(pattern, module):
                alpha = value
                break
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_peft_config(path: Path, metadata: Mapping[str, str]) -> PeftConfig:
    """Read the configuration that belongs to a file.

    Args:
        path: The LoRA file.
        metadata: Its header's text entries.

    Returns:
        The configuration; one of scale 1 where there is none.

    Raises:
        LoRAFormatError: It is there but cannot be understood, so that the strength is unknown.
    """
    text = metadata.get(_HEADER_KEY)
    source = f"header entry {_HEADER_KEY}"
    sidecar = path.parent / _SIDECAR
    if text is None and path.stem.startswith("adapter_model") and sidecar.is_file():
        source = _SIDECAR
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
    return _from_entries(path, source, entries)


def _from_entries(path: Path, source: str, entries: Mapping[str, Any]) -> PeftConfig:
    def entry(name: str) -> Any:
        return entries.get(_COMPONENT + name, entries.get(name))

    def number(name: str, value: object) -> float:
        finite = isinstance(value, int | float) and not isinstance(value, bool)
        if not finite or not math.isfinite(value):  # type: ignore[arg-type]
            raise _unreadable(path, source, f"has {name} {shown(value)!r}, not a number")
        return float(value)  # type: ignore[arg-type]

    alpha, pattern = entry("lora_alpha"), entry("alpha_pattern") or {}
    if not isinstance(pattern, dict):
        raise _unreadable(path, source, "has an alpha_pattern that is not a JSON object")
    for name in pattern:
        if not _is_safe(name):
            raise _unreadable(path, source, f"has a pattern {shown(name)!r} that is not supported")
    return PeftConfig(
        alpha=None if alpha is None else number("lora_alpha", alpha),
        alpha_pattern={
            str(name): number("alpha_pattern", value) for name, value in pattern.items()
        },
        use_rslora=entry("use_rslora") is True,
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
