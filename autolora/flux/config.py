"""What a base model's YAML file may say, and how it is found and read.

One file stands for one base model with its pool, index and defaults. Unknown keys and wrong values
are errors, all of them named at once. Nothing here needs torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from autolora.errors import ConfigError, shown
from autolora.flux.settings import (
    PARTS,
    AdapterSettings,
    CheckpointSettings,
    MemorySettings,
    hub_reference,
)
from autolora.flux.values import read_values

KINDS = ("tiny", "flux1")
PLAIN_STORAGES = ("float8", "bfloat16", "float32")
PACKED_STORAGES = ("nf4", "torchao_float8", "torchao_float8_dynamic")
"""Storages that a library packs weights for; full-size models only."""
STORAGES = (*PLAIN_STORAGES, *PACKED_STORAGES)
COMPUTES = ("auto", "bfloat16", "float32")
TEXTS = ("auto", "minilm", "clip")
SIZE_MULTIPLE = 16
MIN_SIZE, MAX_SIZE = 64, 2048
MAX_STEPS = 200
MAX_TOP_K = 16


@dataclass(frozen=True)
class PortraitSettings:
    """How a LoRA's portrait is taken: see `autolora.flux.portraits`."""

    sigmas: tuple[float, ...] = (1.0, 0.85, 0.7)
    """Noise levels in (0, 1] at which the first guess of the clean picture is looked at."""
    noises: int = 12
    """Fixed noises per noise level."""
    size: int = 128
    """Side of the picture in pixels."""
    prompt: str = "an object on a white background"
    """The neutral prompt."""
    seed: int = 0
    """Seed of the noises."""
    batch: int = 36
    """Most forward passes to run as one batch."""

    def problems(self) -> list[str]:
        """Say what is wrong with the values, one sentence part each."""
        found = []
        if not self.sigmas or not all(0 < sigma <= 1 for sigma in self.sigmas):
            found.append(f"portrait.sigmas must be numbers in (0, 1], not {list(self.sigmas)}")
        if self.noises < 1 or self.batch < 1:
            found.append("portrait.noises and portrait.batch must be at least 1")
        if self.size % SIZE_MULTIPLE or not MIN_SIZE <= self.size <= MAX_SIZE:
            found.append(
                f"portrait.size must be a multiple of {SIZE_MULTIPLE} between {MIN_SIZE} and "
                f"{MAX_SIZE}, not {self.size}"
            )
        return found


