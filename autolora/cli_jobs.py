"""One picture of the command ``generate``: checked, drawn, saved."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from autolora.cli_options import open_pipeline
from autolora.cli_view import PictureView
from autolora.errors import ConfigError, GenerationError, shown

if TYPE_CHECKING:
    from autolora.generation.report import Report
    from autolora.pipeline import AutoLoRAPipeline

MAX_COUNT = 10_000
"""Most pictures of one command."""
MAX_RANDOM_SEED = 2**32 - 1
"""Largest seed that is drawn at random, as other programs take no larger ones."""
_RANGE = re.compile(r"([0-9]{1,19})(?:-|\.\.)([0-9]{1,19})")
_CHECKED = ("steps", "size", "guidance", "top_k", "negative_prompt")


@dataclass
class Job:
    """A picture to draw.

    Attributes:
        prompt: Its prompt.
        seed: Its seed.
        target: The file to write; another name is taken where that is there.
        options: More for the call of the pipeline.
        recorded: Report of the picture that it repeats exactly.
        notes: What differs from that.
    """

    prompt: str
    seed: int
    target: Path
    options: dict[str, Any]
    recorded: Report | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def retrieves(self) -> bool:
        """Whether the pool is searched."""
        return bool(self.options.get("retrieve", True))

    def check(self, pipe: AutoLoRAPipeline) -> None:
        """Find what is wrong before anything slow begins.

        Raises:
            AutoLoRAError: Something that was asked for is not possible.
        """
        from autolora.generation.request import make_request

        options = {name: self.options[name] for name in _CHECKED if name in self.options}
        request = make_request(pipe.config, self.prompt, seed=self.seed, **options)
        for entry in (*self.options.get("loras", ()), *request.tags):
            pipe.pool.entry(entry.name)


def draw(pipe: AutoLoRAPipeline, job: Job, quiet: bool, first: bool) -> dict[str, Any]:
    """Make and save one picture, print its path, and return its facts.

    Args:
        pipe: The pipeline.
        job: The picture.
        quiet: Whether to print nothing but the bar.
        first: Whether to show what was chosen.
    """
    from autolora.generation.repeat import restore_facts

    with PictureView(quiet=quiet, first=first) as view:
        output = pipe(job.prompt, job.seed, planned=view.planned, progress=view.step, **job.options)
    if job.recorded is not None:
        output.report = restore_facts(output.report, job.recorded, job.notes)
    path = output.save(job.target, overwrite=False)
    if not quiet:
        typer.echo(path)
    return {"path": str(path), **output.report.to_dict()}


def recorded_jobs(
    picture: Path,
    model: str | None,
    pool: Path | None,
    prompt: str | None,
    changes: Mapping[str, Any],
    seeds: Sequence[int],
    out: str | None,
    force: bool,
) -> tuple[AutoLoRAPipeline, list[Job]]:
    """Make jobs that repeat a picture, exactly or with changes.

    Args:
        picture: A PNG file of ours.
        model: Base model; None is the one that the picture names.
        pool: Folder of LoRAs in place of the model's.
        prompt: Another prompt.
        changes: Other options for the call of the pipeline.
        seeds: Other seeds; empty for the picture's own.
        out: What ``--out`` says.
        force: Whether to go on although files differ.

    Returns:
        The pipeline, and one job per seed.

    Raises:
        AutoLoRAError: The picture cannot be repeated here.
    """
    from autolora.cli_view import print_notes
    from autolora.generation.prompts import merge_asked, parse_prompt
    from autolora.generation.repeat import check, load_report, repeat_options

    report = load_report(picture)
    try:
        pipe = open_pipeline(model or report.model, pool)
    except ConfigError as error:
        if model is not None:
            raise
        raise GenerationError(
            f"{shown(picture)} was made with base model {shown(report.model)!r}, which is not "
            "known by that name here; name its configuration by --model."
        ) from error
    notes = check(report, pipe, force)
    print_notes(notes)
    options = {**repeat_options(report), **changes}
    asked = (*changes.get("loras", ()), *(parse_prompt(prompt).loras if prompt else ()))
    options["loras"] = merge_asked(repeat_options(report)["loras"], asked)
    if prompt is not None and "use_triggers" not in changes:
        options["use_triggers"] = True
    exact = not changes and prompt is None
    text = report.used_prompt if prompt is None else prompt
    numbers = list(seeds) or [report.seed]
    name = report.prompt if prompt is None else prompt
    jobs = [
        Job(
            text,
            seed,
            picture_name(out, name, seed, len(numbers) > 1),
            options,
            report if exact and seed == report.seed else None,
            notes,
        )
        for seed in numbers
    ]
    return pipe, jobs


def read_seeds(texts: Iterable[str], count: int | None) -> list[int]:
    """Read the seeds of a command line.

    Args:
        texts: Numbers, ranges such as ``3-6`` or ``3..6``, ``random`` or -1; each seed is drawn
            once.
        count: How many pictures; the seeds count up from the only one given.

    Returns:
        The seeds in the order asked for; empty where nothing was asked for.

    Raises:
        GenerationError: A seed is not understood, or it is far too many.
    """
    seeds = list(dict.fromkeys(seed for text in texts for seed in _read_seed(text)))
    if count is not None:
        if not 1 <= count <= MAX_COUNT:
            raise GenerationError(f"Count must be between 1 and {MAX_COUNT}, not {count}.")
        if len(seeds) > 1:
            raise GenerationError("Count goes with one seed, from which the others count up.")
        start = seeds[0] if seeds else 0
        seeds = list(range(start, start + count))
    if len(seeds) > MAX_COUNT:
        raise GenerationError(f"{len(seeds)} seeds are too many; at most {MAX_COUNT} are drawn.")
    return seeds


def _read_seed(text: str) -> Sequence[int]:
    if text.strip() in ("random", "-1"):
        return [secrets.randbelow(MAX_RANDOM_SEED + 1)]
    if match := _RANGE.fullmatch(text.strip()):
        low, high = map(int, match.groups())
        if not 0 <= high - low < MAX_COUNT:
            raise GenerationError(
                f"Seed range {shown(text, 60)} must go up and have at most {MAX_COUNT} seeds."
            )
        return range(low, high + 1)
    if not re.fullmatch(r"\s*-?[0-9]{1,30}\s*", text):
        raise GenerationError(
            f"Seed must be a whole number, a range such as 3-6, or random, not {shown(text, 60)!r}."
        )
    return [int(text)]


def picture_name(out: str | None, prompt: str, seed: int, many: bool) -> Path:
    """File to write: ``--out``, with the seed where there are several, or named by the prompt.

    Raises:
        GenerationError: The name cannot be a picture's.
    """
    from autolora.generation.png import check_png_name
    from autolora.generation.prompts import slug

    default = f"{slug(prompt)}-{seed}.png"
    if out is None:
        return Path(default)
    path = Path(out).expanduser()
    if out.endswith("/") or os.path.isdir(path):
        return path / default
    if not path.suffix:
        raise GenerationError(f"{shown(out)} must end in .png, or in / for a folder.")
    check_png_name(path)
    return path.with_name(f"{path.stem}-{seed}{path.suffix}") if many else path
