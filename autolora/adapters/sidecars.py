"""The fields that each kind of metadata source carries: one small parser per source.

A parser takes the decoded entries and returns the fields it understands with a sentence for each
entry it does not. Parsers never raise: people's files hold anything.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from html import unescape
from typing import Any

Fields = tuple[dict[str, Any], list[str]]

MAX_SUGGESTED_TAGS = 20


def parse_lora_manager(entries: Mapping[str, Any]) -> Fields:
    """Read ``<stem>.metadata.json`` of ComfyUI LoRA Manager.

    Args:
        entries: The decoded file.

    Returns:
        Fields and problems.
    """
    fields = _Reader(entries)
    civitai = _mapping(entries.get("civitai"))
    usage = entries.get("usage_tips")
    tips = _mapping(_decode(usage) if isinstance(usage, str) else usage)
    fields.text("title", "model_name")
    fields.text("description", "modelDescription")
    fields.words("tags", "tags")
    fields.text("base_model", "base_model")
    fields.words("trigger_words", "trainedWords", civitai)
    fields.number("preferred_strength", "strength", tips)
    fields.bounds("strength_min", "strength_max", tips)
    return fields.result


def parse_a1111(entries: Mapping[str, Any]) -> Fields:
    """Read ``<stem>.json`` of A1111's web UI and Forge.

    Args:
        entries: The decoded file.

    Returns:
        Fields and problems.
    """
    fields = _Reader(entries)
    fields.text("description", "description")
    fields.text("base_model", "sd version")
    fields.words("trigger_words", "activation text")
    # The web UI writes 0 where nothing was set.
    if entries.get("preferred weight") != 0:
        fields.number("preferred_strength", "preferred weight")
    return fields.result


def parse_civitai(entries: Mapping[str, Any]) -> Fields:
    """Read ``<stem>.civitai.info``, a model version as Civitai's interface gives it.

    Args:
        entries: The decoded file.

    Returns:
        Fields and problems.
    """
    fields = _Reader(entries)
    model = _mapping(entries.get("model"))
    fields.text("title", "name", model)
    fields.text("title", "name")
    fields.text("description", "description")
    fields.text("description", "description", model)
    fields.words("tags", "tags", model)
    fields.words("tags", "tags")
    fields.text("base_model", "baseModel")
    fields.words("trigger_words", "trainedWords")
    return fields.result


def parse_header(entries: Mapping[str, Any]) -> Fields:
    """Read the text entries of a safetensors header.

    Args:
        entries: The header's ``__metadata__``.

    Returns:
        Fields and problems.
    """
    fields = _Reader(entries)
    for name in ("modelspec.title", "ss_output_name", "name"):
        fields.text("title", name)
    for name in ("modelspec.description", "ss_training_comment"):
        fields.text("description", name)
    fields.words("trigger_words", "modelspec.trigger_phrase")
    fields.words("tags", "modelspec.tags")
    fields.tag_frequency("ss_tag_frequency")
    for name in ("modelspec.architecture", "ss_base_model_version"):
        fields.text("base_model", name)
    return fields.result


def parse_text(entries: Mapping[str, Any]) -> Fields:
    """Read a description in a text file.

    Args:
        entries: The file's text as the entry ``text``.

    Returns:
        Fields and problems.
    """
    fields = _Reader(entries)
    fields.text("description", "text")
    return fields.result


SIDECARS: tuple[tuple[str, Callable[[Mapping[str, Any]], Fields]], ...] = (
    (".metadata.json", parse_lora_manager),
    (".json", parse_a1111),
    (".civitai.info", parse_civitai),
)
"""JSON files beside a LoRA by what follows its stem, in the order they are asked."""


class _Reader:
    """Takes typed fields out of untyped entries, and notes what has the wrong type."""

    def __init__(self, entries: Mapping[str, Any]) -> None:
        self._entries = entries
        self._fields: dict[str, Any] = {}
        self._problems: list[str] = []

    @property
    def result(self) -> Fields:
        return self._fields, self._problems

    def text(self, field: str, name: str, entries: Mapping[str, Any] | None = None) -> None:
        value = self._get(name, entries)
        if value is None or field in self._fields:
            return
        if not isinstance(value, str):
            self._problems.append(f"{name} is not text; not used.")
        elif plain := plain_text(value):
            self._fields[field] = plain

    def words(self, field: str, name: str, entries: Mapping[str, Any] | None = None) -> None:
        value = self._get(name, entries)
        if value is None or field in self._fields:
            return
        listed = value.split(",") if isinstance(value, str) else value
        if not isinstance(listed, list) or not all(isinstance(word, str) for word in listed):
            self._problems.append(f"{name} is not a list of words; not used.")
        elif unique := _unique(listed):
            self._fields[field] = unique

    def number(self, field: str, name: str, entries: Mapping[str, Any] | None = None) -> None:
        value = self._get(name, entries)
        if value is None or value == "":
            return
        number = finite_number(value)
        if number is None:
            self._problems.append(f"{name} is not a number; not used.")
        else:
            self._fields[field] = number

    def bounds(self, low_name: str, high_name: str, entries: Mapping[str, Any]) -> None:
        low, high = finite_number(entries.get(low_name)), finite_number(entries.get(high_name))
        if low is not None and high is not None:
            if low <= high:
                self._fields["strength_bounds"] = (low, high)
            else:
                self._problems.append(f"{low_name} is above {high_name}; not used.")

    def tag_frequency(self, name: str) -> None:
        """Most frequent caption tags of the training set: suggestions, so asked last."""
        value = self._get(name, None)
        if value is None or "tags" in self._fields:
            return
        counts: dict[str, float] = {}
        for tags in _mapping(_decode(value)).values():
            for tag, count in _mapping(tags).items():
                counts[tag] = counts.get(tag, 0) + (finite_number(count) or 0)
        tags = sorted(counts, key=lambda tag: (-counts[tag], tag))
        if unique := _unique(tags)[:MAX_SUGGESTED_TAGS]:
            self._fields["tags"] = unique

    def _get(self, name: str, entries: Mapping[str, Any] | None) -> Any:
        return (self._entries if entries is None else entries).get(name)


def finite_number(value: object) -> float | None:
    """Read a number from JSON.

    Args:
        value: A number, or text that spells one.

    Returns:
        The finite number, or None.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def plain_text(text: str) -> str:
    """Reduce HTML, as model sites store it, to plain text.

    Args:
        text: Text with or without tags and entities.

    Returns:
        The text without tags, in single-spaced lines.
    """
    if re.search(r"</?[a-zA-Z][^<>]*>", text):
        text = unescape(re.sub(r"</?[a-zA-Z][^<>]*>", " ", text))
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def _unique(words: Iterable[str]) -> list[str]:
    """Words without blanks and repetitions, in order; case does not make a difference."""
    kept: dict[str, str] = {}
    for word in words:
        clean = " ".join(word.split()).strip(",").strip()
        if clean:
            kept.setdefault(clean.casefold(), clean)
    return list(kept.values())


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _decode(text: object) -> Any:
    try:
        return json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None
