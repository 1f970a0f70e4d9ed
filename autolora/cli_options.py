"""What the commands of the shell share: exit statuses, options, completion, opening a pipeline."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autolora.errors import AutoLoRAError

if TYPE_CHECKING:
    from autolora.pipeline import AutoLoRAPipeline

FOUND_PROBLEMS = 1
"""A check found something, or a line of a batch failed."""
WRONG_INPUT = 2
"""Something that was asked for is not possible; one sentence on stderr says what."""
INTERRUPTED = 130
"""Ctrl-C."""

STRATEGIES = ("gated", "merged", "sum")
"""Names of the strategies for completion, which must not load torch; a test compares them."""


def examples(*lines: str) -> str:
    """Make the end of a help text from example command lines, which are not wrapped."""
    # The mark in front keeps the line breaks of what follows.
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])


def complete_models(incomplete: str) -> list[str]:
    """Complete the name of a base model, or a YAML file of the working folder."""
    from autolora.flux.config import shipped_configs

    files = (path.name for path in Path().glob("*.yaml"))
    return _starting(incomplete, (*shipped_configs(), *sorted(files)))


def complete_loras(context: typer.Context, incomplete: str) -> list[str]:
    """Complete the name of a LoRA in the pool that the command line names."""
    try:
        names = _starting(incomplete, _lora_names(context))
    except AutoLoRAError:
        # Nothing can be said in the middle of a line; the command itself will say it.
        return []
    # Shells quote what they are given, but for bash, and zsh's script mistakes these characters.
    names = [name for name in names if name.isprintable() and not set(name) & set("'\"\\")]
    if os.environ.get("_AUTOLORA_COMPLETE") != "complete_bash":
        return names
    return [re.sub(r"[^\w@%+=:,./-]", r"\\\g<0>", name) for name in names]


def complete_strategies(incomplete: str) -> list[str]:
    """Complete the name of a strategy."""
    return _starting(incomplete, STRATEGIES)


def _lora_names(context: typer.Context) -> Iterator[str]:
    from autolora.adapters import Pool
    from autolora.flux.config import load_config

    pool = context.params.get("pool")
    folder = Path(pool) if pool else load_config(context.params.get("model") or "tiny").pool
    yield from Pool(folder.expanduser()).names


def _starting(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME",
        envvar="AUTOLORA_MODEL",
        help="Base model, or a .yaml file of your own.",
        autocompletion=complete_models,
    ),
]
PoolFolder = Annotated[
    Path | None,
    typer.Option(
        "--pool",
        metavar="FOLDER",
        envvar="AUTOLORA_POOL",
        help="LoRAs to use, in place of the model's.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


def open_pipeline(model: str, pool: Path | None) -> AutoLoRAPipeline:
    """Make a pipeline for what the options say; nothing heavy is loaded yet.

    Raises:
        ConfigError: There is no such model.
    """
    from autolora.pipeline import AutoLoRAPipeline

    return AutoLoRAPipeline.from_config(model, pool)
