"""Prompts: ``<lora:name:0.8>`` tags, trigger words, and names for files.

The tag is that of A1111 and Forge. Nothing here needs torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from autolora.errors import GenerationError, shown

MAX_PROMPT = 10_000
"""Most characters of a prompt."""
MAX_STRENGTH = 10.0
_TAG = re.compile(r"<lora:([^<>]*)>", re.IGNORECASE)
_SPACES = re.compile(r"\s+")


@dataclass(frozen=True)
class AskedLoRA:
    """An adapter that was asked for by name.

    Attributes:
        name: Its name in the pool.
        strength: The strength asked for; None leaves it to the adapter's author, or else 1.
    """

    name: str
    strength: float | None = None


@dataclass(frozen=True)
class ParsedPrompt:
    """A prompt and what it asked for.

    Attributes:
        text: The prompt without tags.
        loras: What the tags asked for, in order.
    """

    text: str
    loras: tuple[AskedLoRA, ...]


def parse_prompt(prompt: str) -> ParsedPrompt:
    """Take the tags out of a prompt.

    Args:
        prompt: Text, with any number of ``<lora:name>`` or ``<lora:name:strength>``. Where there
            are two strengths, as A1111 allows, the second is the transformer's.

    Returns:
        The text and the adapters.

    Raises:
        GenerationError: The prompt is empty or far too long, or a tag is not understood.
    """
    if not isinstance(prompt, str) or not prompt.strip():
        raise GenerationError("The prompt is empty; say what the picture shall show.")
    check_text(prompt, "The prompt")
    loras = tuple(_parse_tag(match.group(1)) for match in _TAG.finditer(prompt))
    return ParsedPrompt(_tidy(_TAG.sub(" ", prompt)), loras)


def check_text(text: str, what: str) -> str:
    """Make sure that a text can be read by a text encoder.

    Args:
        text: A prompt or negative prompt.
        what: What a message calls it.

    Raises:
        GenerationError: It is far too long, or has bytes that are no UTF-8.
    """
    if len(text) > MAX_PROMPT:
        raise GenerationError(
            f"{what} has {len(text)} characters; at most {MAX_PROMPT} are possible."
        )
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise GenerationError(f"{what} is not valid text; save or type it as UTF-8.")
    return text


def parse_lora(text: str) -> AskedLoRA:
    """Read ``NAME`` or ``NAME:STRENGTH``; a name may itself have colons.

    Raises:
        GenerationError: The name is empty or the strength is not a number in range.
    """
    name, colon, strength = text.rpartition(":")
    if not colon:
        return _asked(text, None)
    return _asked(name, strength)


def _parse_tag(inside: str) -> AskedLoRA:
    parts = inside.split(":")
    if len(parts) > 3:
        raise GenerationError(
            f"The tag <lora:{shown(inside, 60)}> is not understood; write <lora:name:strength>."
        )
    return _asked(parts[0], parts[-1] if len(parts) > 1 else None)


def _asked(name: str, strength: str | None) -> AskedLoRA:
    if not name.strip():
        raise GenerationError("A LoRA was asked for without a name; write NAME or NAME:STRENGTH.")
    if strength is None:
        return AskedLoRA(name.strip())
    try:
        value = float(strength)
    except ValueError:
        raise GenerationError(
            f"The strength {shown(strength, 40)!r} of LoRA {shown(name.strip(), 60)!r} "
            "is not a number; write for example 0.8."
        ) from None
    return AskedLoRA(name.strip(), check_strength(name.strip(), value))


def check_strength(name: str, strength: float) -> float:
    """Make sure that a strength can be used.

    Raises:
        GenerationError: It is not finite or is out of range.
    """
    if not math.isfinite(strength) or abs(strength) > MAX_STRENGTH:
        raise GenerationError(
            f"The strength {strength:g} of LoRA {shown(name, 60)!r} is out of range; "
            f"use -{MAX_STRENGTH:g} to {MAX_STRENGTH:g}, commonly 0.5 to 1."
        )
    return float(strength)


def merge_asked(*groups: Iterable[AskedLoRA]) -> list[AskedLoRA]:
    """Join lists of adapters; a name that comes again takes the later strength."""
    merged: dict[str, AskedLoRA] = {}
    for lora in (lora for group in groups for lora in group):
        merged[lora.name] = lora
    return list(merged.values())


def add_triggers(text: str, triggers: Sequence[str]) -> tuple[str, list[str]]:
    """Add trigger words that a prompt does not have yet.

    A word counts as there when the prompt has it as whole words, in any case.

    Args:
        text: The prompt without tags.
        triggers: Words or phrases in the order to add them.

    Returns:
        The prompt with the missing ones after a comma, and those that were added.
    """
    added: list[str] = []
    for trigger in triggers:
        phrase = _tidy(_TAG.sub(" ", trigger)).strip(" ,")
        if phrase and not has_phrase(", ".join([text, *added]), phrase):
            added.append(phrase)
    return ", ".join(part for part in (text, *added) if part), added


def has_phrase(text: str, phrase: str) -> bool:
    """Tell whether a text has a phrase as whole words, in any case."""
    words = r"\s+".join(re.escape(word) for word in phrase.split())
    return re.search(rf"(?<!\w){words}(?!\w)", text, re.IGNORECASE) is not None


def slug(prompt: str, limit: int = 48) -> str:
    """Make a file name from a prompt: lower-case words of it joined by dashes."""
    text = _TAG.sub(" ", prompt).lower()
    words = re.sub(r"[^\w]+", "-", text).strip("-_")
    return words[:limit].strip("-_") or "picture"


def _tidy(text: str) -> str:
    """Join what the removed tags left apart."""
    joined = _SPACES.sub(" ", text)
    joined = re.sub(r" (?=[,.;])", "", joined)
    return re.sub(r"(,)(?:\s*,)+", r"\1", joined).strip(" ,")
