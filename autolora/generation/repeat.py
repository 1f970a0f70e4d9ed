"""Makes a picture again from the report inside it.

What a picture hangs on is compared first: a LoRA that is gone or has other bytes, or another base
model, would silently give another picture. Programs of other versions and another machine may
change a picture's last bits, which is only worth a note.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from autolora.adapters import Pool
from autolora.adapters.reader import file_sha256
from autolora.errors import GenerationError, LoRAFormatError, shown
from autolora.flux.config import PipelineConfig
from autolora.generation import a1111, comfy
from autolora.generation.identity import identify_base
from autolora.generation.png import read_texts
from autolora.generation.prompts import AskedLoRA
from autolora.generation.report import CHUNK, BaseModel, Output, Report, UsedAdapter, read_report
from autolora.generation.versions import program_versions

_HASH_DIGITS = 12  # shown to people


class Pipeline(Protocol):
    """What is needed of `autolora.pipeline.AutoLoRAPipeline`."""

    config: PipelineConfig

    @property
    def pool(self) -> Pool:
        """The LoRA files."""
        ...

    @property
    def attached(self) -> dict[str, float]:
        """Strength by name of what stays attached."""
        ...

    def generate_many(self, prompt: str, seeds: Sequence[int], **options: Any) -> list[Output]:
        """Generate several pictures."""
        ...


@dataclass(frozen=True)
class Differences:
    """What is not as it was when a picture was made, one sentence part each.

    Attributes:
        missing: LoRAs that are not in the pool; without them nothing can be repeated.
        content: What gives another picture: other bytes of a LoRA, another base model.
        surroundings: What may change last bits: other versions, device, threads.
    """

    missing: tuple[str, ...] = ()
    content: tuple[str, ...] = ()
    surroundings: tuple[str, ...] = ()


def load_report(path: str | Path) -> Report:
    """Read the report of a picture to repeat it.

    Args:
        path: A PNG file.

    Raises:
        GenerationError: It is no picture, was made by another program, or its report is damaged.
    """
    texts = read_texts(path)
    if CHUNK not in texts and (a1111.CHUNK in texts or comfy.CHUNK in texts):
        raise GenerationError(
            f"{shown(path)} was made by another program, so that it cannot be repeated; "
            "`autolora show` prints its prompt and settings."
        )
    try:
        report = Report.from_dict(read_report(path))
        if report.batch and report.seed not in report.batch:
            raise GenerationError("The report is damaged: its batch is without its seed.")
    except GenerationError as error:
        raise GenerationError(f"{shown(path)} cannot be repeated: {error}") from error
    return report


def compare(report: Report, pipe: Pipeline) -> Differences:
    """Compare what a picture was made with to what there is now.

    Args:
        report: The picture's.
        pipe: What would repeat it; its base model is not loaded for this.

    Returns:
        What differs.
    """
    missing, content = [], []
    for used in report.adapters:
        if used.name not in pipe.pool:
            missing.append(f"{shown(used.name)} ({used.sha256[:_HASH_DIGITS] or 'hash unknown'})")
        elif changed := _changed_adapter(used, pipe.pool):
            content.append(changed)
    now = identify_base(pipe.config)
    content += _changed_settings(report, pipe.config)
    if report.base is not None:
        content += _changed_base(report.base, now)
    return Differences(tuple(missing), tuple(content), tuple(_surroundings(report, now)))


def check(report: Report, pipe: Pipeline, force: bool = False) -> list[str]:
    """Make sure that a picture can be repeated.

    Args:
        report: The picture's.
        pipe: What would repeat it.
        force: Whether to go on although the picture will be another one.

    Returns:
        Notes on what differs nevertheless.

    Raises:
        GenerationError: A LoRA is missing; or something else would give another picture and
            `force` is not given. The message names all of it.
    """
    if pipe.attached:
        raise GenerationError(
            f"{shown(', '.join(pipe.attached))} would take part too; detach what is attached "
            "before repeating a picture."
        )
    found = compare(report, pipe)
    if found.missing:
        raise GenerationError(
            f"The picture cannot be repeated: the pool {shown(pipe.pool.folder)} has no LoRA "
            f"{', '.join(found.missing)}; put the file there under that name, or name the pool "
            "that has it by --pool."
        )
    if found.content and not force:
        raise GenerationError(
            f"The picture would become another one: {'; '.join(found.content)}; "
            "--force draws it nevertheless."
        )
    notes = [f"Not as in the repeated picture: {part}." for part in found.content]
    if found.surroundings:
        notes.append(
            f"The last bits may differ from the repeated picture: {'; '.join(found.surroundings)}."
        )
    return notes


def repeat_options(report: Report) -> dict[str, Any]:
    """Return what to call the pipeline with, beside prompt and seed, to repeat a picture.

    Args:
        report: The picture's; its ``used_prompt`` is the prompt to call with.
    """
    return {
        "loras": [AskedLoRA(used.name, used.strength) for used in report.adapters],
        "retrieve": False,
        "use_triggers": False,
        "strategy": report.strategy,
        "steps": report.steps,
        "size": (report.width, report.height),
        "guidance": report.guidance,
        "negative_prompt": report.negative_prompt,
        "text_encoders": report.text_encoders,
    }


def restore_facts(report: Report, recorded: Report, notes: list[str]) -> Report:
    """Give a repeated picture the facts that only the first one knew.

    They are the prompt as it was typed and why each adapter was taken, so that the file of an exact
    repetition has the same bytes.

    Args:
        report: Of the repetition.
        recorded: Of the first picture.
        notes: What differs, to be added to the first one's notes with what the repetition says.
    """
    first = {used.name: used for used in recorded.adapters}
    fresh = {used.name: used for used in report.adapters}
    adapters = [
        dataclasses.replace(
            fresh[name],
            why=used.why,
            score=used.score,
            triggers=used.triggers,
            channels=used.channels,
        )
        for name, used in first.items()
    ]
    known = list(dict.fromkeys([*recorded.notes, *notes, *report.notes]))
    return dataclasses.replace(report, prompt=recorded.prompt, adapters=adapters, notes=known)


def repeat(path: str | Path, pipe: Pipeline, force: bool = False, **options: Any) -> Output:
    """Make a picture again, on the same machine to the byte.

    One that was drawn in a batch is drawn in that batch again, as its last bits hang on it.

    Args:
        path: A PNG file that AutoLoRA wrote.
        pipe: A pipeline of the same base model with the same LoRAs in its pool.
        force: Whether to go on although files differ.
        options: More for the call, such as ``progress``.

    Returns:
        The picture; its report is the first one's, but for what differs.

    Raises:
        GenerationError: The file is no picture of AutoLoRA, or something differs.
    """
    recorded = load_report(path)
    notes = check(recorded, pipe, force)
    seeds = recorded.batch or [recorded.seed]
    given = {**repeat_options(recorded), **options}
    outputs = pipe.generate_many(recorded.used_prompt, seeds, batch=len(seeds), **given)
    output = outputs[seeds.index(recorded.seed)]
    output.report = restore_facts(output.report, recorded, notes)
    return output


def _changed_adapter(used: UsedAdapter, pool: Pool) -> str | None:
    entry = pool.entry(used.name)
    try:
        found = file_sha256(entry.path)
    except LoRAFormatError as error:
        return str(error).rstrip(".")
    if not used.sha256 or found == used.sha256:
        return None
    return (
        f"LoRA {shown(used.name)} is another file (hash {found[:_HASH_DIGITS]}, "
        f"was {used.sha256[:_HASH_DIGITS]})"
    )


def _changed_settings(report: Report, config: PipelineConfig) -> Iterator[str]:
    if report.sigma_shift != config.sigma_shift:
        yield f"sigma_shift is {config.sigma_shift}, was {report.sigma_shift}"
    if report.true_cfg is not None and report.true_cfg != config.true_cfg:
        yield f"true_cfg is {config.true_cfg:g}, was {report.true_cfg:g}"


def _changed_base(was: BaseModel, now: BaseModel) -> Iterator[str]:
    for name in ("kind", "storage", "compute"):
        if getattr(was, name) != getattr(now, name):
            before, after = shown(getattr(was, name), 40), getattr(now, name)
            yield f"the base model's {name} is {after}, was {before}"
    for part in sorted({*was.files, *now.files}):
        before, after = was.files.get(part, ""), now.files.get(part, "")
        if before != after:
            yield (
                f"the base model's {shown(part, 40)} is another file (hash {_short(after)}, "
                f"was {_short(before)})"
            )


def _short(fingerprint: str) -> str:
    return shown(fingerprint.rpartition(":")[2][:_HASH_DIGITS]) or "none"


def _surroundings(report: Report, now: BaseModel) -> Iterator[str]:
    was = report.base
    if was is not None and was.device != now.device:
        yield f"made on {shown(was.device, 60)}, this is {now.device}"
    elif was is not None and was.threads != now.threads:
        yield f"made with {was.threads} threads, here {now.threads}"
    yield from _changed_versions(report.versions, program_versions())


def _changed_versions(was: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    for name, version in now.items():
        if name in was and was[name] != version:
            yield f"{name} {shown(was[name], 40)} then, {version} now"
