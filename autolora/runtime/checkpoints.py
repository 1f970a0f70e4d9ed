"""Where the files of a full-size base model are, and what gets those that are missing.

A model has parts (`autolora.config.PARTS`), and each part is a file, the shards of one, or
a tokenizer's folder. Nothing here needs torch or reads weights.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

from autolora.config import PARTS, CheckpointSettings, HubReference, PipelineConfig, hub_reference
from autolora.errors import ConfigError, shown

TOKENIZERS = ("tokenizer", "tokenizer_2", "processor")
_TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))
"""Sets of files of which each is a whole tokenizer."""
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_WHOLE = ("model.safetensors", "diffusion_pytorch_model.safetensors")


@dataclass(frozen=True)
class PartLayout:
    """Where a part of a model is kept.

    Attributes:
        patterns: Paths below a repository or a user's folder, the published one first; the first
            that is there wins. ``folder/*`` is all of a folder.
        folder: Whether the part is a folder that a library reads (a tokenizer), not weights.
        optional: Whether the model loads without it.
    """

    patterns: tuple[str, ...]
    folder: bool = False
    optional: bool = False


@dataclass(frozen=True)
class Located:
    """Where a part of a model is.

    Attributes:
        part: One of `autolora.config.PARTS`.
        place: The file or folder that was looked at.
        paths: Its files; the folder itself for a tokenizer.
        missing: What is not there, as names below ``place``'s folder; empty where all is.
        hub: The repository and pattern it comes from; None for a path of the user's own.
        candidates: Files of which any could be it, where nothing tells which.
    """

    part: str
    place: Path | None
    paths: tuple[Path, ...] = ()
    missing: tuple[str, ...] = ()
    hub: HubReference | None = None
    candidates: tuple[Path, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether all its files are there."""
        return bool(self.paths) and not self.missing


def locate(config: PipelineConfig, parts: Mapping[str, PartLayout]) -> dict[str, Located]:
    """Find the files of all parts.

    Args:
        config: A configuration.
        parts: Where the family's parts are kept.

    Returns:
        One entry per part, also for those that are missing.

    Raises:
        ConfigError: An index of shards cannot be read.
    """
    return {part: locate_part(config, part, parts) for part in parts}


def locate_part(config: PipelineConfig, part: str, parts: Mapping[str, PartLayout]) -> Located:
    """Find the files of one part; see `locate`.

    A path of the user's own for the part wins, then what is in a folder given as
    `PipelineConfig.weights`, then the hub, so that a folder of a few downloads can be completed.
    """
    checkpoint, weights = config.checkpoint, config.weights
    if weights is not None and not _is_whole(weights):
        checkpoint, weights = replace(checkpoint, transformer=str(weights)), None
    named = getattr(checkpoint, part)
    if weights is None or (named is not None and hub_reference(named) is None):
        return _locate_part(checkpoint, part, parts)
    inside = _look_in_layout(part, weights, None, parts)
    if inside.paths or inside.candidates:
        return inside
    elsewhere = _locate_part(checkpoint, part, parts)
    return inside if elsewhere.place is None else elsewhere


def require(config: PipelineConfig, located: Iterable[Located]) -> None:
    """Make sure that parts are there.

    Raises:
        ConfigError: Some are not, and the message has the command that gets them; or several files
            could be one part.
    """
    absent = [entry for entry in located if not entry.complete]
    if not absent:
        return
    unclear = next((entry for entry in absent if entry.candidates), None)
    if unclear is not None:
        raise ConfigError(f"Base model {shown(config.name)} is not clear: {several(unclear)}.")
    folder = hub_folder(config.checkpoint)
    words = ", ".join(_absence(entry) for entry in absent if entry.hub is None)
    awaited = ", ".join(
        _absence(entry) if entry.paths else entry.part for entry in absent if entry.hub is not None
    )
    if awaited:
        words = f"{awaited} below {shown(folder)}" + (f", and {words}" if words else "")
    command = download_command(config, absent)
    todo = (
        f"get them with `{command}`, or let `checkpoint.download: true` do it"
        if command
        else "put the files there, or correct `checkpoint` in the configuration"
    )
    raise ConfigError(f"Base model {shown(config.name)} lacks files: {words}; {todo}.")


def several(entry: Located) -> str:
    """Say which files could all be a part, and how to choose one."""
    names = ", ".join(shown(path.name, 80) for path in entry.candidates[:4])
    folder = shown(entry.candidates[0].parent)
    return (
        f"each of {names} in {folder} could be the {entry.part}; write the path of one behind "
        f"`{entry.part}:` below `checkpoint:` in the configuration"
    )


def download_command(config: PipelineConfig, located: Iterable[Located]) -> str | None:
    """Write the shell command that gets missing parts to where they are looked for.

    Args:
        config: The configuration; it says which hub.
        located: Parts; those that are there are passed over.

    Returns:
        One line, None where nothing is missing or no hub is known to have it.
    """
    by_repository: dict[str, list[str]] = {}
    for entry in located:
        if not entry.complete and entry.hub is not None:
            patterns = by_repository.setdefault(entry.hub.id, [])
            patterns.append(entry.hub.pattern or "*")
    folder = hub_folder(config.checkpoint)
    commands = []
    for repository, patterns in by_repository.items():
        target = shlex.quote(str(folder / repository))
        quoted = [shlex.quote(pattern) for pattern in patterns]
        if config.checkpoint.source == "huggingface":
            words = ["hf download", repository, *(f"--include {p}" for p in quoted)]
            commands.append(" ".join([*words, "--local-dir", target]))
        else:
            words = ["modelscope download", "--model", repository, "--include", *quoted]
            commands.append(" ".join([*words, "--local_dir", target]))
    return " && ".join(commands) or None


def download(config: PipelineConfig, located: Iterable[Located]) -> None:
    """Download missing parts through DiffSynth's ``ModelConfig``, which knows both hubs.

    Raises:
        ConfigError: The hub refused, or is not reached.
    """
    from diffsynth.core import ModelConfig

    for entry in located:
        if entry.hub is None or entry.complete:
            continue
        model = ModelConfig(
            model_id=entry.hub.id,
            origin_file_pattern=entry.hub.pattern,
            local_model_path=str(hub_folder(config.checkpoint)),
            download_source=config.checkpoint.source,
            skip_download=False,
        )
        try:
            model.download_if_necessary()
        except Exception as error:  # of either hub's client, and of the network
            reason = shown(" ".join(str(error).split()))
            raise ConfigError(
                f"{shown(entry.hub.id)} could not be downloaded from {config.checkpoint.source}: "
                f"{reason or type(error).__name__}."
            ) from error


def hub_folder(checkpoint: CheckpointSettings) -> Path:
    """Folder of downloaded repositories; DiffSynth's own variable wins, as in its ModelConfig."""
    return Path(os.environ.get("DIFFSYNTH_MODEL_BASE_PATH") or checkpoint.folder)


def _is_whole(weights: Path) -> bool:
    """Whether a path holds several parts of a model, not just the transformer."""
    if not weights.is_dir():
        return False
    parts = any((weights / name).exists() for name in (*PARTS, "ae.safetensors"))
    return parts or not _weight_files(weights)[0]


def _locate_part(
    checkpoint: CheckpointSettings, part: str, parts: Mapping[str, PartLayout]
) -> Located:
    text = getattr(checkpoint, part)
    if text is not None:
        reference = hub_reference(text)
        if reference is None:
            return _look(part, Path(text), None)
        if reference.pattern is not None:
            return _look_in_hub(checkpoint, part, reference)
        return _look_in_layout(part, hub_folder(checkpoint) / reference.id, reference, parts)
    if checkpoint.base is None:
        return Located(part, None, missing=(part,))
    reference = hub_reference(checkpoint.base)
    if reference is None:
        return _look_in_layout(part, Path(checkpoint.base), None, parts)
    return _look_in_layout(part, hub_folder(checkpoint) / reference.id, reference, parts)


def _look_in_hub(checkpoint: CheckpointSettings, part: str, reference: HubReference) -> Located:
    root = hub_folder(checkpoint) / reference.id
    pattern = reference.pattern or ""
    if part in TOKENIZERS or pattern.endswith(("/", "/*")):
        return _look(part, root / pattern.rstrip("/*"), reference)
    found = sorted(root.glob(pattern)) if root.is_dir() else []
    if not found:
        return Located(part, root / pattern, missing=(pattern,), hub=reference)
    if len(found) == 1:
        return _look(part, found[0], reference)
    return Located(part, root, tuple(found), _missing_shards(found), reference)


def _look_in_layout(
    part: str, root: Path, repository: HubReference | None, parts: Mapping[str, PartLayout]
) -> Located:
    """Look for a part where published repositories, or folders of single files, have it."""
    patterns = parts[part].patterns
    several: list[Path] = []
    for pattern in patterns:
        hub = None if repository is None else HubReference(repository.id, pattern)
        found = _matching(root, pattern, parts)
        if len(found) == 1 and found[0].exists():
            located = _look(part, found[0], hub)
            if located.paths or located.missing:
                return located
        several = several or (found if len(found) > 1 else [])
    # Where a repository has both layouts, the single file is wanted.
    hub = None if repository is None else HubReference(repository.id, patterns[0])
    place = root / patterns[0]
    return Located(part, place, missing=(patterns[0],), hub=hub, candidates=tuple(several))


def _matching(root: Path, pattern: str, parts: Mapping[str, PartLayout]) -> list[Path]:
    """Files that match, or the folder of a pattern that takes all of one."""
    if pattern.endswith("/*"):
        return [root / pattern[:-2]]
    found = sorted(root.glob(pattern))
    if pattern == "*.safetensors":  # whatever the transformer is called, the others have names
        known = [
            name
            for part, entry in parts.items()
            if part != "transformer"
            for name in entry.patterns
        ]
        found = [file for file in found if not any(fnmatch(file.name, name) for name in known)]
    return found


def _look(part: str, place: Path, hub: HubReference | None) -> Located:
    if part in TOKENIZERS:
        there = any(all((place / n).is_file() for n in names) for names in _TOKENIZER_FILES)
        return Located(part, place, (place,) if there else (), () if there else (part,), hub)
    if place.is_file():
        return Located(part, place, (place,), (), hub)
    if not place.is_dir():
        return Located(part, place, (), (place.name,), hub)
    paths, missing = _weight_files(place)
    return Located(part, place, paths, missing or (() if paths else (place.name,)), hub)


def _weight_files(folder: Path) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Files of the checkpoint in a folder of its own, and names of shards that are not there."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        try:
            names = set(json.loads(indexes[0].read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"The index of shards {shown(indexes[0])} cannot be read; download it again."
            ) from error
        paths = [folder / str(name) for name in sorted(names)]
        missing = tuple(path.name for path in paths if not path.is_file())
        return tuple(path for path in paths if path.is_file()), missing
    for name in _WHOLE:
        if (folder / name).is_file():
            return (folder / name,), ()
    files = sorted(folder.glob("*.safetensors"))
    shards = [path for path in files if _SHARD.fullmatch(path.name)]
    if shards:
        return tuple(shards), _missing_shards(shards)
    return (tuple(files), ()) if len(files) == 1 else ((), ())


def _missing_shards(paths: Iterable[Path]) -> tuple[str, ...]:
    """Names of shards that must be there by the count in the names of the others."""
    matches = [match for path in paths if (match := _SHARD.fullmatch(path.name))]
    wanted = {
        f"{match['stem']}-{number:05d}-of-{match['count']}.safetensors"
        for match in matches
        for number in range(1, int(match["count"]) + 1)
    }
    return tuple(sorted(wanted - {match.string for match in matches}))


def _absence(entry: Located) -> str:
    if entry.place is None:
        return f"{entry.part} (not configured)"
    names = [name for name in entry.missing if name not in (entry.place.name, entry.part)]
    if entry.paths:
        return f"{entry.part} without {', '.join(shown(name, 80) for name in names[:3])}"
    place = entry.place.parent if entry.place.name == "*" else entry.place
    return f"{entry.part} at {shown(place)}"
