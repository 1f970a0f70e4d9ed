"""``autolora generate --stdin``: a prompt or a JSON object per line, a JSON object per picture.

Lines are read, drawn and answered one by one, so that another program can talk to it. What is wrong
in one line is said in the answer to that line; the others go on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any

from autolora.cli_jobs import Job, draw, read_seeds
from autolora.cli_view import IndexBar
from autolora.errors import AutoLoRAError, GenerationError, shown

if TYPE_CHECKING:
    from autolora.pipeline import AutoLoRAPipeline

KEYS: Mapping[str, tuple[type, ...]] = {
    "prompt": (str,),
    "seed": (int, str),
    "count": (int,),
    "batch": (int,),
    "steps": (int,),
    "size": (str,),
    "guidance": (Real,),
    "negative": (str,),
    "loras": (list,),
    "top_k": (int,),
    "strategy": (str,),
    "retrieve": (bool,),
    "triggers": (bool,),
    "text_encoders": (bool,),
    "out": (str,),
}
"""What a line's JSON object may say, as the options of the command do."""
_RENAMED = {"negative": "negative_prompt", "triggers": "use_triggers"}
_NOT_PASSED_ON = ("prompt", "seed", "count", "batch", "out")


def run_batch(
    pipe: AutoLoRAPipeline,
    lines: Iterable[str],
    options: Mapping[str, Any],
    seeds: Sequence[int],
    batch: int,
    out: str | None,
) -> int:
    """Draw what lines ask for and print a JSON object per picture or failed line.

    Args:
        pipe: The pipeline.
        lines: Prompts or JSON objects; empty lines are passed over.
        options: For the call of the pipeline; a line's own win.
        seeds: Of lines that name none.
        batch: How many pictures of a line to draw at once, for lines that say nothing.
        out: What ``--out`` says, for lines that say nothing.

    Returns:
        How many lines failed.
    """
    failed = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            job = read_line(line, options, seeds, batch, out)
            job.check(pipe)
            if job.retrieves:
                with IndexBar() as bar:
                    pipe.open_index(bar.update)
            draw(pipe, job, True, partial(_answer, number))
        except AutoLoRAError as error:
            failed += 1
            _answer(number, {"error": str(error)})
    return failed


def read_line(
    line: str, options: Mapping[str, Any], seeds: Sequence[int], batch: int, out: str | None
) -> Job:
    """Read one line.

    Args:
        line: A prompt, or a JSON object with keys of `KEYS`.
        options: For the call of the pipeline; the line's own win.
        seeds: Where the line names none.
        batch: Where the line says nothing, like `out`.
        out: A file or folder.

    Returns:
        The line's pictures.

    Raises:
        GenerationError: Something in the line is wrong.
    """
    text = line.removeprefix("\ufeff").strip()
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise GenerationError("The line is not valid UTF-8.")
    wishes: dict[str, Any] = _read_object(text) if text.startswith("{") else {"prompt": text}
    prompt = wishes["prompt"]
    named = [str(wishes["seed"])] if "seed" in wishes else []
    numbers = read_seeds(named, wishes.get("count")) or seeds or [0]
    merged = {**options, **_call_options(wishes)}
    return Job(prompt, numbers, wishes.get("out", out), merged, wishes.get("batch", batch))


def _read_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GenerationError(f"The line is not valid JSON: {shown(error)}.") from error
    for key, value in found.items():
        if key not in KEYS:
            close = get_close_matches(key, KEYS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(KEYS)}."
            raise GenerationError(f"Unknown key {shown(key, 60)!r}; {hint}")
        wrong_bool = isinstance(value, bool) and bool not in KEYS[key]
        if wrong_bool or not isinstance(value, KEYS[key]):
            kinds = " or ".join(_WORDS[kind] for kind in KEYS[key])
            raise GenerationError(f"{key} must be {kinds}, not {shown(json.dumps(value), 60)}.")
    if "prompt" not in found:
        raise GenerationError("The line's object has no prompt.")
    return dict(found)


_WORDS = {
    str: "text",
    int: "a whole number",
    Real: "a number",
    bool: "true or false",
    list: "a list",
}


def _call_options(wishes: Mapping[str, Any]) -> dict[str, Any]:
    from autolora.generation.prompts import parse_lora
    from autolora.generation.request import parse_size

    options = {
        _RENAMED.get(key, key): value for key, value in wishes.items() if key not in _NOT_PASSED_ON
    }
    if "size" in options:
        options["size"] = parse_size(options["size"])
    if "loras" in options:
        if not all(isinstance(entry, str) for entry in options["loras"]):
            raise GenerationError('loras must be a list of texts such as "neon:0.8".')
        options["loras"] = [parse_lora(entry) for entry in options["loras"]]
    return options


def _answer(number: int, facts: Mapping[str, Any]) -> None:
    answer = {"line": number, **facts}
    print(json.dumps(answer, ensure_ascii=False, default=str), flush=True)
