"""Examines this machine for a base model: programs, cards, files, and which options fit."""

from __future__ import annotations

import platform
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from autolora.errors import ConfigError
from autolora.flux.checkpoints import Located, download_command, locate
from autolora.flux.config import PipelineConfig
from autolora.flux.hardware import Hardware, all_cards, machine_memory, why_no_cuda
from autolora.flux.headers import gigabytes
from autolora.flux.inspecting import model_sizes
from autolora.flux.memory import GIB, all_needs
from autolora.flux.sizes import FLUX1_DEV, ModelSizes

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
)


def examine(config: PipelineConfig) -> dict[str, Any]:
    """Examine the machine for a base model; nothing is loaded or downloaded.

    Args:
        config: The base model.

    Returns:
        Plain data: ``programs`` (version or None by name), ``machine``, ``cards``, ``cuda`` (why no
        card can be used, or None), ``model`` (files, sizes, and the command that gets what is
        missing), ``needs`` (memory in GiB by options; empty for the tiny model) and ``problems``
        (one sentence each; empty where the model can be used).
    """
    cards = all_cards()
    total, free = machine_memory()
    problems: list[str] = []
    model, needs = _examine_model(config, cards, free, problems)
    return {
        "programs": {name: _version(name) for name in PROGRAMS},
        "machine": {
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
            "memory": total,
            "memory_free": free,
        },
        "cards": [asdict(card) for card in cards],
        "cuda": None if cards or sys.platform == "darwin" else why_no_cuda(),
        "model": model,
        "needs": needs,
        "problems": problems,
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _examine_model(
    config: PipelineConfig, cards: list[Hardware], machine_free: int | None, problems: list[str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    if config.kind == "tiny":
        return _examine_tiny(config, problems), []
    located = locate(config)
    model: dict[str, Any] = {
        "name": config.name,
        "kind": config.kind,
        "files": [_describe(entry) for entry in located.values()],
        "command": download_command(config, located.values()),
    }
    absent = [name for name, entry in located.items() if entry.missing or not entry.paths]
    if absent:
        problems.append(f"Files are missing: {', '.join(absent)}.")
    sizes = FLUX1_DEV
    try:
        sizes = model_sizes(located)
    except ConfigError as error:
        problems.append(str(error))
    model["parameters"] = {
        "transformer": sizes.flux.parameters,
        "text_encoder": sizes.text_encoder,
        "text_encoder_2": sizes.text_encoder_2,
        "vae": sizes.vae,
    }
    needs = _examine_memory(config, sizes, cards, machine_free)
    if not any(need["fits"] is not False for need in needs):
        problems.append("No option fits into the memory that is free.")
    return model, needs


def _examine_tiny(config: PipelineConfig, problems: list[str]) -> dict[str, Any]:
    from autolora.flux.tiny.weights import SHIPPED

    path = config.weights or SHIPPED
    size = path.stat().st_size if path.is_file() else None
    if size is None:
        problems.append(f"The weights {path} are missing; check the repository out again.")
    files = [
        {
            "part": "transformer",
            "place": str(path),
            "found": bool(size),
            "missing": [] if size else [path.name],
            "bytes": size or 0,
            "size": gigabytes(size or 0),
        }
    ]
    return {"name": config.name, "kind": config.kind, "files": files, "command": None}


def _describe(entry: Located) -> dict[str, Any]:
    size = sum(path.stat().st_size for path in entry.paths if path.is_file())
    return {
        "part": entry.part,
        "place": None if entry.place is None else str(entry.place),
        "found": bool(entry.paths) and not entry.missing,
        "missing": list(entry.missing),
        "bytes": size,
        "size": gigabytes(size) if size else "",
    }


def _examine_memory(
    config: PipelineConfig, sizes: ModelSizes, cards: list[Hardware], machine_free: int | None
) -> list[dict[str, Any]]:
    best = max(cards, key=lambda card: card.free or 0, default=None)
    compute_bytes = 4 if best is None or not best.bfloat16 else 2
    rows = []
    for need in all_needs(sizes, config.memory, config.width, config.height, compute_bytes):
        fits = None
        if best is not None and machine_free is not None:
            fits = need.fits(best) and need.machine <= machine_free
        elif best is None and machine_free is not None:
            # Without a card everything is on the CPU, where nothing is offloaded.
            fits = need.offload == "none" and need.device <= machine_free
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
