"""The relay: the newest averaged weights of an unfinished training, small enough to hand on.

Matrices are kept as five-bit codes, deflated, with one float16 scale a row: a quarter of bfloat16's
size for an error of a few percent of a row's norm, which a run that goes on from them has forgotten
after some hundred steps. Everything else is bfloat16. Optimizer states are left out; a run that
starts from a relay warms up again.
"""

from __future__ import annotations

import json
import zlib
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

LARGEST_CODE = 15  # of five bits and a sign's symmetry
RELAY = Path(__file__).with_name("weights") / "relay.safetensors"


def save_relay(
    path: Path, config: TinyFluxConfig, weights: Mapping[str, Tensor], step: int
) -> None:
    """Writes the averaged weights after ``step`` steps, those of all earlier legs included."""
    tensors: dict[str, Tensor] = {}
    for name, value in weights.items():
        if value.ndim != 2:
            tensors[name] = value.detach().bfloat16().contiguous()
            continue
        scale = (value.abs().amax(1, keepdim=True) / LARGEST_CODE).clamp_min(1e-6).half()
        tensors[f"{name}.scale"] = scale.contiguous()
        tensors[f"{name}.codes"] = _deflated((value.float() / scale.float()).round())
    header = {"config": json.dumps(asdict(config)), "step": str(step)}
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
        for name, empty in dit.state_dict().items():
            if f"{name}.codes" in stored:
                scale = stored.pop(f"{name}.scale").float()
                stored[name] = _inflated(stored.pop(f"{name}.codes"), empty.shape) * scale
        dit.load_state_dict(stored)
        return dit, int(header["step"])
    except Exception as error:
        raise ConfigError(
            f"{path} is no relay of the tiny world's training ({error}); check it out again."
        ) from error


def _deflated(codes: Tensor) -> Tensor:
    """Codes of small whole numbers as compressed bytes, uint8 [n]."""
    clamped = codes.clamp(-LARGEST_CODE, LARGEST_CODE).to(torch.int8)
    return torch.frombuffer(
        bytearray(zlib.compress(clamped.numpy().tobytes(), 9)), dtype=torch.uint8
    )


def _inflated(packed: Tensor, shape: torch.Size) -> Tensor:
    """The codes of :func:`_deflated` as float32."""
    codes = bytearray(zlib.decompress(packed.numpy().tobytes()))
    return torch.frombuffer(codes, dtype=torch.int8).reshape(shape).float()
