"""Generation parameters as text: what A1111 and Forge write into pictures and people copy about.

It is the prompt, a line ``Negative prompt: ...`` where there is one, and one line of settings
``Steps: 20, Sampler: Euler, ...``. A value with a comma, colon or line break is a JSON string
(A1111, ``modules/infotext_utils.py``); Civitai puts whole JSON lists and objects there unquoted.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

NEGATIVE = "Negative prompt:"
# A1111's pattern with a bound on names, without which a long line takes its square in time.
_KEY = re.compile(r"(\w[\w \-/]{1,100}):\s*")
_QUOTED = re.compile(r'"(?:\\.|[^\\"])+"(?=\s*(?:,|$))')
_FEWEST_SETTINGS = 3  # with fewer, A1111 takes the last line for a part of the prompt
_DECODER = json.JSONDecoder()

_COPIED = ("Steps", "Sampler", "Schedule type", "CFG scale", "Distilled CFG Scale", "Seed", "Size")
_COPIED_START = re.compile(rf"(?:^|(?<=[\s,.]))(?:{'|'.join(_COPIED)}):[ \t]*\S")
_MAX_STARTS = 32


@dataclass(frozen=True)
class Parameters:
    """What such a text says.

    Attributes:
        prompt: The prompt with its tags.
        negative_prompt: What the picture should not show.
        settings: The settings as text, by name.
    """

    prompt: str
    negative_prompt: str = ""
    settings: dict[str, str] = field(default_factory=dict)


def read_parameters(text: str) -> Parameters:
    """Read generation parameters as A1111 does, whoever wrote them.

    Args:
        text: A picture's ``parameters``.

    Returns:
        Prompts and settings; a text without settings is all prompt.
    """
    *lines, last = text.strip().split("\n")
    pairs = read_settings(last)
    if len(pairs) < _FEWEST_SETTINGS:
        lines, pairs = [*lines, last], []
    return Parameters(*_split("\n".join(lines)), dict(pairs))


def read_settings(line: str) -> list[tuple[str, str]]:
    """Read a line of settings.

    Args:
        line: ``Name: value`` with commas between; a value may be a JSON string, list or object.

    Returns:
        Names and values as text, strings without their quotes; what is no setting is passed over.
    """
    pairs = []
    position = 0
    while found := _KEY.search(line, position):
        value, position = _value(line, found.end())
        pairs.append((found.group(1), value))
    return pairs


def copied_parameters(text: str) -> Parameters | None:
    """Find generation parameters that somebody pasted into a prompt.

    Text boxes and chat programs join lines, so that settings may stand anywhere at the end.

    Args:
        text: A prompt as it was typed.

    Returns:
        Prompts and settings, or None where there are no steps among settings at its end.
    """
    for count, found in enumerate(_COPIED_START.finditer(text)):
        if count == _MAX_STARTS:
            break
        settings = dict(read_settings(" ".join(text[found.start() :].split("\n"))))
        if "Steps" in settings and sum(name in settings for name in _COPIED) > 1:
            return Parameters(*_split(text[: found.start()], anywhere=True), settings)
    return None


def _split(text: str, anywhere: bool = False) -> tuple[str, str]:
    """Part a prompt from the negative one; blank lines count between others only."""
    if anywhere:
        prompt, _, negative = text.partition(NEGATIVE)
        return prompt.strip(), negative.strip()
    parts: tuple[list[str], list[str]] = ([], [])
    negated = False
    for line in (line.strip() for line in text.split("\n")):
        negated = negated or line.startswith(NEGATIVE)
        parts[negated].append(line.removeprefix(NEGATIVE).strip() if negated else line)
    return "\n".join(parts[0]).lstrip("\n"), "\n".join(parts[1]).lstrip("\n")


def _value(line: str, start: int) -> tuple[str, int]:
    """Read the value at a position; return it with where the next setting may begin."""
    if quoted := _QUOTED.match(line, start):
        return _unquote(quoted.group()), quoted.end()
    if line[start : start + 1] in ("{", "["):
        try:
            _, end = _DECODER.raw_decode(line, start)
            return line[start:end], end
        except (ValueError, RecursionError):
            pass
    comma = line.find(",", start)
    end = len(line) if comma < 0 else comma
    return line[start:end], end


def _unquote(value: str) -> str:
    try:
        return str(json.loads(value))
    except ValueError:
        return value


def quote(value: str) -> str:
    """Write a value of a setting."""
    if not re.search(r"[,:\n]", value):
        return value
    return json.dumps(value, ensure_ascii=False)


def guard(text: str) -> str:
    """Keep a line of a prompt from being read as the beginning of the negative prompt."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return "\n".join(re.sub(r"^(\s*Negative prompt):", r"\1 :", line) for line in lines)


def json_value(text: object) -> Any:
    """Decode a setting that is a JSON list or object; None where it is none."""
    try:
        found = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, (list, dict)) else None
