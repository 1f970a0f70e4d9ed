"""Trains the gates by anti-interference flow matching.

    python -m train.gate --config configs/train/gate.yaml
    accelerate launch -m train.gate --config configs/train/gate.yaml

Several LoRAs are attached at once; the picture and the caption are those of one of them (or of a
recipe, a picture that several made together). The flow-matching loss then teaches the gates to let
those speak that the caption asks for and the others be silent. The second term is the paper's
anti-interference hinge: under a caption that asks for another attached LoRA, the same noisy latents
must be predicted badly, ``L = L1 + weight * max(0, margin - L2)``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from autolora.errors import AutoLoRAError, ConfigError
from autolora.fusion import GateBank, attached, save_gates
from autolora.lora import LoRA, Pool
from train.config import read_config
from train.flow import add_noise, plain_attention, predict_velocity, sample_sigmas
from train.lora import encode_text, guidance_input, load_for_training, load_picture
from train.tiny_world.checkpoint import progress


@dataclass(frozen=True)
class GateTrainConfig:
    """How the gates are trained.

    Raises:
        ConfigError: Naming every value that is out of range.
    """

    model: str = "tiny"  # name or path of a model config
    pool: str = "build/tiny_world/pool/large"  # LoRAs with covers, captions and maybe recipes.json
    out: str = "autolora/families/tiny/weights/gate.safetensors"
    size: int = 128  # side of the pictures in pixels
    text_length: int = 16  # tokens a caption is padded to
    adapters_min: int = 1  # LoRAs attached at once, at least
    adapters_max: int = 3  # and at most
    recipe_share: float = 0.5  # share of steps whose set is that of a recipe plus others
    fullest_share: float = 0.6  # share of samples that show as many of the set as there is
    steps: int = 300
    batch: int = 16  # samples per step; half of them take part in the second term
    lr: float = 5e-3
    weight_decay: float = 0.0
    empty_prompts: float = 0.1
    sigma_mean: float = 0.6
    sigma_std: float = 1.2
    margin: float = 0.5  # of the anti-interference hinge
    weight: float = 0.1  # of the anti-interference hinge
    held_out: float = 0.1  # share of the LoRAs kept for the validation loss
    seed: int = 0

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be at least 1, not {getattr(self, name)}"
            for name in ("steps", "batch", "adapters_min", "text_length")
            if getattr(self, name) < 1
        ]
        problems += [
            f"{name} must lie between 0 and 1, not {getattr(self, name)}"
            for name in ("recipe_share", "fullest_share", "empty_prompts", "held_out")
            if not 0 <= getattr(self, name) <= 1
        ]
        if self.adapters_max < self.adapters_min:
            problems.append(f"adapters_max {self.adapters_max} is below adapters_min")
        if self.size < 16 or self.size % 16:
            problems.append(f"size must be a multiple of 16, not {self.size}")
        if problems:
            raise ConfigError("Gate training: " + "; ".join(problems) + ".")


@dataclass
class Item:
    """One picture: latents [C, h, w], text of its captions, and the LoRAs that made it."""

    latents: Tensor
    states: Tensor
    pooled: Tensor
    loras: frozenset[str]


def read_items(pipe: Any, folder: Path, config: GateTrainConfig) -> list[Item]:
    """Covers (one LoRA each) and recipes (several) of a pool, encoded.

    Raises:
        ConfigError: If there are no covers with captions.
    """
    wanted: list[tuple[Path, list[str], frozenset[str]]] = []
    for sidecar in sorted(folder.glob("*.captions.json")):
        name = sidecar.name.removesuffix(".captions.json")
        for file, captions in json.loads(sidecar.read_text(encoding="utf-8")).items():
            # The short caption names only a style or a subject; the others describe the picture.
            wanted.append((folder / file, captions[:2], frozenset((name,))))
    recipes = folder / "recipes.json"
    if recipes.is_file():
        for file, entry in json.loads(recipes.read_text(encoding="utf-8")).items():
            wanted.append((folder / file, entry["captions"], frozenset(entry["loras"])))
    wanted = [w for w in wanted if w[0].is_file()]
    if not wanted:
        raise ConfigError(f"{folder} holds no covers with captions; see docs on preparing a pool.")
    items = []
    with torch.no_grad():
        for path, captions, loras in progress(wanted, "pictures", total=len(wanted)):
            picture = pipe.preprocess_image(load_picture(path, config.size))
            latents = pipe.vae_encoder(picture.to(pipe.device, pipe.torch_dtype))[0]
            rows = [encode_text(pipe, text, config.text_length) for text in captions]
            states, pooled = (torch.cat(column) for column in zip(*rows, strict=True))
            items.append(Item(latents, states, pooled, loras))
    return items


class Sampler:
    """Draws a set of LoRAs to attach and a batch of pictures that fit the set."""

    def __init__(
        self, items: Sequence[Item], names: Sequence[str], config: GateTrainConfig, seed: int
    ) -> None:
        known = set(names)
        self.items = [i for i in items if i.loras <= known]
        self.names, self.config = sorted(known), config
        self.generator = torch.Generator().manual_seed(seed)
        self.recipes = [i.loras for i in self.items if len(i.loras) > 1]
        self.by_set: dict[frozenset[str], list[Item]] = {}
        for item in self.items:
            self.by_set.setdefault(item.loras, []).append(item)

    def _int(self, high: int) -> int:
        return int(torch.randint(high, (1,), generator=self.generator))

    def draw_set(self) -> list[str]:
        """Names of the LoRAs to attach together."""
        c = self.config
        count = c.adapters_min + self._int(c.adapters_max - c.adapters_min + 1)
        chosen: set[str] = set()
        share = float(torch.rand((), generator=self.generator))
        if self.recipes and share < c.recipe_share:
            chosen |= self.recipes[self._int(len(self.recipes))]
        while len(chosen) < count:
            chosen.add(self.names[self._int(len(self.names))])
        return sorted(chosen)

    def draw_batch(self, names: list[str]) -> tuple[list[Item], list[Item]]:
        """Pictures of the set and, for each, one of another LoRA of the set (its rival)."""
        present = [items for key, items in self.by_set.items() if key <= set(names)]
        # Retrieved adapters are mostly wanted. Were each picture as likely as any other, most of
        # an attached set would be unwanted, and the gates would learn to be silent in doubt.
        most = max(len(items[0].loras) for items in present)
        fullest = [items for items in present if len(items[0].loras) == most]
        batch, rivals = [], []
        for _ in range(self.config.batch):
            share = float(torch.rand((), generator=self.generator))
            groups = fullest if share < self.config.fullest_share else present
            group = groups[self._int(len(groups))]
            item = group[self._int(len(group))]
            others = [g for g in present if not g[0].loras & item.loras] or [group]
            other = others[self._int(len(others))]
            batch.append(item)
            rivals.append(other[self._int(len(other))])
        return batch, rivals


def _text(items: list[Item], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    picks = [int(torch.randint(len(i.states), (1,), generator=generator)) for i in items]
    states = torch.stack([i.states[p] for i, p in zip(items, picks, strict=True)])
    pooled = torch.stack([i.pooled[p] for i, p in zip(items, picks, strict=True)])
    return states, pooled


def gate_loss(
    dit: nn.Module,
    batch: list[Item],
    rivals: list[Item],
    empty: tuple[Tensor, Tensor],
    config: GateTrainConfig,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """The flow-matching loss and the anti-interference hinge, both scalars."""
    x0 = torch.stack([i.latents for i in batch]).float()
    noise = torch.randn(x0.shape, generator=generator).to(x0.device)
    sigmas = sample_sigmas(len(x0), config.sigma_mean, config.sigma_std, generator).to(x0.device)
    noisy, target = add_noise(x0, noise, sigmas), noise - x0
    states, pooled = _text(batch, generator)
    blank = torch.rand(len(batch), generator=generator) < config.empty_prompts
    states[blank], pooled[blank] = empty[0].to(states), empty[1].to(pooled)
    half = len(batch) // 2 if config.weight > 0 else 0
    guidance = guidance_input(dit, len(batch) + half, x0.device)
    other_states, other_pooled = _text(rivals[:half], generator) if half else (states[:0],) * 2
    with torch.autocast(x0.device.type, torch.bfloat16), plain_attention(x0.device):
        velocity = predict_velocity(
            dit,
            torch.cat([noisy, noisy[:half]]),
            torch.cat([sigmas, sigmas[:half]]),
            torch.cat([states, other_states]) if half else states,
            torch.cat([pooled, other_pooled]) if half else pooled,
            **guidance,
        ).float()
    n = len(batch)
    own = (velocity[:n] - target).pow(2).mean()
    if not half:
        return own, torch.zeros(())
    rival = (velocity[n:] - target[:half]).pow(2).mean((1, 2, 3))
    return own, (config.margin - rival).relu().mean()


def split_names(names: Sequence[str], config: GateTrainConfig) -> tuple[list[str], list[str]]:
    """LoRAs to train on, and those that are held out.

    Raises:
        ConfigError: There are too few for a set of ``adapters_max`` in each part.
    """
    held = max(config.adapters_max, round(len(names) * config.held_out))
    if len(names) < held + config.adapters_max:
        raise ConfigError(
            f"{len(names)} LoRAs with covers are too few to attach {config.adapters_max} at once "
            f"and to hold {held} out; add LoRAs or lower adapters_max."
        )
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(config.seed))
    shuffled = [names[i] for i in order.tolist()]
    return shuffled[held:], shuffled[:held]


class GateTrainer:
    """Holds the frozen model, the pool and the gates in training."""

    def __init__(self, config: GateTrainConfig) -> None:
        self.config = config
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        folder = Path(config.pool)
        self.pool = Pool(folder)
        pipe = load_for_training(config.model)
        self.items = read_items(pipe, folder, config)
        states, pooled = encode_text(pipe, "", config.text_length)
        self.empty = (states[0], pooled[0])
        self.dit = pipe.dit.requires_grad_(False)
        # Every LoRA that can be drawn needs a picture of its own: its set may hold no other.
        names = sorted({name for item in self.items for name in item.loras if len(item.loras) == 1})
        names = [name for name in names if name in self.pool]
        train_names, self.held_names = split_names(names, config)
        # Processes draw different sets; their gradients are averaged.
        seed = config.seed + 1000 * self.accelerator.process_index
        self.train_sampler = Sampler(self.items, train_names, config, seed)
        self.loaded: dict[str, LoRA] = {}
        shapes: dict[str, tuple[int, int]] = {}
        for name in names:
            lora = self.lora(name)
            shapes |= {layer: lora.shape(layer) for layer in lora.layers}
        self.bank = GateBank.neutral(shapes)

    def lora(self, name: str) -> LoRA:
        """A LoRA of the pool, read once."""
        if name not in self.loaded:
            self.loaded[name] = self.pool.load(name)
        return self.loaded[name]

    def step_loss(self, sampler: Sampler, gates: GateBank | None) -> tuple[Tensor, Tensor]:
        """The two losses of one drawn set; without gates those of the plain sum."""
        names = sampler.draw_set()
        batch, rivals = sampler.draw_batch(names)
        adapters = [(self.lora(name), 1.0) for name in names]
        strategy = "sum" if gates is None else "gated"
        with attached(self.dit, adapters, strategy=strategy, gates=gates):
            return gate_loss(self.dit, batch, rivals, self.empty, self.config, sampler.generator)

    @torch.no_grad()
    def validate(self, gates: GateBank | None, rounds: int = 40) -> float:
        """Mean flow-matching loss on LoRAs that are not trained on, always the same draws."""
        sampler = Sampler(self.items, self.held_names, self.config, seed=1234)
        return sum(self.step_loss(sampler, gates)[0].item() for _ in range(rounds)) / rounds

    def train(self) -> dict[str, float]:
        """Runs the training; returns the validation losses of plain sum and trained gates."""
        config = self.config
        self.bank.to(self.accelerator.device)
        parameters = list(self.bank.parameters())
        optimizer = torch.optim.AdamW(
            parameters, lr=config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay
        )
        plain = self.validate(None)
        started = time.monotonic()
        for step in progress(range(config.steps), "gate", total=config.steps):
            warm, decay = min(1.0, (step + 1) / 20), 1 - step / config.steps
            optimizer.param_groups[0]["lr"] = config.lr * warm * decay
            own, hinge = self.step_loss(self.train_sampler, self.bank)
            optimizer.zero_grad(set_to_none=True)
            self.accelerator.backward(own + config.weight * hinge)
            average_gradients(self.accelerator, parameters)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            if step % 10 == 0:
                progress.note(f"loss {own.item():.3f} hinge {hinge.item():.3f}")
        trained = self.validate(self.bank)
        result = {"held_out_loss_sum": plain, "held_out_loss_gated": trained}
        if self.accelerator.is_main_process:
            notes = {k: f"{v:.5f}" for k, v in result.items()}
            # Where files lay on this machine is nobody's business.
            kept = {k: v for k, v in asdict(config).items() if k not in ("pool", "out")}
            notes["config"] = json.dumps(kept)
            save_gates(self.bank, config.out, notes)
        return {**result, "seconds": time.monotonic() - started}


def average_gradients(accelerator: Accelerator, parameters: Sequence[nn.Parameter]) -> None:
    """Average gradients over processes; zero where a process' set did not reach a gate.

    The gates act from inside the base model, so no wrapper around them sees a forward pass whose
    gradients it could synchronise.
    """
    if accelerator.num_processes == 1:
        return
    for parameter in parameters:
        own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = accelerator.reduce(own, "mean")


def main() -> None:
    """Parses the command line, trains, prints the losses as JSON on the last line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, help="YAML file with the settings")
    parser.add_argument("--pool", help="folder of LoRAs to train on")
    parser.add_argument("--out", help="file of gates to write")
    parser.add_argument("--steps", type=int, help="optimizer steps")
    args = parser.parse_args()
    overrides = {"pool": args.pool, "out": args.out, "steps": args.steps}
    try:
        config = read_config(GateTrainConfig, args.config, overrides)
        print(json.dumps(GateTrainer(config).train()))
    except AutoLoRAError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
