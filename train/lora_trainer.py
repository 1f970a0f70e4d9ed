"""Trains many LoRAs at once over one frozen base.

The samples of K LoRAs stand one after another in a batch; each wrapped layer computes its frozen
base for all of them and adds every sample's own low-rank product by a batched matrix product. On
a CPU that is many times faster than K trainings, since the base's work is shared between large
batches. K = 1 is the ordinary training of one LoRA.

Shape legend: K LoRAs, b samples of each, T tokens, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from autolora.errors import ConfigError
from autolora.families.flux1.layers import LAYERS
from train.flow import add_noise, plain_attention, predict_velocity, sample_sigmas

Factors = dict[str, tuple[Tensor, Tensor]]


LAYER_CHOICES: dict[str, tuple[str, ...]] = {
    "all": (),
    "no-modulation": ("norm1_a.", "norm1_b.", ".norm."),
    "light": ("norm1_a.", "norm1_b.", ".norm.", ".ff_b."),
}
"""Which layers are left out, by a part of their names: modulations, the text's feed-forward."""


def told(default: Any, help: str) -> Any:
    """A field with its default, and with what a command line says of it."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class LoRATrainConfig:
    """How LoRAs are trained.

    Raises:
        ConfigError: Naming every value that is out of range.
    """

    steps: int = told(120, "optimizer steps")
    batch: int = told(8, "samples of each LoRA per step")
    rank: int = told(4, "rank of the factors")
    lr: float = told(4e-3, "learning rate after the warm-up")
    warmup: int = told(10, "steps in which the learning rate rises")
    empty_prompts: float = told(0.05, "share of samples trained without a caption")
    sigma_mean: float = told(0.6, "mean of the logit-normal noise levels")
    sigma_std: float = told(1.2, "deviation of the logit-normal noise levels")
    layers: str = told("light", f"linear layers of the blocks: {', '.join(LAYER_CHOICES)}")
    seed: int = told(0, "seed of everything drawn at random")

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be at least 1, not {getattr(self, name)}"
            for name in ("steps", "batch", "rank", "warmup")
            if getattr(self, name) < 1
        ]
        if self.lr <= 0:
            problems.append(f"lr must be positive, not {self.lr}")
        if not 0 <= self.empty_prompts <= 1:
            problems.append(f"empty_prompts must lie between 0 and 1, not {self.empty_prompts}")
        if self.layers not in LAYER_CHOICES:
            known = ", ".join(LAYER_CHOICES)
            problems.append(f"layers must be one of {known}, not {self.layers!r}")
        if problems:
            raise ConfigError("LoRA training: " + "; ".join(problems) + ".")


@dataclass
class LoRAData:
    """What one LoRA learns from.

    Attributes:
        latents: [n, C, h, w] clean latents.
        states: [n, c, L, D] token states of c captions per picture.
        pooled: [n, c, D'] pooled text of the same captions.
    """

    latents: Tensor
    states: Tensor
    pooled: Tensor


class BatchedLoRALinear(nn.Module):
    """A frozen base layer plus K low-rank products, one for each K-th of the batch."""

    def __init__(self, base: nn.Module, count: int, rank: int) -> None:
        super().__init__()
        self.base = base
        out_features, in_features = base.weight.shape
        device = base.weight.device
        self.down = nn.Parameter(torch.zeros(count, in_features, rank, device=device))
        self.up = nn.Parameter(torch.zeros(count, rank, out_features, device=device))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Random A, zero B: no effect at the start."""
        a = torch.randn(self.down.shape, generator=generator) / math.sqrt(self.down.shape[1])
        self.down.copy_(a)
        self.up.zero_()

    def factors(self, k: int) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r] of the k-th LoRA, float32 on the CPU."""
        down, up = self.down[k].detach(), self.up[k].detach()
        return down.T.float().cpu().contiguous(), up.T.float().cpu().contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """[K·b, (T,) in] to [K·b, (T,) out]."""
        y = self.base(x)
        grouped = x.reshape(self.down.shape[0], -1, x.shape[-1])
        delta = torch.bmm(torch.bmm(grouped, self.down.to(x.dtype)), self.up.to(x.dtype))
        return y + delta.view(y.shape)


def target_layers(dit: nn.Module, which: str) -> list[str]:
    """Names of the layers inside the blocks that are adapted; ``which`` as in LAYER_CHOICES."""
    names = [n for n in LAYERS.shapes(dit) if n.startswith(("blocks.", "single_blocks."))]
    return [n for n in names if not any(part in n for part in LAYER_CHOICES[which])]


def _batch(
    data: list[LoRAData], config: LoRATrainConfig, empty: tuple[Tensor, Tensor], g: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """One step's clean latents, token states and pooled text, [K·b, …]."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for one in data:
        pick = torch.randint(len(one.latents), (config.batch,), generator=g)
        column = torch.randint(one.states.shape[1], (config.batch,), generator=g)
        states, pooled = one.states[pick, column].clone(), one.pooled[pick, column].clone()
        blank = torch.rand(config.batch, generator=g) < config.empty_prompts
        states[blank], pooled[blank] = empty[0].to(states), empty[1].to(pooled)
        parts.append((one.latents[pick], states, pooled))
    latents, states, pooled = (torch.cat(column) for column in zip(*parts, strict=True))
    return latents.float(), states, pooled


