"""Trains the pools of the tiny world: subject and style LoRAs, many in one batch."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from autolora.families.tiny.model import TinyEncoder
from autolora.lora import LoRA, save_lora
from autolora.minilm import MiniLM
from train.lora_trainer import LoRAData, LoRATrainConfig, MultiLoRATrainer
from train.tiny_world.checkpoint import progress
from train.tiny_world.compositions import Mix, compose
from train.tiny_world.data import TextTable, Views, draw_views
from train.tiny_world.styles import STYLES, VARIANTS, Style
from train.tiny_world.subjects import Subject
from train.tiny_world.world import PoolConfig, Split

LORA_MIX = Mix(several=0.08, pairs=0.15, sizes=0.1, scenes=0.2)
"""What a LoRA's pictures show: its subject alone mostly, so that it is learned first."""


@dataclass(frozen=True)
class Job:
    """One LoRA to train: a subject, or a style shown on some base subjects."""

    name: str  # file stem
    concept: str  # what it teaches, as captions name it
    subject: Subject | None
    style: Style | None
    seed: int


def shipped_jobs(split: Split, pool: PoolConfig) -> list[Job]:
    """The committed pool: subjects, then styles."""
    subjects = [Job(s.slug, s.name, s, None, i) for i, s in enumerate(split.shipped)]
    styles = STYLES[: pool.shipped_styles]
    return subjects + [Job(s.slug, s.name, None, s, 1000 + i) for i, s in enumerate(styles)]


def large_jobs(split: Split, pool: PoolConfig) -> list[Job]:
    """The larger pool: all other subjects, style variants in copies, and second takes.

    Second takes of shipped subjects and styles (other pictures, other seeds) let the retriever
    learn what does not matter about a LoRA, without ever seeing the shipped files.
    """
    subjects = [Job(s.slug, s.name, s, None, 2000 + i) for i, s in enumerate(split.large)]
    looks = [(s, c) for s in VARIANTS for c in range(pool.style_copies)]
    styles = [Job(f"{s.slug}-{c + 1}", s.name, None, s, 4000 + i) for i, (s, c) in enumerate(looks)]
    takes = [
        Job(f"{s.slug}-take-2", s.name, s, None, 6000 + i)
        for i, s in enumerate(split.large[: pool.second_takes])
    ]
    return styles + subjects + takes


def job_views(
    job: Job, encoder: TinyEncoder, split: Split, pool: PoolConfig, size: int, seed: int
) -> Views:
    """The pictures one LoRA learns from."""
    rng = np.random.default_rng((seed, job.seed))
    if job.subject is not None:
        shown = [job.subject] * pool.subject_views
    else:
        order = rng.permutation(len(split.base))[: pool.style_subjects]
        shown = [split.base[i] for i in order for _ in range(pool.style_views)]
    compositions = [compose(subject, split.base, rng, LORA_MIX) for subject in shown]
    return draw_views(encoder, compositions, rng, size, job.style)


def lora_data(views: Views, text: TextTable) -> LoRAData:
    """Joins latents with the text states of their captions."""
    rows = torch.tensor([[text.row[c] for c in captions] for captions in views.captions])
    return LoRAData(views.latents, text.states[rows], text.pooled[rows])


def train_jobs(
    jobs: list[Job],
    dit: nn.Module,
    encoder: TinyEncoder,
    minilm: MiniLM,
    split: Split,
    pool: PoolConfig,
    config: LoRATrainConfig,
    folder: Path,
    seed: int = 0,
    deadline: float | None = None,
) -> int:
    """Trains what is missing in ``folder``; one file per LoRA, so that it can be interrupted.

    Args:
        jobs: What to train; a short last group is filled up with copies that are thrown away.
        dit: The base model.
        encoder: Makes latents of the renders.
        minilm: Encodes the captions.
        split: The subjects.
        pool: How many pictures, and how many LoRAs at once.
        config: How one LoRA is trained.
        folder: Receives ``<name>.safetensors``.
        seed: Of the renders.
        deadline: ``time.monotonic()`` after which no further group is started.

    Returns:
        How many LoRAs are still missing.
    """
    size, length = dit.config.size, dit.config.text_length
    missing = [j for j in jobs if not (folder / f"{j.name}.safetensors").exists()]
    base = copy.deepcopy(dit).bfloat16().eval()
    groups = [missing[i : i + pool.group] for i in range(0, len(missing), pool.group)]
    done = 0
    with MultiLoRATrainer(base, pool.group, config, compile_blocks=True) as trainer:
        for group in progress(groups, f"LoRAs, {pool.group} at once"):
            if deadline is not None and time.monotonic() > deadline:
                break
            views = [job_views(job, encoder, split, pool, size, seed) for job in group]
            captions = [c for v in views for cs in v.captions for c in cs]
            text = TextTable.build(captions, minilm, length)
            data = [lora_data(v, text) for v in views]
            filled = data + [data[0]] * (pool.group - len(data))
            factors = trainer.train(filled, (text.states[0], text.pooled[0]), _note_loss)
            for job, one in zip(group, factors, strict=False):
                save_lora(folder / f"{job.name}.safetensors", one, "kohya", dtype="bfloat16")
            done += len(group)
    return len(missing) - done


def _note_loss(step: int, loss: float) -> None:
    if step % 10 == 0:
        progress.note(f"step {step} loss {loss:.3f}")


def trained(job: Job, folder: Path) -> LoRA:
    """The LoRA of a job that has been trained."""
    return LoRA.load(folder / f"{job.name}.safetensors")
