"""Typed fields out of what people wrote: text without markup, lists of words, finite numbers.

Sidecar files and headers come from anywhere, so that every value may have any type, and text may
hold markup, terminal control codes or marks that turn the writing direction around.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from html import unescape
from typing import Any

from autolora.errors import printable

Fields = tuple[dict[str, Any], list[str]]
"""Values by field name, and a sentence for each entry that was not understood."""

MAX_WORD = 500
"""Longest trigger word or tag in characters; a longer one is a text in the wrong place."""
MAX_WORDS = 200
MAX_SUGGESTIONS = 20

# What model sites write; anything else in angle brackets, such as <s0> or <style>, is a word.
_HTML = (
    "a abbr b blockquote br center code col div em figure font h[1-6] hr i iframe img li mark ol p "
    "pre small span strike strong sub sup table tbody td th thead tr u ul video"
)
_MARKUP = re.compile(rf"</?(?:{_HTML.replace(' ', '|')})(?:\s[^<>]*)?/?>", re.IGNORECASE)
_UNKNOWN = frozenset({"unknown", "other", "none", "null", "n/a", "?", "-"})
MAX_LONE_WORDS = 5
"""Most words of the only caption of a training set that is taken for its trigger word."""
_PROMPT_TAG = re.compile(r"<(?:lora|lyco|hypernet)\s*:[^<>]*>", re.IGNORECASE)
_RANGE = re.compile(r"\s*(-?\d+(?:\.\d+)?)\s*(?:-|~|to|\u2013)\s*(-?\d+(?:\.\d+)?)\s*")


class FieldReader:
    """Takes typed fields out of untyped entries, and notes what has the wrong type.

    Attributes:
        values: Fields found so far, by name.
        problems: A sentence for each entry that was not understood.
    """

    def __init__(self, entries: Mapping[str, Any]) -> None:
        self._entries = entries
        self.values: dict[str, Any] = {}
        self.problems: list[str] = []

    @property
    def result(self) -> Fields:
        """What was found, as parsers return it."""
        return self.values, self.problems

    def text(self, field: str, name: str, entries: Mapping[str, Any] | None = None) -> None:
        """Take a text; the first entry that gives a field one wins."""
        value = self._get(name, entries)
        if value is None or field in self.values:
            return
        if not isinstance(value, str):
            self.problems.append(f"{name} is not text; not used.")
        elif plain := plain_text(value):
            self.values[field] = plain

    def base_model(self, name: str, entries: Mapping[str, Any] | None = None) -> None:
        """Take the base model's name, unless it only says that it is not known."""
        value = self._get(name, entries)
        if not (isinstance(value, str) and value.strip().casefold() in _UNKNOWN):
            self.text("base_model", name, entries)

    def words(self, field: str, name: str, entries: Mapping[str, Any] | None = None) -> None:
        """Take a list of words, or a text with commas between them."""
        value = self._get(name, entries)
        if value is None or field in self.values:
            return
        listed = value.split(",") if isinstance(value, str) else value
        if not isinstance(listed, list):
            self.problems.append(f"{name} is not a list of words; not used.")
            return
        texts = [word for word in map(_word, listed) if word is not None]
        if len(texts) < sum(word is not None for word in listed):
            self.problems.append(f"{name} has entries that are no words; those are not used.")
        unique = unique_words(texts)
        kept = [word for word in unique if len(word) <= MAX_WORD][:MAX_WORDS]
        if len(kept) < len(unique):
            self.problems.append(
                f"{name} has words of more than {MAX_WORD} characters, or more than {MAX_WORDS} "
                "words; those are not used."
            )
        if kept:
            self.values[field] = kept

    def number(self, field: str, name: str, entries: Mapping[str, Any] | None = None) -> None:
        """Take a finite number."""
        value = self._get(name, entries)
        if value is None or value == "" or field in self.values:
            return
        number = finite_number(value)
        if number is None:
            self.problems.append(f"{name} is not a number; not used.")
        else:
            self.values[field] = number

    def bounds(
        self, low_name: str, high_name: str, entries: Mapping[str, Any] | None = None
    ) -> None:
        """Take lowest and highest strength from two entries."""
        values = [self._get(name, entries) for name in (low_name, high_name)]
        low, high = map(finite_number, values)
        if low is not None and high is not None:
            self._set_bounds(low, high, f"{low_name} is above {high_name}; not used.")
        elif any(value not in (None, "") for value in values):
            self.problems.append(f"{low_name} and {high_name} are not two numbers; not used.")

    def range(self, name: str, entries: Mapping[str, Any]) -> None:
        """Take lowest and highest strength from a text such as ``0.6-1.0``."""
        value = self._get(name, entries)
        if value in (None, "") or "strength_bounds" in self.values:
            return
        found = _RANGE.fullmatch(value) if isinstance(value, str) else None
        if found is None:
            self.problems.append(f"{name} is not a range such as 0.6-1.0; not used.")
        else:
            low, high = map(float, found.groups())
            self._set_bounds(low, high, f"{name} ends below its start; not used.")

    def texts(self, field: str, texts: Iterable[object], limit: int, length: int) -> None:
        """Take what is text among values, without blanks and repetitions."""
        plain = (plain_text(_PROMPT_TAG.sub("", t))[:length] for t in texts if isinstance(t, str))
        unique = list(dict.fromkeys(text for text in plain if text.strip("-")))[:limit]
        if unique and field not in self.values:
            self.values[field] = unique

    def tag_frequency(self, name: str) -> None:
        """Take the most frequent caption tags of the training set, as suggestions only."""
        value = self._get(name, None)
        counts: dict[str, float] = {}
        for tags in mapping(decode_json(value)).values():
            for tag, count in mapping(tags).items():
                counts[tag] = counts.get(tag, 0) + (finite_number(count) or 0)
        tags = sorted(counts, key=lambda tag: (-counts[tag], tag))
        short = [tag for tag in tags if len(tag) <= MAX_WORD]
        if unique := unique_words(short[: 2 * MAX_SUGGESTIONS])[:MAX_SUGGESTIONS]:
            self.values["suggestions"] = unique
            # ai-toolkit writes its trigger word so, and nothing else.
            if len(counts) == 1 and len(unique[0].split()) <= MAX_LONE_WORDS:
                self.values.setdefault("trigger_words", unique)

    def _set_bounds(self, low: float, high: float, problem: str) -> None:
        if low <= high:
            self.values.setdefault("strength_bounds", (low, high))
        else:
            self.problems.append(problem)

    def _get(self, name: str, entries: Mapping[str, Any] | None) -> Any:
        return (self._entries if entries is None else entries).get(name)


def _word(value: object) -> str | None:
    """A word of a list; numbers are words, too."""
    if isinstance(value, bool):
        return None
    return str(value) if isinstance(value, str | int | float) else None


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
    """Reduce HTML, as model sites store it, to plain text that is safe to print.

    Args:
        text: Text with or without tags and entities.

    Returns:
        The text without tags and control characters, in single-spaced lines.
    """
    if _MARKUP.search(text):
        text = unescape(_MARKUP.sub(" ", text))
    lines = (" ".join(printable(line).split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def unique_words(words: Iterable[str]) -> list[str]:
    """Clean words: no blanks, prompt tags or repetitions, order kept, case ignored.

    Args:
        words: Words or phrases.

    Returns:
        Those that say something.
    """
    kept: dict[str, str] = {}
    for word in words:
        clean = " ".join(plain_text(_PROMPT_TAG.sub(" ", word)).split()).strip(",").strip()
        if clean:
            kept.setdefault(clean.casefold(), clean)
    return list(kept.values())


def mapping(value: object) -> Mapping[str, Any]:
    """A value where it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def decode_json(text: object) -> Any:
    """Decode JSON inside JSON; None where it is no valid JSON text."""
    try:
        return json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None