def _learning_rate(step: int, config: LoRATrainConfig) -> float:
    warm = min(1.0, (step + 1) / config.warmup)
    return config.lr * warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))


class MultiLoRATrainer:
    """Trains groups of K LoRAs, one group after another, over one frozen base.

    Use as a context: the layers are wrapped while it is open and always unwrapped. The wrappers
    are kept between groups, so that compiled blocks are compiled once.
    """

    def __init__(
        self, dit: nn.Module, count: int, config: LoRATrainConfig, compile_blocks: bool = False
    ) -> None:
        self.dit, self.count, self.config = dit.requires_grad_(False), count, config
        self.names = target_layers(dit, config.layers)
        self.device = next(dit.parameters()).device
        self.layers: dict[str, BatchedLoRALinear] = {}
        blocks = (*dit.blocks, *dit.single_blocks)  # type: ignore[misc]
        self.compiled = blocks if compile_blocks else ()

    def __enter__(self) -> MultiLoRATrainer:
        for name in self.names:
            layer = BatchedLoRALinear(self.dit.get_submodule(name), self.count, self.config.rank)
            self._put(name, layer)
            self.layers[name] = layer
        for block in self.compiled:
            block.compile(dynamic=False)
        return self

    def __exit__(self, *exc: object) -> None:
        for name, layer in self.layers.items():
            self._put(name, layer.base)
        for block in self.compiled:
            block._compiled_call_impl = None
        self.layers = {}

    def _put(self, name: str, module: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self.dit.get_submodule(parent), child, module)

    def train(
        self,
        data: list[LoRAData],
        empty: tuple[Tensor, Tensor],
        on_step: Callable[[int, float], None] | None = None,
        **model_inputs: Any,
    ) -> list[Factors]:
        """Trains one LoRA for each entry of ``data``, all at once, from scratch.

        Args:
            data: What each LoRA learns from; ``count`` entries.
            empty: Token states [L, D] and pooled text [D'] of the empty prompt.
            on_step: Called with the step and its mean loss.
            model_inputs: Further inputs of the model function, such as ``guidance``.

        Returns:
            For each LoRA, layer name to (A [r, in], B [out, r]), scale 1, float32 on the CPU.

        Raises:
            ValueError: If the number of entries is not the number of LoRAs.
        """
        if len(data) != self.count:
            raise ValueError(f"{len(data)} data sets for {self.count} LoRAs")
        config = self.config
        generator = torch.Generator().manual_seed(config.seed)
        for layer in self.layers.values():
            layer.reset(generator)
        parameters = [p for layer in self.layers.values() for p in (layer.down, layer.up)]
        optimizer = torch.optim.AdamW(
            parameters, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        )
        for step in range(config.steps):
            optimizer.param_groups[0]["lr"] = _learning_rate(step, config)
            loss = self._loss(_batch(data, config, empty, generator), generator, model_inputs)
            optimizer.zero_grad(set_to_none=True)
            # The sum over LoRAs, so that one LoRA's gradient does not shrink with their number.
            (loss * self.count).backward()
            optimizer.step()
            if on_step is not None:
                on_step(step, loss.item())
        return [
            {name: layer.factors(k) for name, layer in self.layers.items()}
            for k in range(self.count)
        ]

    def _loss(
        self, batch: tuple[Tensor, Tensor, Tensor], generator: torch.Generator, inputs: Any
    ) -> Tensor:
        config = self.config
        noise = torch.randn(batch[0].shape, generator=generator).to(self.device)
        x0, states, pooled = (t.to(self.device) for t in batch)
        sigmas = sample_sigmas(len(x0), config.sigma_mean, config.sigma_std, generator)
        sigmas = sigmas.to(self.device)
        noisy = add_noise(x0, noise, sigmas)
        with torch.autocast(self.device.type, torch.bfloat16), plain_attention(self.device):
            velocity = predict_velocity(self.dit, noisy, sigmas, states, pooled, **inputs)
        return (velocity.float() - (noise - x0)).pow(2).mean()
