"""Prompts of other languages in English, word by word, for text encoders that know only English.

Words are those by which the Unicode CLDR annotates drawings, colours, looks and some hundred
everyday words; see `scripts/build_lexicon.py`. Grammar is left out, as in the lists of words that
people type for pictures anyway: "eine Katze ohne Neon" becomes "cat, without neon".
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from autolora.retrieval.lexicon import lexicon, read_data

_SCRIPTS = (
    ("ja", "\u3040", "\u30ff"),
    ("ko", "\uac00", "\ud7a3"),
    ("zh", "\u4e00", "\u9fff"),
    ("ru", "\u0400", "\u04ff"),
    ("ar", "\u0600", "\u06ff"),
    ("he", "\u0590", "\u05ff"),
    ("hi", "\u0900", "\u097f"),
    ("th", "\u0e00", "\u0e7f"),
    ("el", "\u0370", "\u03ff"),
)
_UNSPACED = ("zh", "ja", "ko", "th")
_STEMMERS = {
    "de": "german", "fr": "french", "es": "spanish", "it": "italian", "pt": "portuguese",
    "nl": "dutch", "ru": "russian", "sv": "swedish", "da": "danish", "fi": "finnish",
    "hu": "hungarian", "ro": "romanian", "tr": "turkish",
}  # fmt: skip
_LONGEST = 8  # characters of a word of a language without spaces, words of one with them: 3
_SMALL = "a an the of in on at by to is it and or with for from as no not i my"
_ENGLISH = frozenset(_SMALL.split())
_NOTHING = (
    "Nothing in this prompt is understood; write it in English, or use a base model whose text "
    "encoder knows the language."
)
_SOME = "Not understood: {}."


@dataclass(frozen=True)
class Understood:
    """A prompt in English.

    Attributes:
        text: English; the prompt itself where it is English already.
        language: ISO 639 code of the prompt's language.
        unknown: Words that are not understood, as written.
    """

    text: str
    language: str = "en"
    unknown: tuple[str, ...] = ()

    @property
    def problem(self) -> str:
        """What is not understood, as a sentence in the prompt's language; empty when all is."""
        if not self.unknown:
            return ""
        data = _languages().get(self.language, {})
        if self.text:
            return str(data.get("some", _SOME)).format(", ".join(self.unknown[:8]))
        return str(data.get("nothing", _NOTHING))


@lru_cache(maxsize=1)
def _languages() -> dict[str, dict[str, Any]]:
    """Words of each language, read when a prompt is first not English."""
    found: dict[str, dict[str, Any]] = read_data("languages")
    for data in found.values():
        data["stop"] = frozenset(data.get("stop", ()))
        data["not"] = frozenset(data.get("not", ()))
        data["after"] = frozenset(data.get("after", ()))
    return found


@lru_cache(maxsize=32)
def _stemmed(language: str) -> tuple[Any, dict[str, str]]:
    """The stemmer of a language, and English by the stem of its single words."""
    import snowballstemmer

    stem = snowballstemmer.stemmer(_STEMMERS[language]).stemWord
    words = _languages()[language]["words"]
    # Of several words with one stem the shortest counts: a garden, and not what sits down.
    ordered = sorted((word for word in words if " " not in word), key=len, reverse=True)
    return stem, {stem(word): words[word] for word in ordered}


@lru_cache(maxsize=256)
def understand(prompt: str) -> Understood:
    """Put a prompt into English.

    Args:
        prompt: In any language.

    Returns:
        The prompt in English, and what of it is not understood. An English prompt is left as it
        is, and so is one of a language that is not known where its letters are Latin.
    """
    text = unicodedata.normalize("NFKC", prompt)
    language = _language(text)
    if language == "en":
        return Understood(prompt)
    pieces, unknown = _translate(text, language)
    return Understood(", ".join(pieces), language, tuple(dict.fromkeys(unknown)))


