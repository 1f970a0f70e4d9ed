"""Reads and writes the tiny FLUX: one safetensors file with its sizes in the header."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from autolora.errors import ConfigError
from autolora.flux.tiny.autoencoder import TinyDecoder, TinyEncoder
from autolora.flux.tiny.config import TinyFluxConfig

SHIPPED = Path(__file__).parent / "weights" / "tiny-flux.safetensors"
PARTS = ("dit", "encoder", "decoder")


def save_tiny(
    path: Path,
    config: TinyFluxConfig,
    modules: Mapping[str, nn.Module],
    provenance: Mapping[str, str],
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Writes the parts ``dit``, ``encoder`` and ``decoder`` with config and provenance."""
    tensors = {
        f"{part}.{name}": value.detach().to(dtype).contiguous()
        for part in PARTS
        for name, value in modules[part].state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part_file = path.with_suffix(".part")
    header = {"config": json.dumps(asdict(config)), **provenance}
    save_file(tensors, str(part_file), metadata=header)
    os.replace(part_file, path)


def load_tiny(path: Path) -> tuple[TinyFluxConfig, dict[str, Any]]:
    """Builds the three modules and loads them strictly, in float32.

    Raises:
        ConfigError: If the file is missing or is not a tiny FLUX.
    """
    if not path.is_file():
        raise ConfigError(
            f"The tiny FLUX weights are missing at {path}; check the repository out again "
            "or rebuild them with scripts/build_tiny_world.py."
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            fields = json.loads(header["config"])
            tensors = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise ConfigError(f"{path} is not a tiny FLUX checkpoint ({error}).") from error
    fields["rope_axes"] = tuple(fields["rope_axes"])
    config = TinyFluxConfig(**fields)
    modules = _build(config)
    for part, module in modules.items():
        state = {
            k.removeprefix(part + "."): v for k, v in tensors.items() if k.startswith(part + ".")
        }
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            raise ConfigError(f"{path}: the {part} weights do not fit ({error}).") from error
    return config, modules


def _build(config: TinyFluxConfig) -> dict[str, nn.Module]:
    from autolora.flux.tiny.dit import TinyFluxDiT

    return {"dit": TinyFluxDiT(config), "encoder": TinyEncoder(), "decoder": TinyDecoder()}
