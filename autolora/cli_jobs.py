"""Pictures of the command ``generate``: checked, drawn, saved one by one."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autolora.cli_options import open_pipeline
from autolora.cli_view import PicturesView, print_notes
from autolora.errors import ConfigError, GenerationError, shown

if TYPE_CHECKING:
    from autolora.generation.report import Output, Report
    from autolora.pipeline import AutoLoRAPipeline

MAX_COUNT = 10_000
"""Most pictures of one command."""
MAX_RANDOM_SEED = 2**32 - 1
"""Largest seed that is drawn at random, as other programs take no larger ones."""
_RANGE = re.compile(r"([0-9]{1,19})(?:-|\.\.)([0-9]{1,19})")
_CHECKED = ("steps", "size", "guidance", "top_k", "negative_prompt")


@dataclass
class Job:
    """Pictures to draw that differ in their seeds only.

    Attributes:
        prompt: Their prompt.
        seeds: Their seeds, each once.
        out: What ``--out`` says.
        options: More for the call of the pipeline.
        batch: How many to draw at once.
        name: What files are named after, where it is not the prompt.
        recorded: Report of the picture that is repeated: one with its seed gets its facts.
        notes: What differs from that picture.
    """

    prompt: str
    seeds: Sequence[int]
    out: str | None
    options: dict[str, Any]
    batch: int = 1
    name: str | None = None
    recorded: Report | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def retrieves(self) -> bool:
        """Whether the pool is searched."""
        return bool(self.options.get("retrieve", True))

    def target(self, seed: int) -> Path:
        """The file to write; another name is taken where that is there."""
        return picture_name(self.out, self.name or self.prompt, seed, len(self.seeds) > 1)

    def drawn_seeds(self) -> tuple[list[int], int]:
        """Seeds to draw and how many at once; a batch is repeated as a whole to the byte."""
        if self.recorded is not None and list(self.seeds) == [self.recorded.seed]:
            seeds = self.recorded.batch or [self.recorded.seed]
            return seeds, len(seeds)
        return list(self.seeds), self.batch

    def check(self, pipe: AutoLoRAPipeline) -> None:
        """Find what is wrong before anything slow begins.

        Raises:
            AutoLoRAError: Something that was asked for is not possible.
        """
        from autolora.generation.png import check_folder
        from autolora.generation.request import check_batch, make_request

        check_batch(self.batch)
        options = {name: self.options[name] for name in _CHECKED if name in self.options}
        for seed in self.seeds:
            request = make_request(pipe.config, self.prompt, seed=seed, **options)
            check_folder(self.target(seed))
        for entry in (*self.options.get("loras", ()), *request.tags):
            pipe.pool.entry(entry.name)


def draw(
    pipe: AutoLoRAPipeline,
    job: Job,
    quiet: bool,
    saved: Callable[[dict[str, Any]], None],
) -> None:
    """Make pictures; each is saved, its path printed, and its facts told as soon as it is there.

    Args:
        pipe: The pipeline.
        job: The pictures.
        quiet: Whether to print nothing but the bar.
        saved: Told the facts of each picture with its ``path``.
    """
    from autolora.generation.repeat import restore_facts

    seeds, batch = job.drawn_seeds()
    with PicturesView(quiet=quiet) as view:

        def save(output: Output) -> None:
            report = output.report
            if report.seed not in job.seeds:
                return  # drawn only because it was in the batch of a repeated picture
            if job.recorded is not None and report.seed == job.recorded.seed:
                output.report = restore_facts(report, job.recorded, job.notes)
            path = output.save(job.target(report.seed), overwrite=False)
            view.saved(path, report.notes)
            saved({"path": str(path), **output.report.to_dict()})

        pipe.generate_many(
            job.prompt,
            seeds,
            batch=batch,
            planned=view.planned,
            progress=view.step,
            drawn=save,
            **job.options,
        )


def recorded_job(
    picture: Path,
    model: str | None,
    pool: Path | None,
    prompt: str | None,
    changes: Mapping[str, Any],
    seeds: Sequence[int],
    batch: int | None,
    out: str | None,
    force: bool,
) -> tuple[AutoLoRAPipeline, Job]:
    """Make a job that repeats a picture, exactly or with changes.

    Args:
        picture: A PNG file of ours.
        model: Base model; None is the one that the picture names.
        pool: Folder of LoRAs in place of the model's.
        prompt: Another prompt.
        changes: Other options for the call of the pipeline.
        seeds: Other seeds; empty for the picture's own.
        batch: How many to draw at once; None is as the picture was drawn.
        out: What ``--out`` says.
        force: Whether to go on although files differ.

    Returns:
        The pipeline and the job.

    Raises:
        AutoLoRAError: The picture cannot be repeated here.
    """
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
    numbers = list(seeds) or [report.seed]
    exact = not changes and prompt is None and batch is None
    # One of several seeds is drawn alone, which is no repetition of a picture from a batch.
    exact = exact and (not report.batch or numbers == [report.seed])
    return pipe, Job(
        prompt=report.used_prompt if prompt is None else prompt,
        seeds=numbers,
        out=out,
        options=options,
        batch=1 if batch is None else batch,
        name=report.prompt if prompt is None else None,
        recorded=report if exact else None,
        notes=notes,
    )


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
