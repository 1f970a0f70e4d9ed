"""What people call the subjects, and how they count them."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import yaml

from train.tiny_world.subjects import Subject

_FILE = Path(__file__).with_name("vocabulary.yaml")
_IRREGULAR = {
    "mouse": "mice", "sheep": "sheep", "fish": "fish", "foot": "feet", "tooth": "teeth",
    "ox": "oxen",
    "wolf": "wolves", "leaf": "leaves", "knife": "knives", "die": "dice", "loaf": "loaves",
    "bison": "bison", "deer": "deer", "squid": "squid", "shrimp": "shrimp", "potato": "potatoes",
    "tomato": "tomatoes", "mango": "mangoes", "broccoli": "broccoli", "bread": "breads",
    "clownfish": "clownfish", "scarf": "scarves", "cactus": "cacti", "octopus": "octopuses",
    "hippopotamus": "hippopotamuses", "ladybird": "ladybirds", "popcorn": "popcorn",
}  # fmt: skip
_NUMBERS = {2: ("two", "2", "a pair of", "a couple of"), 3: ("three", "3")}


@lru_cache(maxsize=1)
def _groups() -> dict[str, dict[str, list[str]]]:
    groups: dict[str, dict[str, list[str]]] = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
    return groups


def group_names(group: str) -> tuple[str, ...]:
    """Unicode names of the subjects of a group: ``base`` or ``loras``."""
    return tuple(_groups()[group])


def names(subject: Subject) -> tuple[str, ...]:
    """What people call a subject, the commonest first."""
    for group in _groups().values():
        if subject.name in group:
            return tuple(group[subject.name])
    return (subject.name,)


def say(subject: Subject, rng: np.random.Generator) -> str:
    """One of a subject's names: the commonest for two of three."""
    known = names(subject)
    return known[0] if len(known) == 1 or rng.random() < 0.65 else str(rng.choice(known[1:]))


def article(word: str) -> str:
    """The indefinite article that a word takes."""
    odd = ("uni", "uk", "eu", "one-", "ufo")
    return "an" if word[:1] in "aeiou" and not word.startswith(odd) else "a"


def is_plural(name: str) -> bool:
    """Whether a name is already a plural, or a mass noun that takes no article."""
    last = name.split()[-1]
    mass = {
        "broccoli",
        "popcorn",
        "garlic",
        "fireworks",
        "curry",
        "cheese",
        "bread",
        "yarn",
        "milk",
    }
    return last in mass or (last.endswith("s") and not last.endswith(("ss", "us", "is", "ch")))


def with_article(name: str) -> str:
    """The name with its indefinite article, if it takes one."""
    return name if is_plural(name) else f"{article(name)} {name}"


def plural(name: str) -> str:
    """The plural of a name: of its head noun where it is "X of Y", else of its last word."""
    if is_plural(name):
        return name
    head, of, rest = name.partition(" of ")
    words = head.split(" ")
    words[-1] = _plural_word(words[-1])
    return " ".join(words) + of + rest


def _plural_word(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"


def several(count: int, name: str, rng: np.random.Generator) -> str:
    """Two or three of a thing, as people say it."""
    return f"{rng.choice(_NUMBERS[count])} {plural(name)}"
