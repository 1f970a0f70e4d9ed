"""Reads and writes the tiny FLUX: one safetensors file with its sizes in the header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from autolora.errors import ConfigError
from autolora.files import replacing

if TYPE_CHECKING:
    from autolora.families.tiny.model import TinyFluxConfig

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
    header = {"config": json.dumps(asdict(config)), **provenance}
    with replacing(path) as part_file:
        save_file(tensors, str(part_file), metadata=header)


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
    from autolora.families.tiny.model import TinyFluxConfig

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
    from autolora.families.tiny.model import TinyDecoder, TinyEncoder, TinyFluxDiT

    return {"dit": TinyFluxDiT(config), "encoder": TinyEncoder(), "decoder": TinyDecoder()}
