"""Trains the tiny FLUX on the bank of pictures: a relay that goes on wherever it was stopped.

The rate stays constant after a warm-up, and what is kept is a moving average of the weights: the
run has no planned end, so it can be continued at any time. With ``decay_from`` set, the rate falls
to zero towards ``steps``, for the last leg.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from autolora.families.tiny.model import TinyFluxDiT
from train.flow import add_noise, plain_attention, predict_velocity, sample_sigmas
from train.tiny_world.bank import Bank
from train.tiny_world.checkpoint import load_checkpoint, progress, save_checkpoint


@dataclass(frozen=True)
class BaseConfig:
    """How the base model is trained."""

    steps: int = 60000
    batch: int = 64
    lr: float = 1e-3
    muon_lr: float = 1e-3  # of the blocks' matrices, matched to AdamW's step size
    warmup: int = 200
    decay_from: int = 0  # step at which the rate begins to fall; 0: it never does
    average: float = 0.9995  # decay of the moving average of the weights, per step
    empty_prompts: float = 0.1  # share of samples trained without a caption, for guidance
    sigma_mean: float = 0.4  # of the logit-normal noise levels
    sigma_std: float = 1.2
    compile: bool = True
    cuda_batch: int = 512  # a batch that fills a card, with rates raised to match
    cuda_lr: float = 2e-3

    def on_cuda(self) -> Self:
        """The same training with a card's batch and rates."""
        ratio = self.cuda_lr / self.lr
        return replace(self, batch=self.cuda_batch, lr=self.cuda_lr, muon_lr=self.muon_lr * ratio)


