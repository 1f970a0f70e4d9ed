"""Trains the tiny FLUX on the base subjects."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from autolora.families.tiny.model import TinyFluxConfig, TinyFluxDiT
from train.flow import add_noise, plain_attention, predict_velocity, sample_sigmas
from train.tiny_world.checkpoint import load_checkpoint, progress, save_checkpoint
from train.tiny_world.data import TextTable, Views


@dataclass(frozen=True)
class BaseConfig:
    """How the base model is trained."""

    steps: int = 7000
    batch: int = 64
    lr: float = 1.2e-3
    warmup: int = 200
    empty_prompts: float = 0.1  # share of samples trained without a caption, for guidance
    sigma_mean: float = 0.4  # of the logit-normal noise levels
    sigma_std: float = 1.2
    compile: bool = True


def train_base(
    config: BaseConfig, model_config: TinyFluxConfig, views: Views, text: TextTable, folder: Path
) -> TinyFluxDiT:
    """Trains, or resumes from ``folder``; returns the model in evaluation mode."""
    torch.manual_seed(0)
    dit = TinyFluxDiT(model_config)
    dit.init_weights()
    optimizer = torch.optim.AdamW(
        dit.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    state = folder / "base.pt"
    start = load_checkpoint(state, dit, optimizer)
    if config.compile:
        for block in (*dit.blocks, *dit.single_blocks):
            block.compile(dynamic=False)
    rows = torch.tensor([[text.row[c] for c in captions] for captions in views.captions])
    generator = torch.Generator().manual_seed(start + 1)
    last_saved = time.monotonic()
    average = 0.0
    for step in progress(range(start, config.steps), "base model", total=config.steps):
        decay = max(0.0, 1 - step / config.steps)
        optimizer.param_groups[0]["lr"] = config.lr * min(1.0, (step + 1) / config.warmup) * decay
        pick = torch.randint(len(views.latents), (config.batch,), generator=generator)
        column = torch.randint(rows.shape[1], (config.batch,), generator=generator)
        row = rows[pick, column]
        row[torch.rand(config.batch, generator=generator) < config.empty_prompts] = 0
        x0 = views.latents[pick].float()
        noise = torch.randn(x0.shape, generator=generator)
        sigmas = sample_sigmas(config.batch, config.sigma_mean, config.sigma_std, generator)
        noisy = add_noise(x0, noise, sigmas)
        with torch.autocast("cpu", torch.bfloat16), plain_attention(x0.device):
            velocity = predict_velocity(dit, noisy, sigmas, text.states[row], text.pooled[row])
            loss = (velocity.float() - (noise - x0)).pow(2).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
        nn.utils.clip_grad_norm_(dit.parameters(), 1.0)
        optimizer.step()
        average = loss.item() if step == start else 0.99 * average + 0.01 * loss.item()
        if step % 50 == 0:
            progress.note(f"loss {average:.4f}")
        if time.monotonic() - last_saved > 120 or step + 1 == config.steps:
            save_checkpoint(state, dit, optimizer, step + 1)
            last_saved = time.monotonic()
    return dit.eval().requires_grad_(False)
