"""Reading a prompt: its words, what they ask for, and what they ask to leave out.

A LoRA draws a thing or a look; it does not draw a background colour. Content words are candidates,
alone and in short runs; colours, "background" and the chatter of quality words count only as part
of a longer run ("blue whale"), unless a colour's name stands as a thing of its own ("an orange").
Words behind "without", "no", "not" and their like are kept apart: what they name is never taken.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from autolora.retrieval.lexicon import lexicon, nearest_word

Role = Literal["stop", "modifier", "content"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_STOP = _words(
    "a an and are as at be been being by can could do does did for from has have had having her "
    "his i if in into is it its just me my of off on onto or our out over she shall should so "
    "some such than that the their them then there these they this those to too under up upon us "
    "very was we were what when where which while who whom whose will with would you your he him "
    "against behind beside between inside near next around above below through across along among "
    "during also about after before again once one two three four five six seven eight nine ten "
    "both each every few more most much many any all am been let lets hi hey hello thanks thank "
    "today nobody everybody everyone somebody someone nothing something anything it's i'm that's "
    "there's"
)
_ARTICLES = _words("a an one the two three four five")
_COLOURS = _words(
    "red orange yellow green blue purple violet pink brown black white gray grey cyan magenta teal "
    "turquoise beige maroon navy lime golden silver gold colored coloured colorful colourful"
)
_GENERIC = _words(
    "background backdrop picture pic image photo photograph photography drawing illustration "
    "painting painted drawn render rendered rendering style styled styling art artwork artistic "
    "view scene simple plain solid light dark bright pale small big large little tiny huge "
    "beautiful nice good great best detailed detail details quality high masterpiece centered "
    "single clean generate create draw make made making show shown showing please want like look "
    "looking looks something thing kind sort version way depicting depicted featuring called "
    "named using use used highly ultra extremely super hd uhd fhd hdr hires highres lowres "
    "absurdres res resolution 4k 8k 2k 16k score rating safe source trending artstation "
    "deviantart pixiv sharp focus cinematic professional award winning intricate elegant smooth "
    "digital concept depth field aesthetic volumetric lighting bokeh mm lens dslr canon nikon "
    "sony unreal engine octane ray tracing composition wide angle shot closeup macro hour perfect "
    "stunning amazing awesome epic realistic photorealistic realism hyperrealistic photoreal "
    "vivid vibrant muted palette contrast studio trend popular official wallpaper poster cover "
    "masterful exquisite gorgeous pretty cute lovely fine soft rich dramatic dynamic moody "
    "atmosphere atmospheric person people someone front back side left right top bottom middle "
    "center centre foreground set standing sitting lying playing walking running holding wearing "
    "old new young half full pair piece bunch lot"
)
_NOT = _words(
    "without no not never non except excluding minus avoid neither nor sans lacking exclude remove"
)
_NOT_PAIRS = {
    ("instead", "of"), ("rather", "than"), ("anything", "but"), ("everything", "but"),
    ("free", "of"), ("other", "than"), ("leave", "out"), ("leaving", "out"), ("w", "o"),
}  # fmt: skip
_VERBS_NOT = re.compile(
    r"\b(is|are|was|were|do|does|did|has|have|had|should|must|would|can|could|will|ca|wo)n['\u2019]?t\b"
)
_ENDS_NOT = _words("but just only however yet instead rather")
_PREPOSITIONS = _words(
    "on in at under behind beside between inside near next over with by from during around above "
    "below through across along against into onto while before after as"
)
_PRONOUNS = _words("i you he she we they it who")
_BREAK = "\n"
_TOKEN = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*|[,.;:!?()\[\]{}|/\"]|\n", re.UNICODE)
_SPOKEN = re.compile(r"\b(\d+)[\s-]?bits?\b")
MAX_RUN = 3
MAX_CLAUSE = 9
MAX_CONCEPTS = 64


@dataclass(frozen=True)
class Word:
    """A word of a prompt.

    Attributes:
        text: As written, in lower case.
        stem: Its singular, which words are compared by; of a misspelled word what is meant.
        role: ``content`` may be a concept alone, ``modifier`` only with others, ``stop`` never.
        negated: Whether the prompt asks to leave it out.
        verb: Whether it stands where only a verb can ("I rose").
        unknown: Whether it is no English word, and none that is meant was found.
    """

    text: str
    stem: str
    role: Role
    negated: bool = False
    verb: bool = False
    unknown: bool = False


@dataclass(frozen=True)
class Concept:
    """A run of words that may name a LoRA.

    Attributes:
        text: The words.
        covers: Positions of its content words in the prompt.
        start: Position of its first word.
        end: Position behind its last word.
        negated: Whether the prompt asks to leave it out.
    """

    text: str
    covers: tuple[int, ...]
    start: int = 0
    end: int = 0
    negated: bool = False


def stem(word: str) -> str:
    """The singular of an English word; titles and prompts get the same treatment.

    Args:
        word: In lower case.
    """
    return lexicon().lemma(word)


def stems(text: str) -> tuple[str, ...]:
    """Stems of all words of a text, stop words included."""
    return tuple(stem(token) for token in _TOKEN.findall(_plain(text)) if token[0].isalnum())


def _plain(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).lower()
    text = _SPOKEN.sub(r"\1 bit", text)
    return text.replace("-", " ").replace("_", " ")


def read_words(prompt: str, vocabulary: Sequence[str] = (), negated: bool = False) -> list[Word]:
    """Words of a prompt with their roles.

    Args:
        prompt: Any text.
        vocabulary: Words that a misspelled one may be meant to be.
        negated: Whether all of it is to be left out, as of a negative prompt.

    Returns:
        The words in order, with a stop word for each punctuation mark.
    """
    text = unicodedata.normalize("NFKC", prompt).lower()
    text = re.sub(r":\d+(\.\d+)?(?=\s*[)\],]|$)", " ", text)  # weights such as (cat:1.2)
    text = _VERBS_NOT.sub(" not ", text)
    text = re.sub(r"\bw/o\b", "without", text)
    text = re.sub(r"([^\W_]+(?:[-\s][^\W_]+)?)-free\b", r", without \1 ,", text)
    tokens = _TOKEN.findall(_plain(re.sub(r"\bnon-?(?=[a-z]{4})", "non ", text)))
    words: list[Word] = []
    for position, token in enumerate(tokens):
        if not token[0].isalnum():
            words.append(Word(_BREAK, _BREAK, "stop"))
            continue
        before = tokens[position - 1] if position else ""
        after = tokens[position + 1] if position + 1 < len(tokens) else _BREAK
        words.append(_word(token, before, after, vocabulary, position + 1 == len(tokens)))
    words = [replace(w, verb=_is_verb(words, i)) for i, w in enumerate(words)]
    left_out = set(range(len(words))) if negated else _left_out(words)
    return [replace(w, negated=True) if i in left_out else w for i, w in enumerate(words)]


def _word(token: str, before: str, after: str, vocabulary: Sequence[str], last: bool) -> Word:
    role = _role(token, before, after)
    known = lexicon()
    base = known.lemma(token)
    if role == "stop" or known.is_word(token) or base in vocabulary:
        return Word(token, base, role)
    meant = nearest_word(base, vocabulary, last) or nearest_word(token, vocabulary, last)
    return Word(token, meant or base, role, unknown=meant is None)


def _role(token: str, before: str, after: str) -> Role:
    if token in _STOP or token in _NOT or token.isdigit() or len(token) == 1:
        return "stop"
    if token in _COLOURS or stem(token) in _COLOURS:
        ends = not after[0].isalnum() or after in _STOP
        # "an orange" is a thing; "an orange cat" and "in orange" are not.
        return "content" if ends and before in _ARTICLES else "modifier"
    return "modifier" if token in _GENERIC or stem(token) in _GENERIC else "content"


def _is_verb(words: Sequence[Word], at: int) -> bool:
    """Whether a word that may be a noun stands where only a verb can."""
    word = words[at]
    known = lexicon()
    if word.role == "stop" or at == 0:
        return False
    before, after = words[at - 1], words[at + 1] if at + 1 < len(words) else Word("", "", "stop")
    may = word.stem in known.verbs or word.text in _PAST_NOUNS
    if may and before.text in _PRONOUNS:
        return True
    # "prices rose sharply", "temperatures rose above": a plural, then no noun.
    plural = before.role != "stop" and before.text.endswith("s") and before.text != before.stem
    follows = after.text.endswith("ly") or after.text in _PREPOSITIONS or after.text == "to"
    return word.text in _PAST_NOUNS and follows and (plural or before.text in _WHO_ROSE)


_PAST_NOUNS = _words("rose saw felt ground wound bore left found dove stole shed bit spoke wove")
_WHO_ROSE = _words("sun moon price level water smoke steam tide river temperature")


def _left_out(words: Sequence[Word]) -> set[int]:
    """Positions of what stands behind a negation, up to the end of its clause."""
    found: set[int] = set()
    for at, word in enumerate(words):
        after = words[at + 1].text if at + 1 < len(words) else ""
        pair = (word.text, after) in _NOT_PAIRS
        if not (pair or word.text in _NOT) or (word.text == "not" and after == "only"):
            continue
        if word.text == "non":
            found.add(at + 1)
            continue
        start = at + 2 if pair or (word.text == "except" and after == "for") else at + 1
        found.update(_scope(words, start))
    return found


def _scope(words: Sequence[Word], start: int) -> list[int]:
    scope: list[int] = []
    named = False
    for at in range(start, len(words)):
        text = words[at].text
        after = words[at + 1].text if at + 1 < len(words) else ""
        if text == _BREAK or text in _ENDS_NOT or (text in _NOT and named):
            break
        if named and (text in _PREPOSITIONS or (text == "and" and after in _ARTICLES)):
            break
        scope.append(at)
        named = named or words[at].role == "content"
    return scope


def find_concepts(words: Sequence[Word]) -> list[Concept]:
    """Runs of words that may name a LoRA.

    Args:
        words: Words of a prompt.

    Returns:
        Runs of at most `MAX_RUN` words that no stop word parts, with at least one content word,
        single words first, then whole clauses of at most `MAX_CLAUSE` words; at most
        `MAX_CONCEPTS`.
    """
    found: dict[tuple[str, bool], Concept] = {}

    def add(start: int, end: int) -> None:
        run = words[start:end]
        said = [start + i for i, word in enumerate(run) if word.role == "content"]
        covers = tuple(said or (start + i for i, word in enumerate(run) if word.role != "stop"))
        negated = run[0].negated
        text = " ".join(_spelled(word) for word in run if not word.verb)
        found.setdefault((text, negated), Concept(text, covers, start, end, negated))

    for length in range(1, MAX_RUN + 1):
        for start in range(len(words) - length + 1):
            run = words[start : start + length]
            if any(word.role == "stop" for word in run) or _mixed(run):
                continue
            if all(word.role != "content" for word in run) and length == 1:
                continue
            if any(word.stem in ("background", "backdrop") for word in run):
                continue
            if any(word.verb for word in run):
                continue
            add(start, start + length)
    for start, end in _clauses(words):
        add(start, end)
    return list(found.values())[:MAX_CONCEPTS]


def _spelled(word: Word) -> str:
    """A word as it is meant: as written unless it was misspelled."""
    return word.text if word.unknown or stem(word.text) == word.stem else word.stem


def _mixed(run: Sequence[Word]) -> bool:
    return len({word.negated for word in run}) > 1


def _clauses(words: Sequence[Word]) -> list[tuple[int, int]]:
    """Stretches between punctuation that are short enough to describe one thing."""
    found, start = [], 0
    for at in range(len(words) + 1):
        ends = at == len(words) or words[at].text == _BREAK
        if not ends and at > start and words[at].negated == words[start].negated:
            continue
        if not ends and at == start:
            continue
        first = start
        while first < at and words[first].text in _STOP:
            first += 1
        said = [word for word in words[first:at] if word.role != "stop"]
        if len(said) >= 2 and at - first <= MAX_CLAUSE and not _mixed(words[first:at]):
            found.append((first, at))
        start = at + 1 if ends else at
    return found