@dataclass(frozen=True)
class PipelineConfig:
    """A base model with its pool, index and defaults."""

    name: str
    """How the model is called."""
    kind: str = "tiny"
    """Which family of base model: one of `KINDS`."""
    weights: Path | None = None
    """Checkpoint; None stands for the one that the package ships. For a full-size model a shorter
    way to say ``checkpoint.transformer`` (a file) or ``checkpoint.base`` (a folder)."""
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    """Where the files of a full-size model are."""
    memory: MemorySettings = field(default_factory=MemorySettings)
    """How a full-size model shares the memory."""
    storage: str = "float8"
    """What the transformer's linear layers are kept in: one of `STORAGES`."""
    compute: str = "auto"
    """What they compute in; ``auto`` follows storage, or else the device (float32 on a CPU)."""
    device: str = "auto"
    """A torch device; ``auto`` is the first GPU, or else the CPU."""
    pool: Path = Path("lora_pool")
    """Folder of LoRA files."""
    index: Path = Path("index")
    """Folder that the search index is written to."""
    encoder: Path | None = None
    """Weights of the LoRA encoder; None stands for those that the package ships for its weights."""
    gate: Path | None = None
    """Weights of the gates; None stands for those that the package ships for its weights."""
    strategy: str = "gated"
    """How several adapters act in one layer."""
    text: str = "auto"
    """What reads prompts and metadata for the search: one of `TEXTS`; ``auto`` is the checkpoint's
    CLIP for a full-size model."""
    top_k: int = 3
    """Most adapters that a prompt may take."""
    steps: int = 20
    """Denoising steps."""
    width: int = 128
    """Picture width in pixels."""
    height: int = 128
    """Picture height in pixels."""
    guidance: float = 3.0
    """Scale of classifier-free guidance; of embedded guidance where the model has that."""
    true_cfg: float = 1.0
    """Scale of classifier-free guidance on top of embedded guidance; 1 turns it off. It takes
    twice the time, and is what a negative prompt needs in such a model."""
    sigma_shift: float | None = None
    """Shift of the noise schedule towards noise; None is DiffSynth's default for FLUX.1."""
    adapters: AdapterSettings = field(default_factory=AdapterSettings)
    """How adapters are kept ready and put into the base model."""
    portrait: PortraitSettings = field(default_factory=PortraitSettings)
    """How portraits of LoRAs are taken."""

    def __post_init__(self) -> None:
        """Check the values together.

        Raises:
            ConfigError: Naming every value that is wrong.
        """
        found = [
            *self.portrait.problems(),
            *self.checkpoint.problems(),
            *self.memory.problems(),
            *self.adapters.problems(),
        ]
        for key, choices in (
            ("kind", KINDS),
            ("storage", STORAGES),
            ("compute", COMPUTES),
            ("text", TEXTS),
        ):
            value = getattr(self, key)
            if value not in choices:
                found.append(f"{key} must be one of {', '.join(choices)}, not {value!r}")
        found += self._storage_problems()
        for problem in (
            steps_problem(self.steps),
            size_problem(self.width, self.height),
            guidance_problem(self.guidance),
            guidance_problem(self.true_cfg, "true_cfg"),
            top_k_problem(self.top_k),
        ):
            if problem:
                found.append(problem)
        if found:
            raise ConfigError(f"Configuration {shown(self.name)!r}: {'; '.join(found)}.")

    def _storage_problems(self) -> list[str]:
        found = []
        if self.storage in ("bfloat16", "float32") and self.compute not in ("auto", self.storage):
            found.append(f"storage {self.storage} computes in {self.storage}, not {self.compute}")
        if self.storage in PACKED_STORAGES:
            if self.kind == "tiny":
                found.append(f"storage {self.storage} is for full-size models, not for kind tiny")
            if self.memory.offload == "layers":
                found.append(f"storage {self.storage} goes with memory.offload none or parts")
        if self.kind == "tiny" and self.text == "clip":
            found.append("kind tiny has no CLIP; text must be auto or minilm")
        return found

    @property
    def uses_shipped_weights(self) -> bool:
        """Whether the base model is the one in the package, which encoder and gates go with."""
        return self.kind == "tiny" and self.weights is None

    def with_pool(self, pool: Path) -> PipelineConfig:
        """Return the configuration for another pool, with an index of its own.

        Args:
            pool: Folder of LoRA files.
        """
        folder = pool.expanduser().resolve()
        digest = hashlib.sha256(str(folder).encode()).hexdigest()[:8]
        index = self.index.with_name(f"{self.index.name}-{folder.name}-{digest}")
        return dataclasses.replace(self, pool=pool.expanduser(), index=index)


def steps_problem(steps: int) -> str | None:
    """Say what is wrong with a number of denoising steps, or None."""
    if 1 <= steps <= MAX_STEPS:
        return None
    return f"steps must be between 1 and {MAX_STEPS}, not {steps}"


def size_problem(width: int, height: int) -> str | None:
    """Say what is wrong with a picture size in pixels, or None."""
    if all(MIN_SIZE <= side <= MAX_SIZE for side in (width, height)):
        return None
    return (
        f"size {width}x{height} is not possible: width and height must be between {MIN_SIZE} and "
        f"{MAX_SIZE}"
    )


