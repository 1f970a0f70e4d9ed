"""Trains the tiny autoencoder on renders, plain and styled."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from autolora.families.tiny.model import TinyDecoder, TinyEncoder
from train.tiny_world.checkpoint import load_checkpoint, progress, save_checkpoint
from train.tiny_world.compositions import Mix, compose, paint, paint_styled
from train.tiny_world.styles import STYLES
from train.tiny_world.subjects import Subject


@dataclass(frozen=True)
class AutoencoderConfig:
    """How the autoencoder is trained."""

    steps: int = 2500
    batch: int = 16
    lr: float = 2e-3
    latent_noise: float = 0.1  # std of the Gaussian noise that keeps the decoder robust
    size: int = 128
    crop: int = 96


class RenderStream(IterableDataset[Tensor]):
    """Endless random views of subjects, half of them styled, as [3, crop, crop] in [-1, 1]."""

    def __init__(self, subjects: list[Subject], config: AutoencoderConfig, seed: int = 0) -> None:
        self.subjects, self.config, self.seed = subjects, config, seed

    def __iter__(self) -> Iterator[Tensor]:
        info = get_worker_info()
        rng = np.random.default_rng((self.seed, info.id if info else 0))
        c = self.config
        while True:
            subject = self.subjects[rng.integers(len(self.subjects))]
            what = compose(subject, self.subjects, rng, Mix())
            if rng.random() < 0.5:
                picture = paint_styled(what, STYLES[rng.integers(len(STYLES))], c.size, rng)
            else:
                picture = paint(what, c.size, rng)[0]
            x, y = rng.integers(0, c.size - c.crop + 1, 2)
            crop = np.ascontiguousarray(picture[y : y + c.crop, x : x + c.crop].transpose(2, 0, 1))
            yield torch.from_numpy(crop).float() * 2 - 1


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 plus L1 of the finite differences, which keeps edges crisp."""
    loss = F.l1_loss(output, target)
    for dim in (2, 3):
        loss = loss + F.l1_loss(output.diff(dim=dim), target.diff(dim=dim))
    return loss


@torch.no_grad()
def measure_latents(encoder: TinyEncoder, decoder: TinyDecoder, pictures: Tensor) -> None:
    """Stores per-channel latent statistics in both halves."""
    z = encoder.raw(pictures).float()
    for module in (encoder, decoder):
        module.mean.copy_(z.mean((0, 2, 3)))
        module.std.copy_(z.std((0, 2, 3)))


def train_autoencoder(
    subjects: list[Subject], config: AutoencoderConfig, folder: Path
) -> tuple[TinyEncoder, TinyDecoder]:
    """Trains, or resumes from ``folder``; returns encoder and decoder in evaluation mode."""
    encoder, decoder = TinyEncoder(), TinyDecoder()
    model = nn.ModuleDict({"encoder": encoder, "decoder": decoder}).to(
        memory_format=torch.channels_last
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
    state = folder / "autoencoder.pt"
    start = load_checkpoint(state, model, optimizer)
    stream = RenderStream(subjects, config, seed=start)
    loader = iter(DataLoader(stream, batch_size=config.batch, num_workers=1, prefetch_factor=4))
    last_saved = time.monotonic()
    for step in progress(range(start, config.steps), "autoencoder", total=config.steps):
        warm = min(1.0, (step + 1) / 100)
        optimizer.param_groups[0]["lr"] = config.lr * warm * (1 - step / config.steps) + 1e-5
        x = next(loader).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            z = encoder.raw(x)
            noisy = z + config.latent_noise * torch.randn_like(z)
            loss = reconstruction_loss(decoder.raw(noisy).float(), x)
            # A weak pull keeps the latents near unit scale, so that the noise means something.
            loss = loss + 1e-3 * (z.float().pow(2).mean() - 1).relu()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            progress.note(f"loss {loss.item():.4f}")
        if time.monotonic() - last_saved > 60 or step + 1 == config.steps:
            save_checkpoint(state, model, optimizer, step + 1)
            last_saved = time.monotonic()
    model.eval()
    measure_latents(encoder, decoder, torch.cat([next(loader) for _ in range(16)]))
    return encoder, decoder
