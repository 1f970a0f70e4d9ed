"""The word channel: titles, trigger words and tags that stand in the prompt literally."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from autolora.retrieval.concepts import Word, find_phrase, stems
from autolora.retrieval.records import TextRow

STRENGTH: Mapping[str, float] = MappingProxyType({"title": 0.97, "trigger": 0.95, "tag": 0.6})
"""Probability that a LoRA is meant when this kind of metadata stands in the prompt word by word."""

_NOT_PART_OF_A_NAME = frozenset({"style"})


@dataclass(frozen=True)
class Match:
    """Metadata that was found in a prompt.

    Attributes:
        lora: Position of the record.
        kind: ``title``, ``trigger`` or ``tag``.
        text: The metadata as written.
        covers: Positions of the content words that it stands for.
        probability: How strong this evidence is.
    """

    lora: int
    kind: str
    text: str
    covers: tuple[int, ...]
    probability: float


class WordIndex:
    """Finds metadata that stands in a prompt; its cost does not grow with the pool."""

    def __init__(self, rows: Iterable[TextRow]) -> None:
        """Index pieces of metadata.

        Args:
            rows: All pieces; those of kinds that are not names are not looked at.
        """
        self._by_phrase: dict[tuple[str, ...], list[TextRow]] = {}
        self._by_first: dict[str, set[tuple[str, ...]]] = {}
        for row in rows:
            if row.kind not in STRENGTH:
                continue
            for phrase in _phrases(row.text):
                self._by_phrase.setdefault(phrase, []).append(row)
                self._by_first.setdefault(phrase[0], set()).add(phrase)

    def find(self, words: list[Word]) -> list[Match]:
        """Find what stands in a prompt.

        Args:
            words: Words of the prompt.

        Returns:
            All matches that cover a content word.
        """
        found: dict[tuple[int, str, str], Match] = {}
        for first in {word.stem for word in words}:
            for phrase in self._by_first.get(first, ()):
                covers = find_phrase(words, phrase)
                if not covers:
                    continue
                for row in self._by_phrase[phrase]:
                    match = Match(row.lora, row.kind, row.text, covers, STRENGTH[row.kind])
                    key = (row.lora, row.kind, row.text)
                    if key not in found or len(found[key].covers) < len(covers):
                        found[key] = match
        return list(found.values())


def _phrases(text: str) -> set[tuple[str, ...]]:
    """The stems of a name, also without words such as "style" at its end."""
    whole = stems(text.replace("-", " "))
    shorter = tuple(word for word in whole if word not in _NOT_PART_OF_A_NAME)
    return {phrase for phrase in (whole, shorter) if phrase}
