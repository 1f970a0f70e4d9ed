"""Adapters of random numbers, written once in the format that each program reads best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file


@dataclass(frozen=True)
class AdapterFiles:
    """One adapter on the disk, the same numbers twice.

    Attributes:
        name: Its name.
        plain: A file with DiffSynth's own layer names, which DiffSynth and AutoLoRA read.
        peft: A folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
    """

    name: str
    plain: Path
    peft: Path


def find_adapter(folder: Path, name: str) -> AdapterFiles:
    """Return where an adapter's files are below a folder."""
    return AdapterFiles(name, folder / "plain" / f"{name}.safetensors", folder / "peft" / name)


def write_adapters(
    folder: Path,
    shapes: Mapping[str, tuple[int, int]],
    count: int,
    rank: int,
    dtype: torch.dtype,
) -> list[AdapterFiles]:
    """Write ``count`` adapters for all the given layers; alpha is the rank."""
    from peft import LoraConfig

    written = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        name = f"adapter{number}"
        plain, peft = {}, {}
        for layer, (out, inner) in shapes.items():
            down = (torch.randn(rank, inner, generator=generator) / inner**0.5).to(dtype)
            up = (torch.randn(out, rank, generator=generator) * 0.05).to(dtype)
            plain[f"{layer}.lora_A.weight"] = peft[f"{layer}.lora_A.weight"] = down
            plain[f"{layer}.lora_B.weight"] = peft[f"{layer}.lora_B.weight"] = up
        files = find_adapter(folder, name)
        files.plain.parent.mkdir(parents=True, exist_ok=True)
        files.peft.mkdir(parents=True, exist_ok=True)
        save_file(plain, files.plain)
        save_file(peft, files.peft / "adapter_model.safetensors")
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(shapes))
        config.save_pretrained(str(files.peft))
        written.append(files)
    return written