class Optimizers:
    """Muon for the matrices of attention and feed-forward, AdamW for everything else.

    Muon (Keller Jordan, 2024; scaled to AdamW's step as in arXiv 2502.16982) orthogonalizes a
    matrix's update; modulations, embeddings, biases and the output stay with AdamW.
    """

    def __init__(self, dit: nn.Module, config: BaseConfig) -> None:
        named = list(dit.named_parameters())
        matrices = {n for n, p in named if _is_matrix(n, p)}
        self.adam = torch.optim.AdamW(
            [p for n, p in named if n not in matrices],
            lr=config.lr,
            betas=(0.9, 0.98),
            weight_decay=0.01,
            fused=True,
        )
        self.muon = torch.optim.Muon(
            [p for n, p in named if n in matrices],
            lr=config.muon_lr,
            weight_decay=0.01,
            adjust_lr_fn="match_rms_adamw",
        )
        self.config = config

    def set_rate(self, share: float) -> None:
        """Sets both rates to a share of their configured values."""
        self.adam.param_groups[0]["lr"] = self.config.lr * share
        self.muon.param_groups[0]["lr"] = self.config.muon_lr * share

    def zero_grad(self) -> None:
        """Drops all gradients."""
        self.adam.zero_grad(set_to_none=True)
        self.muon.zero_grad(set_to_none=True)

    def step(self) -> None:
        """One step of both."""
        self.adam.step()
        self.muon.step()

    def state_dict(self) -> dict[str, Any]:
        """Both states."""
        return {"adam": self.adam.state_dict(), "muon": self.muon.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave."""
        self.adam.load_state_dict(state["adam"])
        self.muon.load_state_dict(state["muon"])


def _is_matrix(name: str, parameter: Tensor) -> bool:
    inside = name.startswith(("blocks.", "single_blocks."))
    return parameter.ndim == 2 and inside and ".linear." not in name


class Average:
    """A moving average of a module's weights, kept in float32 beside it."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.count = 0
        self.weights = {n: p.detach().clone() for n, p in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Takes the module's weights in; early on, the average is over all steps so far."""
        self.count += 1
        keep = min(self.decay, (1 + self.count) / (10 + self.count))
        own, new = list(self.weights.values()), list(module.state_dict().values())
        torch._foreach_lerp_(own, new, 1 - keep)

    def state_dict(self) -> dict[str, Any]:
        """Weights and how many steps they average."""
        return {"weights": self.weights, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave."""
        self.weights, self.count = state["weights"], state["count"]


def rate_share(step: int, config: BaseConfig) -> float:
    """The share of the full rate at a step."""
    share = min(1.0, (step + 1) / config.warmup)
    if 0 < config.decay_from < step:
        share *= max(0.0, 1 - (step - config.decay_from) / (config.steps - config.decay_from))
    return share


def train_relay(
    config: BaseConfig,
    dit: nn.Module,
    loss: Callable[[torch.Generator], Tensor],
    state: Path,
    on_save: Callable[[], object] = lambda: None,
    minutes: float | None = None,
) -> None:
    """Trains, or goes on from ``state``; ``dit`` has the averaged weights in the end.

    Args:
        config: How.
        dit: The model; where a run that has no checkpoint starts from.
        loss: The loss of one step, all of whose random numbers come from the generator it is given.
        state: The checkpoint.
        on_save: Called after each checkpoint.
        minutes: Stop after so long; None runs to the last step.
    """
    optimizers, average = Optimizers(dit, config), Average(dit, config.average)
    start = load_checkpoint(state, dit, optimizers, average=average)
    saved = begun = time.monotonic()
    mean_loss = math.nan
    for step in progress(range(start, config.steps), state.stem, total=config.steps):
        optimizers.set_rate(rate_share(step, config))
        # Each step has its own random numbers, so a run that was stopped goes on to the same ones.
        value = loss(torch.Generator().manual_seed(step))
        optimizers.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(dit.parameters(), 1.0)
        optimizers.step()
        average.update(dit)
        one = value.item()
        mean_loss = one if math.isnan(mean_loss) else 0.995 * mean_loss + 0.005 * one
        now = time.monotonic()
        out_of_time = minutes is not None and now - begun > 60 * minutes
        if step % 50 == 0:
            progress.note(f"loss {mean_loss:.4f}")
        if now - saved > 180 or step + 1 == config.steps or out_of_time:
            save_checkpoint(state, dit, optimizers, step + 1, average=average.state_dict())
            on_save()
            saved = now
        if out_of_time:
            break
    dit.load_state_dict(average.weights)
    dit.eval().requires_grad_(False)


def train_base(
    config: BaseConfig, dit: TinyFluxDiT, bank: Bank, folder: Path, minutes: float | None = None
) -> TinyFluxDiT:
    """Trains from ``dit``, or goes on from ``folder``; returns the averaged model for evaluation.

    Args:
        config: How.
        dit: Where a run that has no checkpoint starts from.
        bank: The pictures; shards that appear during the run are taken up.
        folder: Of the checkpoint ``base.pt``.
        minutes: Stop after so long; None runs to the last step.
    """
    compile_blocks(dit, config)

    def loss(generator: torch.Generator) -> Tensor:
        return flow_loss(config, dit, bank, generator)

    train_relay(config, dit, loss, folder / "base.pt", bank.refresh, minutes)
    return dit


def compile_blocks(dit: nn.Module, config: BaseConfig) -> None:
    """Compiles the blocks, where the config wants it: a step then takes half the time on a CPU."""
    if config.compile:
        for block in (*dit.blocks, *dit.single_blocks):  # type: ignore[misc]
            block.compile(dynamic=False)


def flow_loss(config: BaseConfig, dit: nn.Module, bank: Bank, generator: torch.Generator) -> Tensor:
    """The flow-matching loss of one batch: mean squared error of the velocity."""
    x0, states, pooled = bank.sample(config.batch, config.empty_prompts, generator)
    device = x0.device
    noise = torch.randn(x0.shape, generator=generator).to(device)
    sigmas = sample_sigmas(config.batch, config.sigma_mean, config.sigma_std, generator).to(device)
    with torch.autocast(device.type, torch.bfloat16), plain_attention(device):
        velocity = predict_velocity(dit, add_noise(x0, noise, sigmas), sigmas, states, pooled)
        return (velocity.float() - (noise - x0)).pow(2).mean()


def averaged_weights(folder: Path) -> tuple[dict[str, Tensor], int]:
    """The averaged weights of a checkpoint, and its step.

    Raises:
        FileNotFoundError: If there is no checkpoint yet.
    """
    state = torch.load(folder / "base.pt", weights_only=True, map_location="cpu")
    return state["average"]["weights"], int(state["step"])
