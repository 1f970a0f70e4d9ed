"""The text that A1111 and Forge write into pictures, and that many programs read.

It is the prompt, a line ``Negative prompt: ...`` where there is one, and one line of settings
``Steps: 20, Sampler: Euler, ...``. A value with a comma, colon or line break is a JSON string
(A1111, ``modules/infotext_utils.py``). LoRAs stand twice: as ``<lora:name:strength>`` after the
prompt, and with hashes in the setting ``Lora hashes``: 12 digits of the SHA-256 of a safetensors
file's data, which stays the same when somebody edits its header, and which Civitai knows as AutoV3.
Nothing here needs torch.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autolora.generation.report import Report

CHUNK = "parameters"
LORA_HASH_DIGITS = 12
MODEL_HASH_DIGITS = 10

_NEGATIVE = "Negative prompt:"
# A1111's pattern with a bound on names, without which a long line takes its square in time.
_SETTING = re.compile(r'(\w[\w \-/]{1,100}):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_FEWEST_SETTINGS = 3  # with fewer, A1111 takes the last line for a part of the prompt
_NOT_IN_NAMES = re.compile(r'[:,<>"\\\s]+')


@dataclass(frozen=True)
class Parameters:
    """What such a text says.

    Attributes:
        prompt: The prompt with its tags.
        negative_prompt: What the picture shall not show.
        settings: The settings as text, by name.
    """

    prompt: str
    negative_prompt: str = ""
    settings: dict[str, str] = field(default_factory=dict)


def write_parameters(report: Report) -> str:
    """Write a report as A1111 writes generation parameters.

    Args:
        report: The facts of a picture.

    Returns:
        The text, in at least two lines.
    """
    tags = "".join(f" <lora:{_plain(lora.name)}:{lora.strength:g}>" for lora in report.adapters)
    # A model with embedded guidance has the usual scale beside it, 1 where it is turned off.
    embedded = report.true_cfg is not None
    base = report.base
    settings = {
        "Steps": report.steps,
        "Sampler": "Euler",
        "Schedule type": "Simple",
        "CFG scale": f"{report.true_cfg if embedded else report.guidance:g}",
        "Distilled CFG Scale": f"{report.guidance:g}" if embedded else None,
        "Seed": report.seed,
        "Size": f"{report.width}x{report.height}",
        "Model hash": None if base is None else base.checkpoint_sha256[:MODEL_HASH_DIGITS] or None,
        "Model": report.model,
        "RNG": "CPU",
        "Lora hashes": _lora_hashes(report),
        "Version": f"AutoLoRA {report.versions.get('autolora', '')}".strip(),
    }
    lines = [_guard(report.used_prompt) + tags]
    if report.negative_prompt:
        lines.append(f"{_NEGATIVE} {_guard(report.negative_prompt)}")
    known = ((name, value) for name, value in settings.items() if value is not None)
    lines.append(", ".join(f"{name}: {_quote(str(value))}" for name, value in known))
    return "\n".join(lines)


def read_parameters(text: str) -> Parameters:
    """Read generation parameters as A1111 does, whoever wrote them.

    Args:
        text: A picture's ``parameters``.

    Returns:
        Prompts and settings; a text without settings is all prompt.
    """
    *lines, last = text.strip().split("\n")
    pairs = _SETTING.findall(last)
    if len(pairs) < _FEWEST_SETTINGS:
        lines, pairs = [*lines, last], []
    parts: tuple[list[str], list[str]] = ([], [])
    negative = False
    for line in (line.strip() for line in lines):
        negative = negative or line.startswith(_NEGATIVE)
        parts[negative].append(line.removeprefix(_NEGATIVE).strip() if negative else line)
    # Blank lines count between others only.
    prompt, negative_prompt = ("\n".join(part).lstrip("\n") for part in parts)
    return Parameters(prompt, negative_prompt, {name: _unquote(value) for name, value in pairs})


def _lora_hashes(report: Report) -> str | None:
    pairs = [
        f"{_plain(lora.name)}: {lora.data_sha256[:LORA_HASH_DIGITS]}"
        for lora in report.adapters
        if lora.data_sha256
    ]
    return ", ".join(pairs) or None


def _plain(name: str) -> str:
    """Take out of a name what ends a tag or a pair; A1111 has no way to escape it."""
    kept = "".join(char if char.isprintable() else " " for char in name)
    return _NOT_IN_NAMES.sub(" ", kept).strip()


def _guard(text: str) -> str:
    """Keep a line of a prompt from being read as the beginning of the negative prompt."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return "\n".join(re.sub(r"^(\s*Negative prompt):", r"\1 :", line) for line in lines)


def _quote(value: str) -> str:
    if not re.search(r"[,:\n]", value):
        return value
    return json.dumps(value, ensure_ascii=False)


def _unquote(value: str) -> str:
    if len(value) < 2 or value[0] != '"' or value[-1] != '"':
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value
