"""Where the files of a full-size base model are, and what gets those that are missing.

A model has parts (`autolora.flux.settings.PARTS`), and each part is a file, the shards of one, or
a tokenizer's folder. Nothing here needs torch or reads weights.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from autolora.errors import ConfigError, shown
from autolora.flux.config import PipelineConfig
from autolora.flux.settings import PARTS, CheckpointSettings, HubReference, hub_reference

TOKENIZERS = ("tokenizer", "tokenizer_2")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model")
_LAYOUT: Mapping[str, tuple[str, ...]] = {
    "transformer": ("flux1*.safetensors", "transformer/*"),
    "vae": ("ae.safetensors", "vae/*"),
    **{name: (f"{name}/*",) for name in PARTS if name not in ("transformer", "vae")},
}
"""Where the parts of a published repository are, the first that is there wins."""
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_WHOLE = ("model.safetensors", "diffusion_pytorch_model.safetensors")


@dataclass(frozen=True)
class Located:
    """Where a part of a model is.

    Attributes:
        part: One of `autolora.flux.settings.PARTS`.
        place: The file or folder that was looked at.
        paths: Its files; the folder itself for a tokenizer.
        missing: What is not there, as names below ``place``'s folder; empty where all is.
        hub: The repository and pattern it comes from; None for a path of the user's own.
    """

    part: str
    place: Path | None
    paths: tuple[Path, ...] = ()
    missing: tuple[str, ...] = ()
    hub: HubReference | None = None


def locate(config: PipelineConfig) -> dict[str, Located]:
    """Find the files of all parts.

    Args:
        config: A configuration of kind ``flux1``.

    Returns:
        One entry per part, also for those that are missing.

    Raises:
        ConfigError: An index of shards cannot be read.
    """
    checkpoint = with_weights(config)
    return {part: _locate_part(checkpoint, part) for part in PARTS}


def locate_part(config: PipelineConfig, part: str) -> Located:
    """Find the files of one part; see `locate`."""
    return _locate_part(with_weights(config), part)


def require(config: PipelineConfig, located: Iterable[Located]) -> None:
    """Make sure that parts are there.

    Raises:
        ConfigError: Some are not; the message has the command that gets them.
    """
    absent = [entry for entry in located if entry.missing or not entry.paths]
    if not absent:
        return
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
        if (entry.missing or not entry.paths) and entry.hub is not None:
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
        if entry.hub is None or (entry.paths and not entry.missing):
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


def with_weights(config: PipelineConfig) -> CheckpointSettings:
    """The checkpoint settings with `PipelineConfig.weights` put where it belongs."""
    if config.weights is None:
        return config.checkpoint
    whole = any((config.weights / name).exists() for name in (*PARTS, "ae.safetensors"))
    if config.weights.is_dir() and (whole or not _weight_files(config.weights)[0]):
        return replace(config.checkpoint, base=str(config.weights), transformer=None)
    return replace(config.checkpoint, transformer=str(config.weights))


def _locate_part(checkpoint: CheckpointSettings, part: str) -> Located:
    text = getattr(checkpoint, part)
    if text is not None:
        reference = hub_reference(text)
        if reference is None:
            return _look(part, Path(text), None)
        if reference.pattern is not None:
            return _look_in_hub(checkpoint, part, reference)
        return _look_in_layout(part, hub_folder(checkpoint) / reference.id, reference)
    if checkpoint.base is None:
        return Located(part, None, missing=(part,))
    reference = hub_reference(checkpoint.base)
    if reference is None:
        return _look_in_layout(part, Path(checkpoint.base), None)
    return _look_in_layout(part, hub_folder(checkpoint) / reference.id, reference)


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


def _look_in_layout(part: str, root: Path, repository: HubReference | None) -> Located:
    """Look for a part where published repositories have it."""
    patterns = _LAYOUT[part]
    for pattern in patterns:
        hub = None if repository is None else HubReference(repository.id, pattern)
        folder = pattern.endswith("/*")
        found = [root / pattern[:-2]] if folder else sorted(root.glob(pattern))
        if len(found) == 1 and found[0].exists():
            located = _look(part, found[0], hub)
            if located.paths or located.missing:
                return located
    # Where a repository has both layouts, the single file is what is asked for.
    hub = None if repository is None else HubReference(repository.id, patterns[0])
    return Located(part, root / patterns[0], missing=(patterns[0],), hub=hub)


def _look(part: str, place: Path, hub: HubReference | None) -> Located:
    if part in TOKENIZERS:
        there = any((place / name).is_file() for name in _TOKENIZER_FILES)
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