def rounded_size(width: int, height: int) -> tuple[int, int]:
    """Round a picture size up to what the model can draw, as DiffSynth does."""
    wide, high = (-(-side // SIZE_MULTIPLE) * SIZE_MULTIPLE for side in (width, height))
    return wide, high


def guidance_problem(guidance: float, name: str = "guidance") -> str | None:
    """Say what is wrong with a guidance scale, or None."""
    if math.isfinite(guidance) and 0 <= guidance <= 100:
        return None
    return f"{name} must be a number between 0 and 100, not {guidance}"


def top_k_problem(top_k: int) -> str | None:
    """Say what is wrong with a number of adapters, or None."""
    if 0 <= top_k <= MAX_TOP_K:
        return None
    return f"top_k must be between 0 and {MAX_TOP_K}, not {top_k}"


def find_config(name: str | Path) -> Path:
    """Find a configuration by the name of a shipped one, or by path.

    Args:
        name: ``tiny``, or a path to a YAML file.

    Returns:
        The file.

    Raises:
        ConfigError: There is none; the message lists the names that there are.
    """
    path = Path(name)
    if path.suffix.lower() in (".yaml", ".yml"):
        if os.path.isfile(path):
            return path
        raise ConfigError(f"There is no configuration file {shown(path)}; check the path.")
    known = shipped_configs()
    if str(name) in known:
        return known[str(name)]
    close = get_close_matches(str(name), known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"choose {', '.join(known)}"
    raise ConfigError(
        f"There is no base model named {shown(name)!r}; {hint.rstrip('?')}"
        f"{'?' if close else ''}{' Or' if close else ', or'} give the path of a .yaml file."
    )


def shipped_configs() -> dict[str, Path]:
    """Configurations of base models by name, from the checkout or else from the package."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "configs", package / "configs"):
        files = {file.stem: file for file in sorted(folder.glob("*.yaml")) if _is_pipeline(file)}
        if files:
            return files
    return {}


def _is_pipeline(file: Path) -> bool:
    """Tell base models from other YAML files, such as what training programs read."""
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(raw, Mapping) and "kind" in raw


def load_config(source: str | Path) -> PipelineConfig:
    """Read a base model's configuration.

    Relative paths in it count from the folder that holds ``configs/`` for a file in a folder of
    that name, from the file's own folder otherwise, and from the working folder for a
    configuration inside an installed package.

    Args:
        source: Name or path, as `find_config` takes it.

    Returns:
        The configuration with absolute paths.

    Raises:
        ConfigError: There is no such file, it is not YAML, or keys or values are wrong; all of
            them are named at once.
    """
    path = find_config(source)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = shown(" ".join(str(error).split()))
        raise ConfigError(f"{shown(path)} cannot be read as YAML: {reason}.") from error
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{shown(path)} must hold keys and values, such as `kind: tiny`.")
    found: list[str] = []
    values = read_values(PipelineConfig, {"name": path.stem, **raw}, found)
    if found:
        raise ConfigError(f"{shown(path)}: {'; '.join(found)}.")
    root = _root(path)
    values["checkpoint"] = _rooted(values.get("checkpoint", CheckpointSettings()), root)
    for key in ("weights", "pool", "index", "encoder", "gate"):
        value = values.get(key, PipelineConfig.__dataclass_fields__[key].default)
        values[key] = None if value is None else _absolute(root, value)
    return PipelineConfig(**values)


def _rooted(checkpoint: CheckpointSettings, root: Path) -> CheckpointSettings:
    """Make paths absolute; what is neither there nor a path stays a hub reference."""
    changes: dict[str, Any] = {"folder": _absolute(root, checkpoint.folder)}
    for part in ("base", *PARTS):
        text = getattr(checkpoint, part)
        if text is None:
            continue
        path = _absolute(root, text)
        if path.exists() or hub_reference(text) is None:
            changes[part] = str(path)
    return dataclasses.replace(checkpoint, **changes)


def _absolute(root: Path, path: str | Path) -> Path:
    """A path in a configuration without ``~`` and ``..``; links stay as they are written."""
    return Path(os.path.abspath(root / Path(path).expanduser()))


def _root(path: Path) -> Path:
    folder = path.resolve().parent
    if folder.name != "configs":
        return folder
    inside_package = (folder.parent / "flux").is_dir() and (folder.parent / "cli.py").is_file()
    return Path.cwd() if inside_package else folder.parent
