"""Builds the tiny world from free drawings: base model, judges, pools, covers, captions, portraits.

    python scripts/build_tiny_world.py
    python scripts/build_tiny_world.py --stage base --minutes 90
    python scripts/build_tiny_world.py --stage hand-on

Stages run in order, and each goes on where it was interrupted: what is there is not made again.
The base model's training is a relay. It starts from its own checkpoint in the work folder, else
from the weights that were handed on (train/tiny_world/weights/relay.safetensors), else from the
shipped model, widened; the stage `hand-on` writes its averaged weights there. On a CUDA device
every stage that trains runs on it.

The drawings come from npm and are needed only here:

    npm install --prefix build/icons @iconify-json/noto @iconify-json/noto-v1 \
        @iconify-json/fluent-emoji @iconify-json/fluent-emoji-flat @iconify-json/twemoji
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from autolora.config import load_config
from autolora.errors import AutoLoRAError, ConfigError
from autolora.families.tiny.weights import SHIPPED, load_tiny, save_tiny
from autolora.lora import LoRA
from autolora.minilm import MiniLM, shared_minilm
from train.tiny_world.autoencoder import train_autoencoder
from train.tiny_world.bank import Bank, make_shard
from train.tiny_world.base import averaged_weights, train_base
from train.tiny_world.export import export_pool, write_extras
from train.tiny_world.loras import Job, large_jobs, shipped_jobs, train_jobs
from train.tiny_world.portraits import take_portraits
from train.tiny_world.probes import train_judges
from train.tiny_world.relay import RELAY, load_relay, save_relay
from train.tiny_world.subjects import all_subjects
from train.tiny_world.turbo import train_turbo
from train.tiny_world.widen import widen
from train.tiny_world.world import Split, WorldConfig, load_world_config, split_world

STAGES = ("bank", "base", "turbo", "judges", "loras", "export", "large", "portraits")
APART = ("autoencoder", "hand-on")  # run only when they are named
ROOT = Path(__file__).resolve().parents[1]


def autoencoder_of(work: Path) -> dict[str, Any]:
    """Encoder and decoder: those trained in the work folder, else the shipped ones."""
    file = work / "autoencoder-final.pt"
    _, modules = load_tiny(SHIPPED)
    parts = {name: modules[name] for name in ("encoder", "decoder")}
    if file.exists():
        state = torch.load(file, weights_only=True)
        for name, module in parts.items():
            module.load_state_dict(state[name])
    return {name: module.eval().requires_grad_(False) for name, module in parts.items()}


def _two_threads() -> None:
    torch.set_num_threads(2)


def draw_shard(config: WorldConfig, work: Path, number: int) -> Path:
    """Draws one shard of the bank, in whichever process."""
    return make_shard(
        work / "bank",
        number,
        config.bank.pictures,
        split_world().base,
        autoencoder_of(work)["encoder"],
        shared_minilm(),
        config.model.size,
        config.model.text_length,
        config.bank.mix,
        config.seed,
    )


class Builder:
    """Runs the stages for one config and work folder."""

    def __init__(
        self,
        config: WorldConfig,
        work: Path,
        device: torch.device,
        threads: int,
        minutes: float | None = None,
    ) -> None:
        self.config, self.work, self.device = config, work, device
        self.threads, self.minutes = threads, minutes
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.split: Split = split_world()
        self.model_file = work / "tiny-flux.safetensors"
        self._begun_at = work / "begun-at-step"  # of the relay that this run went on from
        self.pools = {which: work / "pool" / which for which in ("shipped", "large")}

    def _autoencoder(self) -> dict[str, Any]:
        return {name: m.to(self.device) for name, m in autoencoder_of(self.work).items()}

    def _minilm(self) -> MiniLM:
        return shared_minilm().to(self.device)

    def autoencoder(self) -> None:
        """Trains the autoencoder on all subjects, plain and styled."""
        encoder, decoder = train_autoencoder(
            list(all_subjects()), self.config.autoencoder, self.work
        )
        states = {"encoder": encoder.state_dict(), "decoder": decoder.state_dict()}
        torch.save(states, self.work / "autoencoder-final.pt")

    def bank(self) -> None:
        """Draws the pictures that the base model learns from."""
        numbers = range(self.config.bank.shards)
        with ProcessPoolExecutor(
            max(1, self.threads // 2), mp_context=get_context("spawn"), initializer=_two_threads
        ) as workers:
            jobs = [workers.submit(draw_shard, self.config, self.work, n) for n in numbers]
            for done, _ in enumerate(as_completed(jobs), 1):
                print(f"shard {done} of {len(jobs)}", flush=True)
                if self.deadline is not None and time.monotonic() > self.deadline:
                    workers.shutdown(cancel_futures=True)
                    print(f"{len(jobs) - done} shards are still to be drawn.")
                    return

    def _beginning(self) -> Any:
        """Where a run without a checkpoint begins: the relay, else the shipped model, widened."""
        wanted = self.config.model
        if RELAY.exists():
            dit, step = load_relay(RELAY)
            if not (self.work / "base.pt").exists():
                print(f"begins from the weights handed on at step {step}")
                self._begun_at.write_text(str(step), encoding="utf-8")
        else:
            shipped = load_tiny(SHIPPED)[1]["dit"]
            dit = widen(shipped, wanted.heads, wanted.text_length)
        if dit.config != wanted:
            raise ConfigError(
                f"The config wants {wanted}, but the weights to go on from are {dit.config}; "
                "remove the checkpoint or change the config."
            )
        return dit.to(self.device)

    def base(self) -> None:
        """Trains the base model, for as long as it is given."""
        if not list((self.work / "bank").glob("shard-*.safetensors")):
            draw_shard(self.config, self.work, 0)
        bank = Bank(self.work / "bank", self.device)
        dit = train_base(self.config.base, self._beginning(), bank, self.work, self.minutes)
        _, step = averaged_weights(self.work)
        self._write_model(dit, step)

    def _write_model(self, dit: Any, step: int) -> None:
        provenance = {"script": "scripts/build_tiny_world.py", "steps": str(step)}
        save_tiny(
            self.model_file, self.config.model, {"dit": dit, **self._autoencoder()}, provenance
        )

    def turbo(self) -> None:
        """Distils the base model to four steps without guidance."""
        config, teacher = self._model_file("tiny-flux.safetensors")
        student = self._model_file("tiny-flux.safetensors")[1]["dit"]
        bank = Bank(self.work / "bank", self.device)
        student = train_turbo(
            self.config.turbo,
            student.train().requires_grad_(True),
            teacher["dit"].requires_grad_(False),
            bank,
            self.work,
            self.minutes,
        )
        header = {"script": "scripts/build_tiny_world.py", "steps": str(self.config.turbo.steps)}
        save_tiny(self.work / "tiny-turbo.safetensors", config, {**teacher, "dit": student}, header)

    def hand_on(self) -> None:
        """Writes the newest averaged weights where the next run finds them, in any checkout."""
        weights, step = averaged_weights(self.work)
        step += int(self._begun_at.read_text()) if self._begun_at.exists() else 0
        save_relay(RELAY, self.config.model, weights, step)
        print(f"step {step}: {RELAY.stat().st_size / 1e6:.1f} MB")

    def _model_file(self, name: str) -> tuple[Any, dict[str, Any]]:
        """Sizes and modules of a model in the work folder."""
        config, modules = load_tiny(self.work / name)
        return config, {n: module.to(self.device).eval() for n, module in modules.items()}

    def _train_pool(self, which: str, jobs: list[Job], config: Any) -> int:
        _, modules = self._model_file("tiny-flux.safetensors")
        return train_jobs(
            jobs,
            modules["dit"],
            modules["encoder"],
            self._minilm(),
            self.split,
            self.config.pool,
            config,
            self.pools[which],
            self.config.seed,
            self.deadline,
        )

    def loras(self) -> None:
        """Trains the pool that ships: styles first, since every picture of a pair needs one."""
        jobs = shipped_jobs(self.split, self.config.pool)
        styles, subjects = [j for j in jobs if j.style], [j for j in jobs if j.subject]
        left = self._train_pool("shipped", styles, self.config.style_lora)
        left += self._train_pool("shipped", subjects, self.config.subject_lora)
        if left:
            print(f"{left} LoRAs are still to be trained; run the stage again.")

    def large(self) -> None:
        """Trains the larger pool and writes its covers, captions and recipes."""
        jobs = large_jobs(self.split, self.config.pool)
        if left := self._train_pool("large", jobs, self.config.large_lora):
            print(f"{left} LoRAs are still to be trained; run the stage again.")
        write_extras(jobs, self.split, self.config, self.pools["large"])

    def export(self) -> None:
        """Writes model and pool, with covers and captions, to where they ship."""
        config, modules = load_tiny(self.model_file)
        _, step = averaged_weights(self.work)
        header = {"script": "scripts/build_tiny_world.py", "steps": str(step)}
        save_tiny(SHIPPED, config, modules, header)
        jobs = shipped_jobs(self.split, self.config.pool)
        loras = [LoRA.load(self.pools["shipped"] / f"{j.name}.safetensors") for j in jobs]
        export_pool(jobs, loras, modules, self.split, self.config, ROOT / "lora_pool" / "tiny")

    def portraits(self) -> None:
        """Takes the portraits of both pools, after the export."""
        jobs = shipped_jobs(self.split, self.config.pool)
        write_extras(jobs, self.split, self.config, self.pools["shipped"])
        taken = take_portraits(
            load_config("tiny"), self.work / "pool", self.work / "portraits.safetensors"
        )
        print(f"{taken} portraits taken")

    def judges(self) -> None:
        """Trains the classifiers that score generated pictures."""
        parts, config = self._autoencoder(), self.config.judges
        subjects = self.split.base + self.split.shipped
        train_judges(subjects, parts["encoder"], parts["decoder"], config.renders, config.epochs)


def main() -> None:
    """Parses the command line and runs the stages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "tiny_world.yaml")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "tiny_world")
    parser.add_argument(
        "--stage", choices=STAGES + APART, action="append", help="run only this; repeat"
    )
    parser.add_argument(
        "--minutes", type=float, help="stop training, or starting LoRAs, after this"
    )
    parser.add_argument("--threads", type=int, help="of the CPU; default: 2, with a card all")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is a card")
    args = parser.parse_args()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    threads = args.threads or (2 if device.type == "cpu" else os.cpu_count() or 2)
    torch.set_num_threads(threads)
    try:
        config = load_world_config(args.config)
        if device.type == "cuda":
            config = dataclasses.replace(
                config, base=config.base.on_cuda(), turbo=config.turbo.on_cuda()
            )
        args.work.mkdir(parents=True, exist_ok=True)
        builder = Builder(config, args.work, device, threads, args.minutes)
        for stage in args.stage or STAGES:
            print(f"== {stage}", flush=True)
            getattr(builder, stage.replace("-", "_"))()
    except AutoLoRAError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        print(
            f"The work could not be written ({error}); nothing before it is lost.", file=sys.stderr
        )
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
