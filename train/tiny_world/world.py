"""The plan of the tiny world: one config, and which subject goes where."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from autolora.errors import ConfigError
from autolora.families.tiny.model import TinyFluxConfig
from train.config import read_config
from train.lora_trainer import LoRATrainConfig
from train.tiny_world.autoencoder import AutoencoderConfig
from train.tiny_world.base import BaseConfig
from train.tiny_world.compositions import Mix
from train.tiny_world.subjects import Subject, all_subjects
from train.tiny_world.turbo import TurboConfig
from train.tiny_world.vocabulary import group_names


@dataclass(frozen=True)
class BankConfig:
    """The pictures that the base model learns from."""

    shards: int = 10
    pictures: int = 4096  # of each shard
    mix: Mix = field(default_factory=Mix)


@dataclass(frozen=True)
class PoolConfig:
    """How large the two pools are, and what one LoRA sees."""

    shipped_styles: int = 20
    subject_views: int = 64  # pictures that a subject LoRA learns from
    style_subjects: int = 120  # base subjects that a style LoRA learns from
    style_views: int = 2  # pictures of each of them
    covers: int = 2  # cover pictures of each LoRA
    group: int = 8  # LoRAs trained in one batch
    style_copies: int = 3  # style LoRAs of the larger pool per style, on different subjects
    recipes: int = 200  # pictures of a subject and a style of the larger pool together
    second_takes: int = 71  # subjects of the larger pool that get a second LoRA


@dataclass(frozen=True)
class JudgeConfig:
    """How the judges are trained."""

    renders: int = 36  # of each subject
    epochs: int = 12


@dataclass(frozen=True)
class WorldConfig:
    """Everything that ``scripts/build_tiny_world.py`` needs to know."""

    seed: int = 0
    model: TinyFluxConfig = field(default_factory=TinyFluxConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    bank: BankConfig = field(default_factory=BankConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    turbo: TurboConfig = field(default_factory=TurboConfig)
    pool: PoolConfig = field(default_factory=PoolConfig)
    subject_lora: LoRATrainConfig = field(default_factory=LoRATrainConfig)
    style_lora: LoRATrainConfig = field(default_factory=LoRATrainConfig)
    large_lora: LoRATrainConfig = field(default_factory=LoRATrainConfig)
    judges: JudgeConfig = field(default_factory=JudgeConfig)


def load_world_config(path: Path) -> WorldConfig:
    """Read the YAML file; see `train.config.read_config`."""
    return read_config(WorldConfig, path)


@dataclass(frozen=True)
class Split:
    """Which subject is for what: the base model, the LoRAs that ship, the larger pool."""

    base: list[Subject]
    shipped: list[Subject]
    large: list[Subject]


def split_world() -> Split:
    """The three disjoint lists of subjects, by ``vocabulary.yaml``.

    Raises:
        ConfigError: If the vocabulary names a subject that cannot be drawn.
    """
    known = {subject.name: subject for subject in all_subjects()}
    groups = {group: group_names(group) for group in ("base", "loras")}
    unknown = [name for names in groups.values() for name in names if name not in known]
    if unknown:
        raise ConfigError(f"vocabulary.yaml names what cannot be drawn: {', '.join(unknown)}.")
    base, shipped = ([known[name] for name in groups[group]] for group in ("base", "loras"))
    taken = {*groups["base"], *groups["loras"]}
    return Split(base, shipped, [s for s in known.values() if s.name not in taken])
