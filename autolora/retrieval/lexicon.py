"""What words have to do with each other: plurals, synonyms, kinds, fixed expressions, looks.

The data come from WordNet, the annotations of the Unicode CLDR and a list of looks; see
`scripts/build_lexicon.py`. A synset is a meaning; words that share one are synonyms, and its
parents are the kinds that it belongs to.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent / "data"
MAX_KINDS = 2500
"""A meaning with more kinds than this, such as "animal" or "object", asks for nothing."""
MAX_DEPTH = 6
_PLURALS = (
    "men/man women/woman children/child people/person feet/foot teeth/tooth geese/goose "
    "mice/mouse lice/louse oxen/ox dice/die wolves/wolf leaves/leaf knives/knife wives/wife "
    "lives/life shelves/shelf loaves/loaf thieves/thief halves/half calves/calf elves/elf "
    "scarves/scarf hooves/hoof cacti/cactus octopi/octopus fungi/fungus nuclei/nucleus "
    "alumni/alumnus stimuli/stimulus hippopotami/hippopotamus matrices/matrix indices/index "
    "vertices/vertex crises/crisis oases/oasis phenomena/phenomenon larvae/larva antennae/antenna "
    "feathers/feather tomatoes/tomato potatoes/potato"
)
_IRREGULAR = dict(pair.split("/") for pair in _PLURALS.split())


class Lexicon:
    """The words of English as far as pictures need them; use `lexicon` for the shared one."""

    def __init__(self, data: dict[str, Any]) -> None:
        """Hold data as `scripts/build_lexicon.py` writes them."""
        self.senses: dict[str, list[int]] = data["senses"]
        self._parents: list[list[int]] = data["parents"]
        self._fields: str = data["fields"]
        self._person = chr(97 + data["field_names"].index("person")) if data["fields"] else ""
        self._words = frozenset(data["words"])
        self._compounds = frozenset(data["compounds"])
        self.verbs = frozenset(data["verbs"])
        self.adjectives = frozenset(data["adjectives"])
        self._data = data
        self._counts: dict[int, tuple[int, ...]] = {}

    @cached_property
    def _children(self) -> dict[int, list[int]]:
        children: dict[int, list[int]] = {}
        for synset, parents in enumerate(self._parents):
            for parent in parents:
                children.setdefault(parent, []).append(synset)
        return children

    @cached_property
    def _styles(self) -> dict[str, int]:
        """Number of a look by the key of each of its names."""
        found: dict[str, int] = {}
        for number, style in enumerate(self._data["styles"]):
            for name in (style["name"], *style["names"]):
                found.setdefault(self.key(name), number)
        return found

    @cached_property
    def _names(self) -> dict[str, list[str]]:
        """Other names of what can be drawn, by key."""
        found: dict[str, list[str]] = {}
        for row in self._data["names"]:
            for name in row:
                others = found.setdefault(self.key(name), [])
                others += [other for other in row if other != name and other not in others]
        return found

    @cached_property
    def _keywords(self) -> dict[str, list[str]]:
        """Keys of the drawings that a keyword annotates, by its key."""
        return {
            self.key(word): [self.key(name) for name in names]
            for word, names in self._data["keywords"].items()
        }

    def lemma(self, word: str) -> str:
        """The singular of a word, where it is one.

        Args:
            word: In lower case.
        """
        return _lemma(self, word)

    def is_word(self, word: str) -> bool:
        """Whether English has this word, also as a plural or another form of a verb."""
        if word in self.senses or word in self._words or self.lemma(word) in self.senses:
            return True
        for ending in ("ing", "ed", "es", "er", "est", "ly", "s", "d", "y", "ish", "less", "like"):
            root = word.removesuffix(ending)
            if root != word and len(root) > 2:
                forms = (root, root + "e", root[:-1] if root[-1] == root[-2] else root)
                if any(form in self.senses or form in self._words for form in forms):
                    return True
        return False

    def key(self, phrase: str) -> str:
        """What two spellings of a phrase share: singulars without spaces."""
        words = re.findall(r"[^\W_]+", phrase.lower().replace("'", "").replace("\u2019", ""))
        return "".join(map(self.lemma, words))

    def meanings(self, phrase: str, most: int = 5) -> list[tuple[int, int]]:
        """Meanings of a phrase of lemmas that can be drawn, each with its rank among all.

        A person is meant only where nothing else can be: "cat" is no woman.

        Args:
            phrase: Lemmas.
            most: How many of the commonest to look at.
        """
        senses = self.senses.get(phrase, ())[:most]
        found = [(rank, synset) for rank, synset in enumerate(senses) if synset >= 0]
        things = [(rank, synset) for rank, synset in found if self._fields[synset] != self._person]
        return things or found

    def synsets(self, phrase: str) -> list[int]:
        """Meanings of a phrase of lemmas that can be drawn, the commonest first."""
        return [synset for _, synset in self.meanings(phrase)]

    def is_compound(self, phrase: str) -> bool:
        """Whether words together are a fixed expression."""
        return phrase in self._compounds or (" " in phrase and phrase in self.senses)

    def is_noun(self, word: str) -> bool:
        """Whether a lemma commonly names a thing."""
        found = self.senses.get(word)
        return bool(found) and word not in self.adjectives

    def ancestors(self, synset: int) -> Iterator[tuple[int, int]]:
        """Kinds that a meaning belongs to, with their distance, the nearest first."""
        seen, level = {synset}, [synset]
        for depth in range(1, MAX_DEPTH + 1):
            level = [p for s in level for p in self._parents[s] if p not in seen]
            seen.update(level)
            yield from ((parent, depth) for parent in level)

    def descendants(self, synset: int) -> dict[int, int]:
        """Meanings of a kind with their distance; none of one that is too general."""
        found, level = {}, [synset]
        for depth in range(1, MAX_DEPTH + 1):
            level = [c for s in level for c in self._children.get(s, ()) if c not in found]
            found.update(dict.fromkeys(level, depth))
            if len(found) > MAX_KINDS:
                return {}
        return found

    def style(self, phrase: str) -> int | None:
        """Number of the look that a phrase names."""
        return self._styles.get(self.key(phrase.removesuffix(" style")))

    def looks(self, style: int) -> list[str]:
        """How people describe a look, its names included."""
        entry = self._data["styles"][style]
        return [entry["name"], *entry["names"], *entry["looks"]]

    def other_names(self, key: str) -> list[str]:
        """Other names of the same drawing."""
        return self._names.get(key, [])

    def drawings(self, key: str) -> list[str]:
        """Keys of the drawings that a keyword annotates."""
        return self._keywords.get(key, [])


@lru_cache(maxsize=1 << 16)
def _lemma(lexicon: Lexicon, word: str) -> str:
    word = re.sub(r"['\u2019]s?$", "", word)
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    forms = [word[:-1]]
    if word.endswith("ies"):
        forms.insert(0, word[:-3] + "y")
    elif word.endswith("ves"):
        forms += [word[:-3] + "f", word[:-3] + "fe"]
    elif word.endswith(("ches", "shes", "ses", "xes", "zes", "oes")):
        forms.append(word[:-2])
    for form in forms:
        if form in lexicon.senses or form in lexicon._words:
            return form
    return word if word in lexicon.senses else forms[0]


def read_data(name: str) -> Any:
    """Data that `scripts/build_lexicon.py` wrote."""
    return json.loads(gzip.decompress((DATA / f"{name}.json.gz").read_bytes()))


@lru_cache(maxsize=1)
def lexicon() -> Lexicon:
    """The shared lexicon, read when it is first needed."""
    return Lexicon(read_data("lexicon"))


def nearest_word(word: str, vocabulary: Sequence[str], last: bool = False) -> str | None:
    """The word that a misspelled one is meant to be.

    Args:
        word: A word that is no English word.
        vocabulary: Words that it may be.
        last: Whether it may be half typed; then the beginning of a word is nothing yet.

    Returns:
        The word at the least distance (Damerau and Levenshtein's), at most 1 up to six letters and
        2 above; None where there is none, or two.
    """
    from rapidfuzz import process
    from rapidfuzz.distance import DamerauLevenshtein

    if len(word) < 5 or not word.isalpha():
        return None
    if last and any(other.startswith(word) for other in vocabulary):
        return None
    limit = 1 if len(word) < 7 else 2
    found = process.extract(
        word, vocabulary, scorer=DamerauLevenshtein.distance, score_cutoff=limit, limit=2
    )
    if not found or (len(found) > 1 and found[0][1] == found[1][1]):
        return None
    return str(found[0][0])


def unique(items: Iterable[str]) -> list[str]:
    """Items in order, each once."""
    return list(dict.fromkeys(items))
