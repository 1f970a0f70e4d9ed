"""A bank of training pictures: shards of latents, captions and their text states on disk.

A shard is drawn from its number alone, so shards can be made in any order, by any process, while a
training already reads those that are there.

Shape legend: N pictures, C captions of each, U different captions, L text tokens, D their width.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from autolora.errors import ConfigError
from autolora.families.tiny.model import TinyEncoder
from autolora.minilm import MiniLM
from train.tiny_world.compositions import Mix, compose, describe, paint
from train.tiny_world.data import TextTable, encode_pictures
from train.tiny_world.subjects import Subject

CAPTIONS_EACH = 3


@dataclass(frozen=True)
class Shard:
    """Pictures and captions of one file.

    Attributes:
        latents: [N, 16, h, w] bf16.
        rows: [N, C] row of each caption in ``states``; row 0 is the empty caption.
        states: [U, L, D] bf16.
        pooled: [U, D] bf16.
        captions: The U captions.
    """

    latents: Tensor
    rows: Tensor
    states: Tensor
    pooled: Tensor
    captions: list[str]


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard lies."""
    return folder / f"shard-{number:03d}.safetensors"


def make_shard(
    folder: Path,
    number: int,
    count: int,
    subjects: Sequence[Subject],
    encoder: TinyEncoder,
    minilm: MiniLM,
    size: int,
    text_length: int,
    mix: Mix,
    seed: int = 0,
) -> Path:
    """Draws, encodes and writes one shard, unless it is there.

    Args:
        folder: Of the bank.
        number: Of the shard; with ``seed`` it determines every picture.
        count: Pictures.
        subjects: What may be in them; each is drawn equally often.
        encoder: Makes the latents.
        minilm: Encodes the captions.
        size: Side of the pictures in pixels.
        text_length: Tokens that captions are padded to.
        mix: Shares of the kinds of picture.
        seed: Of the bank.
    """
    path = shard_path(folder, number)
    if path.exists():
        return path
    rng = np.random.default_rng((seed, number))
    order = [
        int(i) for _ in range(-(-count // len(subjects))) for i in rng.permutation(len(subjects))
    ]
    latents, captions = [], []
    for start in range(0, count, 64):
        pictures = []
        for i in order[start : min(start + 64, count)]:
            what = compose(subjects[i], list(subjects[:i]) + list(subjects[i + 1 :]), rng, mix)
            pictures.append(paint(what, size, rng)[0])
            captions.append([describe(what, rng) for _ in range(CAPTIONS_EACH)])
        latents.append(encode_pictures(encoder, pictures))
    table = TextTable.build([c for three in captions for c in three], minilm, text_length)
    rows = torch.tensor([[table.row[c] for c in three] for three in captions], dtype=torch.int32)
    tensors = {
        "latents": torch.cat(latents).contiguous(),
        "rows": rows,
        "states": table.states.contiguous(),
        "pooled": table.pooled.contiguous(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    save_file(tensors, str(part), metadata={"captions": json.dumps(list(table.row))})
    os.replace(part, path)
    return path


def load_shard(path: Path) -> Shard:
    """Reads a shard.

    Raises:
        ConfigError: If the file is damaged.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            captions = json.loads((file.metadata() or {})["captions"])
            return Shard(
                *(file.get_tensor(n) for n in ("latents", "rows", "states", "pooled")), captions
            )
    except Exception as error:
        raise ConfigError(
            f"{path} is damaged ({error}); delete it, and it is made again."
        ) from error


class Bank:
    """All shards of a folder as one set; takes up shards that appear while it is in use."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        self.folder, self.device = folder, device
        self.loaded: list[Path] = []
        self.latents = torch.empty(0)
        self.rows = torch.empty(0, dtype=torch.long)
        self.states, self.pooled = torch.empty(0), torch.empty(0)
        if not self.refresh():
            raise ConfigError(f"There are no pictures in {folder}; run the stage `bank` first.")

    def refresh(self) -> int:
        """Loads shards that are new; returns how many there are."""
        for path in sorted(self.folder.glob("shard-*.safetensors")):
            if path not in self.loaded:
                self._take(load_shard(path))
                self.loaded.append(path)
        return len(self.loaded)

    def _take(self, shard: Shard) -> None:
        rows = shard.rows.long() + len(self.states)
        for name, part in (
            ("latents", shard.latents),
            ("rows", rows),
            ("states", shard.states),
            ("pooled", shard.pooled),
        ):
            part, have = part.to(self.device), getattr(self, name)
            setattr(self, name, part if not len(have) else torch.cat([have, part]))

    def sample(
        self, count: int, empty_prompts: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A batch: latents [count, 16, h, w] float32, token states and pooled text in bf16."""
        pick = torch.randint(len(self.latents), (count,), generator=generator)
        column = torch.randint(self.rows.shape[1], (count,), generator=generator)
        blank = torch.rand(count, generator=generator) < empty_prompts
        rows = self.rows[pick.to(self.device), column.to(self.device)]
        rows[blank.to(self.device)] = 0  # the first shard's first row is the empty caption
        return self.latents[pick.to(self.device)].float(), self.states[rows], self.pooled[rows]
