"""Distils the tiny FLUX to a few steps without guidance: piecewise rectified flow.

PeRFlow (arXiv 2405.07510) cuts the noise levels into as many windows as the student takes steps.
In each, the guided teacher walks from the window's noisy end to its clean end; the student learns
the straight line between the two, so that one step crosses the window. Guidance is in the teacher's
walk, so the student needs no second pass.

Shape legend: B samples, W windows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from autolora.families.tiny.model import TinyFluxDiT
from train.flow import add_noise, plain_attention, predict_velocity
from train.tiny_world.bank import Bank
from train.tiny_world.base import BaseConfig, compile_blocks, train_relay


@dataclass(frozen=True)
class TurboConfig(BaseConfig):
    """How the few-step twin is distilled."""

    steps: int = 4000
    lr: float = 3e-4
    muon_lr: float = 3e-4
    average: float = 0.998
    student_steps: int = 4
    teacher_steps: int = 5  # of the teacher in one window
    guidance: float = 3.0


def window_ends(count: int) -> Tensor:
    """Noise levels [W + 1] between which the sampler steps, from 1 to 0."""
    from diffsynth.diffusion import FlowMatchScheduler

    sigmas, _ = FlowMatchScheduler("FLUX.1").set_timesteps_fn(count)
    return torch.cat([sigmas.float(), torch.zeros(1)])


@torch.no_grad()
def guided_walk(
    teacher: TinyFluxDiT,
    noisy: Tensor,
    begin: Tensor,
    end: Tensor,
    text: tuple[Tensor, Tensor],
    empty: tuple[Tensor, Tensor],
    config: TurboConfig,
) -> Tensor:
    """Euler steps of the teacher with classifier-free guidance, each sample in its own window.

    Args:
        teacher: The base model.
        noisy: [B, C, h, w] at noise levels ``begin``.
        begin: [B] noise levels.
        end: [B] noise levels.
        text: Token states [B, L, D] and pooled text [B, D'].
        empty: The same of the empty prompt, with B = 1.
        config: Steps and guidance.

    Returns:
        [B, C, h, w] at noise levels ``end``.
    """
    states = torch.cat([text[0], empty[0].expand_as(text[0])])
    pooled = torch.cat([text[1], empty[1].expand_as(text[1])])
    x = noisy
    for n in range(config.teacher_steps):
        here, there = (begin + (end - begin) * (k / config.teacher_steps) for k in (n, n + 1))
        both = predict_velocity(teacher, torch.cat([x, x]), torch.cat([here, here]), states, pooled)
        with_text, without = both.float().chunk(2)
        velocity = without + config.guidance * (with_text - without)
        x = x + (there - here).view(-1, 1, 1, 1) * velocity
    return x


def turbo_loss(
    config: TurboConfig,
    student: TinyFluxDiT,
    teacher: TinyFluxDiT,
    bank: Bank,
    ends: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Mean squared error of the student's velocity against the window's straight line."""
    x0, states, pooled = bank.sample(config.batch, 0.0, generator)
    device = x0.device
    empty = bank.states[:1], bank.pooled[:1]
    window = torch.randint(config.student_steps, (config.batch,), generator=generator)
    begin, end = ends[window].to(device), ends[window + 1].to(device)
    noise = torch.randn(x0.shape, generator=generator).to(device)
    share = torch.rand(config.batch, generator=generator).to(device)
    with torch.autocast(device.type, torch.bfloat16), plain_attention(device):
        noisy = add_noise(x0, noise, begin)
        target = guided_walk(teacher, noisy, begin, end, (states, pooled), empty, config)
        line = (target - noisy) / (end - begin).view(-1, 1, 1, 1)
        sigma = begin + share * (end - begin)
        between = noisy + (share * (end - begin)).view(-1, 1, 1, 1) * line
        velocity = predict_velocity(student, between, sigma, states, pooled)
        return (velocity.float() - line).pow(2).mean()


def train_turbo(
    config: TurboConfig,
    student: TinyFluxDiT,
    teacher: TinyFluxDiT,
    bank: Bank,
    folder: Path,
    minutes: float | None = None,
) -> TinyFluxDiT:
    """Distils ``teacher`` into ``student``, or goes on from ``turbo.pt`` in ``folder``.

    Args:
        config: How.
        student: Starts as a copy of the teacher.
        teacher: The base model, frozen.
        bank: The pictures whose noised latents begin the windows.
        folder: Of the checkpoint.
        minutes: Stop after so long; None runs to the last step.

    Returns:
        The averaged student for evaluation.
    """
    for dit in (student, teacher):
        compile_blocks(dit, config)
    ends = window_ends(config.student_steps)

    def loss(generator: torch.Generator) -> Tensor:
        return turbo_loss(config, student, teacher, bank, ends, generator)

    train_relay(config, student, loss, folder / "turbo.pt", bank.refresh, minutes)
    return student
