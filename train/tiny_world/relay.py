"""The relay: the newest averaged weights of an unfinished training, small enough to hand on.

Matrices are kept in eight bits with one float16 scale a row, which costs a fraction of a percent of
their norm and half of bfloat16's size; everything else is bfloat16. Optimizer states are left out;
a run that starts from a relay warms up again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from autolora.errors import ConfigError
from autolora.families.tiny.model import TinyFluxConfig, TinyFluxDiT
from autolora.files import replacing

RELAY = Path(__file__).with_name("weights") / "relay.safetensors"


def save_relay(
    path: Path, config: TinyFluxConfig, weights: Mapping[str, Tensor], step: int, note: str = ""
) -> None:
    """Writes the averaged weights of a step; ``note`` is kept in the header."""
    tensors: dict[str, Tensor] = {}
    for name, value in weights.items():
        if value.ndim != 2:
            tensors[name] = value.detach().bfloat16().contiguous()
            continue
        scale = (value.abs().amax(1, keepdim=True) / 127).clamp_min(1e-8).half()
        tensors[f"{name}.scale"] = scale.contiguous()
        codes = (value.float() / scale.float()).round().clamp(-127, 127)
        tensors[name] = codes.to(torch.int8).contiguous()
    header = {"config": json.dumps(asdict(config)), "step": str(step), "note": note}
    with replacing(path) as part:
        save_file(tensors, str(part), metadata=header)


def load_relay(path: Path) -> tuple[TinyFluxDiT, int]:
    """The model of a relay and the step it was at.

    Raises:
        ConfigError: If the file is damaged, or no relay.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata()
            stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        fields = json.loads(header["config"])
        fields["rope_axes"] = tuple(fields["rope_axes"])
        dit = TinyFluxDiT(TinyFluxConfig(**fields))
        weights = {
            name: value.float() * stored[f"{name}.scale"].float()
            if value.dtype == torch.int8
            else value.float()
            for name, value in stored.items()
            if not name.endswith(".scale")
        }
        dit.load_state_dict(weights)
        return dit, int(header["step"])
    except Exception as error:
        raise ConfigError(
            f"{path} is no relay of the tiny world's training ({error}); check it out again."
        ) from error
