"""Configurations: one YAML file per base model, with its pool, index, memory settings and defaults.

A configuration is found by name or path, and checked as a whole: unknown keys and wrong values are
all named at once. `autolora init` writes a user's own from a shipped one, comments and all. Nothing
here needs torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from pkgutil import iter_modules
from typing import Annotated, Any

import yaml
from pydantic import Strict

from autolora import schema
from autolora.errors import ConfigError, GenerationError, Message, shown
from autolora.files import replacing
from autolora.schema import STRICT, Numbers, PathField
from autolora.unit import Units

SOURCES = ("modelscope", "huggingface")
OFFLOADS = ("auto", "none", "parts", "layers")
TEXT_STORAGES = ("auto", "float8")
PARTS = (
    "transformer",
    "text_encoder",
    "text_encoder_2",
    "vae",
    "tokenizer",
    "tokenizer_2",
    "processor",
)
"""Parts of full-size models, named as the folders of its published repositories."""

_HUB_REFERENCE = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?::(?P<pattern>[^:]+))?")


@dataclass(frozen=True)
class HubReference:
    """Files in a repository of a model hub.

    Attributes:
        id: Repository, ``owner/name``.
        pattern: Path or glob of the files in it; None where it is not narrowed down.
    """

    id: str
    pattern: str | None = None


@dataclass(frozen=True)
class CheckpointSettings:
    """Where the parts of a full-size base model come from.

    A part is a file, a folder, or ``owner/name:pattern`` for files of a hub repository.
    """

    __pydantic_config__ = STRICT

    base: str | None = None
    """Folder or hub repository, laid out as published, for the parts that are not named below."""
    transformer: str | None = None
    """The diffusion transformer: a single file (BFL's names), or a folder in diffusers' layout."""
    text_encoder: str | None = None
    """CLIP-L."""
    text_encoder_2: str | None = None
    """T5-XXL."""
    vae: str | None = None
    """The autoencoder: BFL's ``ae.safetensors``, or a folder in diffusers' layout."""
    tokenizer: str | None = None
    """Folder of CLIP's tokenizer."""
    tokenizer_2: str | None = None
    """Folder of T5's tokenizer."""
    processor: str | None = None
    """Folder of the processor of a model that reads pictures with its text encoder."""
    controlnets: dict[str, str] = field(default_factory=dict)
    """ControlNets by the name that requests call them; a file, or files of a hub repository."""
    beside: dict[str, str] = field(default_factory=dict)
    """Further models by their attribute in DiffSynth's pipeline, such as ``ipadapter``."""
    folder: PathField = Path("models")
    """Where files of hub repositories are kept, as ``folder/owner/name/...``."""
    source: str = "modelscope"
    """Hub that missing files come from: one of `SOURCES`."""
    download: bool = False
    """Whether to download what is missing while loading; it is tens of gigabytes."""

    def problems(self) -> list[str]:
        """Say what is wrong with the values, one sentence part each."""
        if self.source in SOURCES:
            return []
        return [f"checkpoint.source must be one of {', '.join(SOURCES)}, not {shown(self.source)}"]


@dataclass(frozen=True)
class MemorySettings:
    """How a full-size base model shares the memory of the card and of the machine."""

    __pydantic_config__ = STRICT

    offload: str = "auto"
    """What waits in the machine's memory: ``none``; idle ``parts``, moved as a whole; ``layers``,
    which are moved one by one as they are used. ``auto`` takes the first of these that fits."""
    vram_limit: float | None = None
    """GiB of the card that layers may fill before they stay in the machine's memory (offload
    ``layers`` only); None leaves room for the picture that is configured."""
    text_storage: str = "auto"
    """What the text encoders' linear layers are kept in: ``float8``, or ``auto`` for the type that
    is computed in."""
    tiled: bool = False
    """Whether the autoencoder decodes in tiles: slower, and needs far less at large sizes."""

    def problems(self) -> list[str]:
        """Say what is wrong with the values, one sentence part each."""
        found = []
        for key, choices in (("offload", OFFLOADS), ("text_storage", TEXT_STORAGES)):
            value = getattr(self, key)
            if value not in choices:
                found.append(
                    f"memory.{key} must be one of {', '.join(choices)}, not {shown(value)}"
                )
        limit = self.vram_limit
        if limit is not None and not (math.isfinite(limit) and limit > 0):
            found.append(f"memory.vram_limit must be a positive number of GiB, not {limit}")
        elif limit is not None and self.offload not in ("layers", "auto"):
            found.append("memory.vram_limit belongs to memory.offload layers")
        return found


@dataclass(frozen=True)
class AdapterSettings:
    """How adapters are kept ready and put into the base model."""

    __pydantic_config__ = STRICT

    cache_gb: float = 2.0
    """GiB of adapters to keep in memory, parsed and prepared, so that switching reads no file."""
    pin: bool = False
    """Whether to keep what is prepared on the accelerator; without one this changes nothing."""
    approximate_rank: int = 64
    """Rank that LoKr, LoHa, DoRA and full differences are approximated with, except where they are
    merged, which is exact."""
    text_encoders: bool = False
    """Whether adapters also act on the text encoders, where they have parts for them."""

    def problems(self) -> list[str]:
        """Say what is wrong with the values, one sentence part each."""
        found = []
        if not (math.isfinite(self.cache_gb) and self.cache_gb >= 0):
            found.append(f"adapters.cache_gb must be a number of GiB, not {self.cache_gb}")
        if not 1 <= self.approximate_rank <= 512:
            found.append(
                f"adapters.approximate_rank must be between 1 and 512, not {self.approximate_rank}"
            )
        return found


def hub_reference(text: str) -> HubReference | None:
    """Read ``owner/name`` or ``owner/name:pattern``; None where the text is a path.

    Args:
        text: What a configuration says; `load_config` has made relative paths
            of things that exist absolute.
    """
    match = _HUB_REFERENCE.fullmatch(text)
    if match is None or match["id"].startswith("."):
        return None
    return HubReference(match["id"], match["pattern"])


KINDS = tuple(
    sorted(m.name for m in iter_modules([str(Path(__file__).parent / "families")]) if m.ispkg)
)
"""Families of base models: each is a folder of `autolora.families`."""
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
    """How a LoRA's portrait is taken: see `autolora.generate.portraits`."""

    __pydantic_config__ = STRICT

    sigmas: Numbers = (1.0, 0.85, 0.7)
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

    __pydantic_config__ = STRICT

    name: str
    """How the model is called."""
    kind: str = "tiny"
    """Which family of base model: one of `KINDS`."""
    weights: PathField | None = None
    """Checkpoint; None stands for the one that the package ships. For a full-size model a shorter
    way to say ``checkpoint.transformer`` (a file) or ``checkpoint.base`` (a folder)."""
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    """Where the files of a full-size model are."""
    memory: MemorySettings = field(default_factory=MemorySettings)
    """How a full-size model shares the memory."""
    storage: str = "float8"
    """What the transformer's linear layers are kept in: one of `STORAGES`."""
    compute: str = "auto"
    """What they compute in; ``auto`` follows storage, or else the device: bfloat16
    on a GPU and on a CPU with AVX512-BF16 or AMX, float32 on other CPUs."""
    device: str = "auto"
    """A torch device; ``auto`` is the first GPU, or else the CPU."""
    pool: PathField = Path("lora_pool")
    """Folder of LoRA files."""
    follow_links: Annotated[tuple[PathField, ...], Strict(False)] = ()
    """Folders outside the pool that links in it may lead to."""
    index: PathField = Path("index")
    """Folder that the search index is written to."""
    encoder: PathField | None = None
    """Weights of the LoRA encoder; None stands for those that the package ships for its weights."""
    gate: PathField | None = None
    """Weights of the gates; None stands for those that the package ships for its weights."""
    strategy: str = "gated"
    """How several adapters act in one layer."""
    loras: Units = ()
    """LoRAs that take part in every picture, unless a request turns them off."""
    text: str = "auto"
    """What reads prompts and metadata for the search: one of `TEXTS`, or the hub id or folder of a
    sentence-transformers model (with a slash in it), such as a multilingual one; ``auto`` is the
    checkpoint's CLIP for a full-size model."""
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
            if value not in choices and not (key == "text" and "/" in value):
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


def steps_problem(steps: int) -> Message | None:
    """Say what is wrong with a number of denoising steps, or None."""
    if 1 <= steps <= MAX_STEPS:
        return None
    return Message("steps must be between {} and {}, not {}", 1, MAX_STEPS, steps)


def size_problem(width: int, height: int) -> Message | None:
    """Say what is wrong with a picture size in pixels, or None."""
    if all(MIN_SIZE <= side <= MAX_SIZE for side in (width, height)):
        return None
    template = "size {} is not possible: width and height must be between {} and {}"
    return Message(template, f"{width}x{height}", MIN_SIZE, MAX_SIZE)


def rounded_size(width: int, height: int) -> tuple[int, int]:
    """Round a picture size up to what the model can draw, as DiffSynth does."""
    wide, high = (-(-side // SIZE_MULTIPLE) * SIZE_MULTIPLE for side in (width, height))
    return wide, high


def guidance_problem(guidance: float, name: str = "guidance") -> Message | None:
    """Say what is wrong with a guidance scale, or None."""
    if math.isfinite(guidance) and 0 <= guidance <= 100:
        return None
    return Message(f"{name} must be a number between {{}} and {{}}, not {{}}", 0, 100, guidance)


def top_k_problem(top_k: int) -> Message | None:
    """Say what is wrong with a number of adapters, or None."""
    if 0 <= top_k <= MAX_TOP_K:
        return None
    return Message("top_k must be between {} and {}, not {}", 0, MAX_TOP_K, top_k)


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
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
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
        if not path.is_file():
            raise OSError("it is no file")
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = shown(" ".join(str(error).split()))
        raise ConfigError(f"{shown(path)} cannot be read as YAML: {reason}.") from error
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{shown(path)} must hold keys and values, such as `kind: tiny`.")
    try:
        config = schema.read(PipelineConfig, {"name": path.stem, **raw})
    except schema.Invalid as error:
        raise ConfigError(f"{shown(path)}: {error}.", where=error.problems[0].where) from None
    except GenerationError as error:
        raise ConfigError(f"{shown(path)}: {error}") from None
    root = _root(path)
    paths = {key: getattr(config, key) for key in ("weights", "pool", "index", "encoder", "gate")}
    rooted: dict[str, Any] = {
        key: _absolute(root, value) for key, value in paths.items() if value is not None
    }
    loras = tuple(
        unit if unit.path is None else dataclasses.replace(unit, path=_absolute(root, unit.path))
        for unit in config.loras
    )
    checkpoint = _rooted(config.checkpoint, root)
    rooted["follow_links"] = tuple(_absolute(root, folder) for folder in config.follow_links)
    return dataclasses.replace(config, checkpoint=checkpoint, loras=loras, **rooted)


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
    for key in ("controlnets", "beside"):
        texts: dict[str, str] = getattr(checkpoint, key)
        changes[key] = {
            name: text if hub_reference(text) is not None else str(_absolute(root, text))
            for name, text in texts.items()
        }
    return dataclasses.replace(checkpoint, **changes)


def _absolute(root: Path, path: str | Path) -> Path:
    """A path in a configuration without ``~`` and ``..``; links stay as they are written."""
    return Path(os.path.abspath(root / Path(path).expanduser()))


def _root(path: Path) -> Path:
    folder = path.resolve().parent
    if folder.name != "configs":
        return folder
    inside_package = (folder.parent / "families").is_dir() and (folder.parent / "cli").is_dir()
    return Path.cwd() if inside_package else folder.parent


def write_config(
    source: str, target: Path, values: Mapping[str, str], force: bool
) -> PipelineConfig:
    """Copy a shipped configuration with some values changed.

    The file appears whole or not at all, and only if it can be loaded.

    Args:
        source: Name or path of the configuration to start from.
        target: The file to write.
        values: New values of top-level keys.
        force: Whether a file that is there may be replaced.

    Returns:
        The new configuration.

    Raises:
        ConfigError: The source is wrong, the target is there already, or it cannot be written.
    """
    if target.suffix.lower() not in (".yaml", ".yml"):
        raise ConfigError(f"{shown(target)} must end in .yaml; configurations are YAML files.")
    if target.exists() and not force:
        raise ConfigError(f"{shown(target)} is there already; choose another --out, or --force.")
    text = find_config(source).read_text(encoding="utf-8")
    for key, value in values.items():
        text = _with_value(text, key, value)
    try:
        with replacing(target, suffix=".yaml") as temporary:
            temporary.write_text(text, encoding="utf-8")
            load_config(temporary)
    except OSError as error:
        reason = shown(error.strerror or error)
        raise ConfigError(f"{shown(target)} cannot be written: {reason}.") from error
    return load_config(target)


def _with_value(text: str, key: str, value: str) -> str:
    """Change the value of a top-level key; a new key goes below ``kind``."""
    quoted = json.dumps(value, ensure_ascii=False)  # JSON strings are YAML strings
    pattern = re.compile(rf"^{key}:[^#\n]*?(?=\s*(#|$))", re.MULTILINE)
    line = f"{key}: {quoted}"
    if pattern.search(text):
        return pattern.sub(lambda match: line, text, count=1)
    return re.sub(r"^kind:.*$", lambda match: f"{match.group()}\n{line}", text, count=1, flags=re.M)
