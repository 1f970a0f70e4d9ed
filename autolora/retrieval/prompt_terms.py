"""Taking a prompt apart into the things that it asks for.

A LoRA draws a thing or a look; it does not draw a background colour. Content words are candidates,
alone and in short runs; colours and words such as "background" or "picture" count only as part of
a longer run ("blue whale"), unless a colour's name stands as a thing of its own ("an orange").

The word channel: titles, trigger words and tags that stand in the prompt literally.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from autolora.retrieval.index import TextRow

Role = Literal["stop", "modifier", "content"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_STOP = _words(
    "a an and are as at be being by do does for from has have having her his i if in into is it "
    "its me my no not of off on onto or our out over she so some such than that the their them "
    "then there these they this those to under up very was we were what when where which while "
    "who whose with without you your he him one two three four five six seven eight nine ten "
    "against behind beside between inside near next around above below through across along"
)
_ARTICLES = _words("a an one the two three four five")
_COLOURS = _words(
    "red orange yellow green blue purple violet pink brown black white gray grey cyan magenta teal "
    "turquoise beige maroon navy lime golden silver colored coloured colorful colourful"
)
_GENERIC = _words(
    "background backdrop picture image photo photograph drawing illustration painting render style "
    "art artwork view scene simple plain solid light dark bright pale small big large little tiny "
    "huge beautiful nice good best detailed quality high masterpiece centered single clean "
    "generate create draw make show please want like look looking"
)
_BREAK = "\n"
_TOKEN = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*|[,.;:!?()\[\]{}|/\"]|\n", re.UNICODE)
MAX_RUN = 3
MAX_CONCEPTS = 32


@dataclass(frozen=True)
class Word:
    """A word of a prompt.

    Attributes:
        text: As written, in lower case.
        stem: Its singular, which words are compared by.
        role: ``content`` may be a concept alone, ``modifier`` only with others, ``stop`` never.
    """

    text: str
    stem: str
    role: Role


@dataclass(frozen=True)
class Concept:
    """A run of words that may name a LoRA.

    Attributes:
        text: The words.
        covers: Positions of its content words in the prompt.
    """

    text: str
    covers: tuple[int, ...]


def stem(word: str) -> str:
    """The singular of an English word, roughly; titles and prompts get the same treatment.

    Args:
        word: In lower case.

    Returns:
        The word without a plural ending or possessive.
    """
    word = re.sub(r"['\u2019]s?$", "", word)
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ches", "shes", "sses", "xes", "zes")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def stems(text: str) -> tuple[str, ...]:
    """Stems of all words of a text, stop words included."""
    return tuple(stem(token) for token in _TOKEN.findall(text.lower()) if token[0].isalnum())


def read_words(prompt: str) -> list[Word]:
    """Words of a prompt with their roles.

    Args:
        prompt: Any text.

    Returns:
        The words in order, with a stop word for each punctuation mark.
    """
    tokens = _TOKEN.findall(prompt.lower().replace("-", " "))
    words: list[Word] = []
    for position, token in enumerate(tokens):
        if not token[0].isalnum():
            words.append(Word(_BREAK, _BREAK, "stop"))
            continue
        before = tokens[position - 1] if position else ""
        after = tokens[position + 1] if position + 1 < len(tokens) else _BREAK
        words.append(Word(token, stem(token), _role(token, before, after)))
    return words


def _role(token: str, before: str, after: str) -> Role:
    if token in _STOP or token.isdigit() or len(token) == 1:
        return "stop"
    if token in _COLOURS or stem(token) in _COLOURS:
        ends = not after[0].isalnum() or after in _STOP
        # "an orange" is a thing; "an orange cat" and "in orange" are not.
        return "content" if ends and before in _ARTICLES else "modifier"
    return "modifier" if token in _GENERIC or stem(token) in _GENERIC else "content"


def find_concepts(words: list[Word]) -> list[Concept]:
    """Runs of words that may name a LoRA.

    Args:
        words: Words of a prompt.

    Returns:
        Runs of at most `MAX_RUN` words that no stop word parts, with at least one content word,
        single words first; at most `MAX_CONCEPTS`.
    """
    found: dict[str, Concept] = {}
    for length in range(1, MAX_RUN + 1):
        for start in range(len(words) - length + 1):
            run = words[start : start + length]
            covers = tuple(start + i for i, word in enumerate(run) if word.role == "content")
            if not covers or any(word.role == "stop" for word in run):
                continue
            if any(word.stem in ("background", "backdrop") for word in run):
                continue
            text = " ".join(word.text for word in run)
            found.setdefault(text, Concept(text, covers))
    return list(found.values())[:MAX_CONCEPTS]


def find_phrase(words: list[Word], phrase: tuple[str, ...]) -> tuple[int, ...]:
    """Where a phrase stands in a prompt.

    Args:
        words: Words of the prompt.
        phrase: Stems.

    Returns:
        Positions of the words of its first occurrence that has a content word, without stop
        words; empty without one. Modifiers count, so that "red neon" says more than "neon".
    """
    if not phrase:
        return ()
    at = {position for position, word in enumerate(words) if word.stem == phrase[0]}
    for start in sorted(at):
        run = words[start : start + len(phrase)]
        same = tuple(word.stem for word in run) == phrase
        if same and any(word.role == "content" for word in run):
            return tuple(start + i for i, word in enumerate(run) if word.role != "stop")
    return ()


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
