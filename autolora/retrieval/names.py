"""The word channel: names of LoRAs that a prompt uses, spells otherwise, or means."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from autolora.retrieval.index import TextRow
from autolora.retrieval.lexicon import lexicon
from autolora.retrieval.prompt_terms import Word, stems

Relation = Literal[
    "name", "alias", "style", "synonym", "kind", "member", "head", "tag", "phrase", "keyword"
]
Kind = Literal["subject", "style", "character", "clothing", "pose", "background", "helper"]
NAMES = ("title", "trigger")
MAX_WORDS = 5
"""Words of the longest name that is looked for."""
_NAME_MEANINGS = 3
"""Meanings of a name that are looked at: a dog is no sausage, though WordNet knows it as one."""
_NOT_PART_OF_A_NAME = frozenset({"style", "lora", "art style"})
_COMMON_TAG = 0.1
"""Share of a pool from which a tag says nothing about a LoRA."""
_HELPERS = (
    "lcm turbo lightning hyper accelerator distill distilled speed slider enhancer tweaker "
    "detailer realism fix"
)
_KIND_WORDS: dict[Kind, frozenset[str]] = {
    "helper": frozenset(_HELPERS.split()),
    "style": frozenset({"style", "styles", "artstyle", "aesthetic"}),
    "character": frozenset({"character", "characters", "celebrity", "person"}),
    "clothing": frozenset({"clothing", "clothes", "outfit", "costume", "fashion"}),
    "pose": frozenset({"pose", "poses", "posing"}),
    "background": frozenset({"background", "backgrounds", "scenery", "environment"}),
}


@dataclass(frozen=True)
class Match:
    """A name of a LoRA that a run of words of the prompt stands for.

    Attributes:
        lora: Position of the record.
        relation: How the words and the name hang together.
        value: How surely, in (0, 1]; falls with rarer meanings and more distant kinds.
        text: The metadata as written.
        start: Position of the run's first word.
        end: Position behind its last word.
    """

    lora: int
    relation: Relation
    value: float
    text: str
    start: int
    end: int


class NameIndex:
    """Finds names in a prompt; the cost of a search does not grow with the pool."""

    def __init__(self, rows: Iterable[TextRow]) -> None:
        """Index pieces of metadata.

        Args:
            rows: All pieces of all LoRAs.
        """
        self._by_key: dict[str, list[tuple[TextRow, Relation]]] = {}
        self._by_head: dict[str, list[TextRow]] = {}
        self._by_synset: dict[int, list[tuple[TextRow, int]]] = {}
        self.kinds: dict[int, Kind] = {}
        self.synsets: dict[int, set[int]] = {}
        words: dict[str, None] = {}
        rows = list(rows)
        common = _common(rows)
        for row in rows:
            if row.kind in NAMES:
                self._add_name(row, words)
            elif row.kind in ("tag", "phrase") and row.text.lower() not in common:
                relation: Relation = "tag" if row.kind == "tag" else "phrase"
                self._by_key.setdefault(lexicon().key(row.text), []).append((row, relation))
        self._find_kinds(rows)
        self.vocabulary = [word for word in words if len(word) > 3]

    def _add_name(self, row: TextRow, words: dict[str, None]) -> None:
        whole = stems(row.text)
        name = tuple(word for word in whole if word not in _NOT_PART_OF_A_NAME) or whole
        if not name:
            return
        words.update(dict.fromkeys(name))
        for key in dict.fromkeys(("".join(whole), "".join(name))):
            self._by_key.setdefault(key, []).append((row, "name"))
        # What a look is made of is no kind of it: stained glass is no glass.
        if lexicon().style(" ".join(name)) is None:
            if len(name) > 1:
                self._by_head.setdefault(name[-1], []).append(row)
            for rank, synset in lexicon().meanings(" ".join(name), _NAME_MEANINGS):
                self._by_synset.setdefault(synset, []).append((row, rank))
                self.synsets.setdefault(row.lora, set()).add(synset)

    def _find_kinds(self, rows: Sequence[TextRow]) -> None:
        for row in rows:
            said = frozenset(row.text.lower().replace("-", " ").split())
            for kind, telling in _KIND_WORDS.items():
                tells = row.kind in ("tag", *NAMES) and bool(said & telling)
                if tells and (row.kind == "tag" or kind in ("style", "helper")):
                    self.kinds.setdefault(row.lora, kind)
            if row.kind in NAMES and lexicon().style(" ".join(stems(row.text))) is not None:
                self.kinds.setdefault(row.lora, "style")
            if row.kind == "captions" and _styled(row):
                self.kinds.setdefault(row.lora, "style")

    def named(self, word: str) -> bool:
        """Whether a lemma is the whole name of some LoRA."""
        return any(relation == "name" for _, relation in self._by_key.get(word, ()))

    def is_name(self, phrase: str, lora: int) -> bool:
        """Whether a phrase is a LoRA's name, another name of it, or of its look."""
        known = lexicon()
        style = known.style(phrase)
        rows = self._of_style.get(style, []) if style is not None else []
        for name in (phrase, *known.other_names(known.key(phrase))):
            rows = rows + [row for row, _ in self._by_key.get(known.key(name), ())]
        return any(row.lora == lora for row in rows)

    def kind(self, lora: int) -> Kind:
        """What a LoRA is for, as far as its metadata say; a subject where they don't."""
        return self.kinds.get(lora, "subject")

    def find(self, words: Sequence[Word]) -> list[Match]:
        """Find names in a prompt.

        Args:
            words: Words of the prompt.

        Returns:
            All matches, of runs of at most `MAX_WORDS` words.
        """
        found: list[Match] = []
        for start in range(len(words)):
            for end in range(start + 1, min(start + MAX_WORDS, len(words)) + 1):
                run = words[start:end]
                if run[-1].text == "\n" or run[-1].negated != run[0].negated:
                    break
                if all(word.role == "stop" for word in run) or run[-1].role == "stop":
                    continue
                if run[0].role == "stop" and not _may_begin(run[0].text):
                    continue
                found += self._find_run(run, start, end)
        return found

    def _find_run(self, run: Sequence[Word], start: int, end: int) -> list[Match]:
        known = lexicon()
        stems_of = [word.stem for word in run]
        key, phrase = "".join(stems_of), " ".join(stems_of)
        found: list[Match] = []

        def add(row: TextRow, relation: Relation, value: float) -> None:
            found.append(Match(row.lora, relation, value, row.text, start, end))

        style = known.style(phrase)
        if style is None and len(run) == 1 and run[0].role == "modifier":
            return found  # "on an orange background" asks for no orange
        for row, relation in self._by_key.get(key, ()):
            add(row, relation, 1.0)
        if style is not None:
            for row in self._of_style.get(style, ()):
                add(row, "style", 1.0)
        for other in known.other_names(key):
            for row, relation in self._by_key.get(known.key(other), ()):
                if relation == "name":
                    add(row, "alias", 1.0)
        if all(word.role == "modifier" for word in run):
            return found
        for row in self._by_head.get(key, ()) if len(run) == 1 else ():
            add(row, "head", 1.0)
        drawings = known.drawings(key)
        for other in drawings:
            for row, relation in self._by_key.get(other, ()):
                if relation == "name":
                    add(row, "keyword", 1 / len(drawings))
        for row, relation, value in self._of_synsets(phrase):
            add(row, relation, value)
        return found

    def _of_synsets(self, phrase: str) -> list[tuple[TextRow, Relation, float]]:
        known = lexicon()
        found: list[tuple[TextRow, Relation, float]] = []
        for rank, synset in known.meanings(phrase):
            for row, other in self._by_synset.get(synset, ()):
                found.append((row, "synonym", _sureness(rank, other)))
            if rank > 1:
                continue
            for kind, depth in known.ancestors(synset):
                for row, other in self._by_synset.get(kind, ()):
                    found.append((row, "member", _sureness(rank, other, depth**0.5)))
            below = known.descendants(synset)
            # Over the smaller of the two, so that neither a large pool nor a wide kind costs much.
            shared = below.keys() & self._by_synset.keys()
            for kind in shared:
                for row, other in self._by_synset[kind]:
                    found.append((row, "kind", _sureness(rank, other, below[kind] ** 0.5)))
        return found

    @cached_property
    def _of_style(self) -> dict[int, list[TextRow]]:
        found: dict[int, list[TextRow]] = {}
        for rows in self._by_key.values():
            for row, relation in rows:
                style = lexicon().style(" ".join(stems(row.text))) if relation == "name" else None
                if style is not None:
                    found.setdefault(style, []).append(row)
        return found


def _may_begin(word: str) -> bool:
    """Whether a small word may begin a name, as in "T-Rex" and "8-bit"."""
    return word.isdigit() or (len(word) == 1 and word.isalpha() and word not in "ai")


def _sureness(rank: int, other: int, depth: float = 1) -> float:
    """How surely a meaning is meant, by its rank among the word's and among the name's."""
    return 1 / (1 + 0.5 * rank) / (1 + 0.25 * other) / depth**0.5


def _common(rows: Sequence[TextRow]) -> set[str]:
    """Tags that so many LoRAs of a pool have that they say nothing."""
    counts = Counter(row.text.lower() for row in rows if row.kind == "tag")
    loras = len({row.lora for row in rows})
    telling = set().union(*_KIND_WORDS.values()) | {"subject", "concept"}
    return {tag for tag, n in counts.items() if n > max(3, _COMMON_TAG * loras)} | telling


def _styled(row: TextRow) -> bool:
    """Whether most captions speak of one style."""
    captions = row.pieces
    return 2 * sum(" style" in caption.lower() for caption in captions) > len(captions)