def _language(text: str) -> str:
    for language, first, last in _SCRIPTS:
        if any(first <= char <= last for char in text):
            if language == "ru" and any(char in "іїєґІЇЄҐ" for char in text):
                return "uk"
            return language
    tokens = _tokens(text)
    strange = [token for token in tokens if token not in _ENGLISH and not lexicon().is_word(token)]
    strange = [token for token in strange if len(token) > 1 and not token[0].isdigit()]
    if not strange:
        return "en"
    best, most = "en", sum(token not in strange for token in tokens)
    for language, data in _languages().items():
        if language in dict.fromkeys(code for code, _, _ in _SCRIPTS) or language == "uk":
            continue
        words = data["words"].keys() | data["stop"] | data["not"]
        if not any(token in words for token in strange):
            continue
        count = sum(token in words for token in tokens)
        if count < len(tokens) and language in _STEMMERS:
            stem, stems = _stemmed(language)
            count += sum(token not in words and stem(token) in stems for token in tokens)
        # One short word by chance says nothing of a language.
        if count > most and (count > 1 or len(tokens[0]) > 3):
            best, most = language, count
    return best


def _tokens(text: str) -> list[str]:
    return re.findall(
        r"[^\W_]+|[,.;:!?\uff0c\u3002\uff1b\uff1a\uff01\uff1f\u3001]",
        text.lower().replace("-", " "),
    )


def _translate(text: str, language: str) -> tuple[list[str], list[str]]:
    """Pieces of English between commas, and words that are not understood."""
    data = _languages().get(language, {"words": {}, "stop": (), "not": (), "after": ()})
    pieces: list[str] = []
    unknown: list[str] = []
    joined = negated = False
    parts = _split_unspaced(text, data) if language in _UNSPACED else _split(text, language, data)
    for said, english in parts:
        if said in data["not"]:
            negated, joined = True, False
        elif said in data["after"]:
            if pieces:
                pieces[-1] = f"without {pieces[-1]}"
            joined = False
        elif said in data["stop"] or not said[0].isalnum():
            joined = False
            negated = negated and said[0].isalnum()
        elif english is None:
            unknown.append(said)
            joined = False
        else:
            word = f"without {english}" if negated else english
            if joined and pieces:
                pieces[-1] += f" {word}"
            else:
                pieces.append(word)
            joined, negated = True, False
    return pieces, unknown


def _split(text: str, language: str, data: dict[str, Any]) -> Iterator[tuple[str, str | None]]:
    """Words or short phrases with their English; None where it is not known."""
    tokens = _tokens(text)
    words = data["words"]
    stem, stems = _stemmed(language) if language in _STEMMERS else (str, {})
    at = 0
    while at < len(tokens):
        for size in (3, 2, 1):
            said = " ".join(tokens[at : at + size])
            known = size == 1 and (said in data["stop"] or said in data["not"])
            if known or said in words or not said[0].isalnum():
                break
        size = 1 if not said[0].isalnum() else size
        said = " ".join(tokens[at : at + size])
        english = words.get(said) or stems.get(stem(said))
        if english is None and (said.isdigit() or (said.isascii() and lexicon().is_word(said))):
            english = said
        yield said, english
        at += size


def _split_unspaced(text: str, data: dict[str, Any]) -> Iterator[tuple[str, str | None]]:
    """The same for a language without spaces: the longest known word at each place."""
    words, others = data["words"], data["stop"] | data["not"] | data["after"]
    at, strange = 0, ""
    text = text.lower()
    while at < len(text):
        latin = re.match(r"[a-z0-9][a-z0-9 -]*", text[at:])
        size = len(latin[0]) if latin else 0
        for length in range(_LONGEST, 0, -1) if not latin else ():
            if text[at : at + length] in words or text[at : at + length] in others:
                size = length
                break
        char = text[at]
        if strange and (size or not char.isalnum()):
            yield strange, None
            strange = ""
        if size:
            said = text[at : at + size]
            yield said, said.strip() if latin else words.get(said)
        elif char.isalnum():
            strange += char
        elif not char.isspace():
            yield char, None
        at += size or 1
    if strange:
        yield strange, None
