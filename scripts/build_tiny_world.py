"""Builds the tiny world from the emoji font: model, pools, covers, captions, portraits, probes.

    python scripts/build_tiny_world.py --work build/tiny_world
    python scripts/build_tiny_world.py --work build/tiny_world --stage large

Stages run in order; each resumes where it was interrupted. What ships is written by ``export``
into the package and ``lora_pool/tiny``; the larger pool stays in the work folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from autolora.config import load_config
from autolora.errors import AutoLoRAError
from autolora.families.tiny.weights import SHIPPED, load_tiny, save_tiny
from autolora.lora import LoRA
from autolora.minilm import shared_minilm
from train.tiny_world.autoencoder import train_autoencoder
from train.tiny_world.base import train_base
from train.tiny_world.data import TextTable, Views, render_views
from train.tiny_world.export import export_pool, write_extras
from train.tiny_world.loras import large_jobs, shipped_jobs, train_jobs
from train.tiny_world.portraits import take_portraits
from train.tiny_world.probes import train_probes
from train.tiny_world.subjects import all_subjects
from train.tiny_world.world import Split, WorldConfig, load_world_config, split_world

STAGES = ("autoencoder", "base", "loras", "polish", "export", "probes", "large", "portraits")
ROOT = Path(__file__).resolve().parents[1]


class Builder:
    """Runs the stages for one config and work folder."""

    def __init__(self, config: WorldConfig, work: Path, minutes: float | None) -> None:
        self.config, self.work = config, work
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.split: Split = split_world(config)
        self.model_file = work / "tiny-flux.safetensors"
        self.pools = {which: work / "pool" / which for which in ("shipped", "large")}

    def autoencoder(self) -> None:
        """Trains the autoencoder on all subjects, plain and styled."""
        encoder, decoder = train_autoencoder(
            list(all_subjects()), self.config.autoencoder, self.work
        )
        torch.save(
            {"encoder": encoder.state_dict(), "decoder": decoder.state_dict()},
            self.work / "autoencoder-final.pt",
        )

    def _trained_autoencoder(self) -> dict[str, Any]:
        from autolora.families.tiny.model import TinyDecoder, TinyEncoder

        state = torch.load(self.work / "autoencoder-final.pt", weights_only=True)
        modules = {"encoder": TinyEncoder(), "decoder": TinyDecoder()}
        for name, module in modules.items():
            module.load_state_dict(state[name])
            module.eval()
        return modules

    def _base_views(self, encoder: Any) -> Views:
        file = self.work / "base_views.pt"
        if not file.exists():
            rng = np.random.default_rng(self.config.seed)
            size = self.config.model.size
            views = render_views(encoder, self.split.base, self.config.views, rng, size)
            torch.save((views.latents, views.captions), file)
        latents, captions = torch.load(file, weights_only=True)
        return Views(latents, captions)

    def base(self) -> None:
        """Trains the base model on the base subjects."""
        parts = self._trained_autoencoder()
        views = self._base_views(parts["encoder"])
        captions = [c for cs in views.captions for c in cs]
        text = TextTable.build(captions, shared_minilm(), self.config.model.text_length)
        dit = train_base(self.config.base, self.config.model, views, text, self.work)
        provenance = {"script": "scripts/build_tiny_world.py", "steps": str(self.config.base.steps)}
        save_tiny(self.model_file, self.config.model, {"dit": dit, **parts}, provenance)

    def _train_pool(self, which: str) -> None:
        _, modules = load_tiny(self.model_file)
        shipped = which == "shipped"
        make = shipped_jobs if shipped else large_jobs
        left = train_jobs(
            make(self.split, self.config.pool),
            modules["dit"],
            modules["encoder"].eval(),
            shared_minilm(),
            self.split,
            self.config.pool,
            self.config.shipped_lora if shipped else self.config.large_lora,
            self.pools[which],
            self.config.seed,
            self.deadline,
        )
        if left:
            print(f"{left} LoRAs are still to be trained; run the stage again.")

    def loras(self) -> None:
        """Trains the pool that ships."""
        self._train_pool("shipped")

    def polish(self) -> None:
        """Trains again, one by one and longer, what the config lists as worth it."""
        _, modules = load_tiny(self.model_file)
        jobs = shipped_jobs(self.split, self.config.pool)
        chosen = [j for j in jobs if j.name in self.config.polished]
        folder = self.work / "polished"
        alone = dataclasses.replace(self.config.pool, group=1)
        train_jobs(
            chosen,
            modules["dit"],
            modules["encoder"].eval(),
            shared_minilm(),
            self.split,
            alone,
            self.config.polish_lora,
            folder,
            self.config.seed,
        )
        for job in chosen:
            shutil.copy(folder / f"{job.name}.safetensors", self.pools["shipped"])

    def large(self) -> None:
        """Trains the larger pool and writes its covers, captions and recipes."""
        self._train_pool("large")
        write_extras(
            large_jobs(self.split, self.config.pool), self.split, self.config, self.pools["large"]
        )

    def export(self) -> None:
        """Writes model and pool, with covers and captions, to where they ship."""
        config, modules = load_tiny(self.model_file)
        header = {"script": "scripts/build_tiny_world.py", "steps": str(self.config.base.steps)}
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

    def probes(self) -> None:
        """Trains the classifiers that score generated pictures."""
        _, modules = load_tiny(self.model_file)
        train_probes(self.split, self.config, modules["encoder"].eval(), modules["decoder"].eval())


def main() -> None:
    """Parses the command line and runs the stages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "tiny_world.yaml")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "tiny_world")
    parser.add_argument("--stage", choices=STAGES, action="append", help="run only this; repeat")
    parser.add_argument("--minutes", type=float, help="stop starting new LoRA groups after this")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        config = load_world_config(args.config)
        args.work.mkdir(parents=True, exist_ok=True)
        builder = Builder(config, args.work, args.minutes)
        for stage in args.stage or STAGES:
            print(f"== {stage}", flush=True)
            getattr(builder, stage)()
    except AutoLoRAError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
