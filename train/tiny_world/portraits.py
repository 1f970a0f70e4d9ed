"""Takes the portraits of a pool, for training the retriever."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from autolora.config import PipelineConfig
from autolora.families.load import load_pipeline
from autolora.fusion import attached
from autolora.generate.portraits import Portraits
from autolora.lora import Pool
from train.tiny_world.checkpoint import progress


def _read(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        return {}
    with safe_open(str(path), framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def _write(path: Path, portraits: dict[str, Tensor], settings: dict[str, str]) -> None:
    part = path.with_suffix(".part")
    save_file(portraits, str(part), metadata=settings)
    os.replace(part, path)


def take_portraits(config: PipelineConfig, folder: Path, out: Path) -> int:
    """Takes the portraits that ``out`` does not hold yet.

    Portraits are taken exactly as the pipeline takes them when it builds an index: same storage,
    noises and prompt, adapter at strength 1 under the plain sum.

    Args:
        config: The base model with its portrait settings.
        folder: The pool.
        out: Safetensors file, LoRA name to [S, N, C, h, w] in float16.

    Returns:
        How many were taken.
    """
    pool = Pool(folder)
    found = _read(out)
    settings = {
        "base_model": config.name,
        "portrait": json.dumps(dataclasses.asdict(config.portrait)),
    }
    camera = Portraits(load_pipeline(config), config.portrait)
    missing = [name for name in pool.names if name not in found]
    for n, name in enumerate(progress(missing, "portraits", total=len(missing))):
        taken = camera.take(attached(camera.pipe.dit, [(pool.load(name), 1.0)], "sum"))
        found[name] = taken.to(torch.float16)
        if n % 100 == 99:
            _write(out, found, settings)
    _write(out, found, settings)
    return len(missing)
