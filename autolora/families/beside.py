"""Models beside a base model, by DiffSynth's own loader: ControlNets, IP-Adapters and others.

DiffSynth tells them by the names and shapes in their files, so that any that it knows will do.
Importing this module imports DiffSynth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffsynth.models.model_loader import ModelPool

from autolora.config import PipelineConfig, hub_reference
from autolora.errors import ConfigError, shown
from autolora.runtime.checkpoints import Located, download, hub_folder, require


def load_beside(
    pipe: Any,
    config: PipelineConfig,
    controlnet: str | None = None,
    join: Callable[[list[Any]], Any] | None = None,
) -> None:
    """Load what ``checkpoint.beside`` and ``checkpoint.controlnets`` name into a pipeline.

    Args:
        pipe: The pipeline, with its own models.
        config: Its configuration.
        controlnet: The pipeline's attribute of ControlNets; None where it has none.
        join: Makes one model of several ControlNets; None where only one is possible.

    Raises:
        ConfigError: The pipeline has no place for one, its files are missing, or DiffSynth does not
            know it.
    """
    title = pipe.family.title
    for attribute, text in config.checkpoint.beside.items():
        if not hasattr(pipe, attribute):
            raise ConfigError(f"{title} has no place for a model named {shown(attribute, 60)!r}.")
        setattr(pipe, attribute, _load(pipe, config, attribute, text))
    wanted = config.checkpoint.controlnets
    if not wanted:
        return
    if controlnet is None:
        raise ConfigError(f"{title} takes no ControlNets; remove checkpoint.controlnets.")
    if join is None and len(wanted) > 1:
        raise ConfigError(f"{title} takes one ControlNet, not {len(wanted)}.")
    models = [_load(pipe, config, name, text) for name, text in wanted.items()]
    setattr(pipe, controlnet, models[0] if join is None else join(models))
    pipe.controlnets = tuple(wanted)


def _load(pipe: Any, config: PipelineConfig, name: str, text: str) -> Any:
    located = _locate(config, name, text)
    if not located.complete and config.checkpoint.download:
        download(config, [located])
        located = _locate(config, name, text)
    require(config, [located])
    pool = ModelPool()
    place = {"device": pipe.device, "dtype": pipe.torch_dtype}
    kept = {
        f"{stage}_{what}": value
        for stage in ("onload", "preparing", "computation")
        for what, value in place.items()
    }
    paths = [str(path) for path in located.paths]
    try:
        pool.auto_load_model(
            paths[0] if len(paths) == 1 else paths, {**pool.default_vram_config(), **kept}
        )
    except (ValueError, RuntimeError, KeyError) as error:
        reason = shown(" ".join(str(error).split()))
        raise ConfigError(
            f"DiffSynth cannot load {shown(located.paths[0])} beside {pipe.family.title}: {reason}."
        ) from error
    return pool.model[-1].eval().requires_grad_(False)


def _locate(config: PipelineConfig, name: str, text: str) -> Located:
    reference = hub_reference(text)
    if reference is None:
        paths: Sequence[Path] = [Path(text)] if Path(text).is_file() else []
        return Located(name, Path(text), tuple(paths), () if paths else (Path(text).name,))
    root, pattern = hub_folder(config.checkpoint) / reference.id, reference.pattern or "*"
    found = tuple(sorted(root.glob(pattern))) if root.is_dir() else ()
    return Located(name, root / pattern, found, () if found else (pattern,), reference)
