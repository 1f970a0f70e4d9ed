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
from train.tiny_world.subjects import Subject, all_subjects, split_subjects


@dataclass(frozen=True)
class PoolConfig:
    """How large the two pools are, and what one LoRA sees."""

    shipped_styles: int = 16
    subject_views: int = 24  # pictures that a subject LoRA learns from
    style_subjects: int = 75  # base subjects that a style LoRA learns from
    style_views: int = 2  # pictures of each of them
    covers: int = 2  # cover pictures of each LoRA
    group: int = 8  # LoRAs trained in one batch
    style_copies: int = 3  # style LoRAs of the larger pool per style, on different subjects
    recipes: int = 200  # pictures of a subject and a style of the larger pool together
    second_takes: int = 71  # subjects of the larger pool that get a second LoRA


@dataclass(frozen=True)
class WorldConfig:
    """Everything that ``scripts/build_tiny_world.py`` needs to know."""

    base_subjects: int = 150
    shipped_subjects: tuple[str, ...] = ()
    polished: tuple[str, ...] = ()  # shipped LoRAs (file stems) that are trained again, longer
    views: int = 48  # pictures of each base subject
    seed: int = 0
    model: TinyFluxConfig = field(default_factory=TinyFluxConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    pool: PoolConfig = field(default_factory=PoolConfig)
    shipped_lora: LoRATrainConfig = field(default_factory=LoRATrainConfig)
    large_lora: LoRATrainConfig = field(default_factory=LoRATrainConfig)
    polish_lora: LoRATrainConfig = field(default_factory=LoRATrainConfig)


def load_world_config(path: Path) -> WorldConfig:
    """Read the YAML file; see `train.config.read_config`."""
    return read_config(WorldConfig, path)


@dataclass(frozen=True)
class Split:
    """Which subject is for what."""

    base: list[Subject]
    shipped: list[Subject]
    large: list[Subject]


def split_world(config: WorldConfig) -> Split:
    """The three disjoint lists of subjects.

    Raises:
        ConfigError: If a shipped subject is not drawable.
    """
    known = {s.name for s in all_subjects()}
    unknown = [name for name in config.shipped_subjects if name not in known]
    if unknown:
        raise ConfigError(
            f"shipped_subjects are not among the drawable ones: {', '.join(unknown)}."
        )
    names = config.shipped_subjects
    return Split(*split_subjects(config.base_subjects, len(names), names))
