"""The gates of a whole model, and their file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from autolora.errors import FusionError
from autolora.files import replacing
from autolora.fusion.gate import PARAMETER_NAMES, Gate

_PREFIX = "model_dict."
_DOT = "___"


class GateBank(nn.Module):
    """A mapping from canonical layer name to `Gate`.

    Its state dict has the names of the published gates (``LoRAFusion-preview-FLUX.1-dev``):
    ``model_dict.blocks___0___attn___a_to_qkv.weight_base`` and so on, so files go both ways.

    Args:
        gates: The gates by canonical layer name.
        metadata: Strings that travel with the file, such as how the gates were trained.
    """

    def __init__(
        self, gates: Mapping[str, Gate] | None = None, metadata: Mapping[str, str] | None = None
    ) -> None:
        super().__init__()
        gates = gates or {}
        # The attribute's name is the prefix in the published file.
        self.model_dict = nn.ModuleDict({k.replace(".", _DOT): gates[k] for k in gates})
        self.metadata = dict(metadata or {})

    @classmethod
    def neutral(cls, shapes: Mapping[str, tuple[int, int]]) -> GateBank:
        """Return untrained gates for layers of the given ``(out, in)`` shapes."""
        return cls({layer: Gate.neutral(shape[0]) for layer, shape in shapes.items()})

    @property
    def layers(self) -> tuple[str, ...]:
        """Canonical names of the layers that have a gate."""
        return tuple(key.replace(_DOT, ".") for key in self.model_dict)

    def get(self, layer: str) -> Gate | None:
        """Return the gate of a layer, or None."""
        if layer not in self:
            return None
        return self[layer]

    def items(self) -> Iterator[tuple[str, Gate]]:
        """Yield each layer's name and gate."""
        for layer in self:
            yield layer, self[layer]

    def __getitem__(self, layer: str) -> Gate:
        gate = self.model_dict[layer.replace(".", _DOT)]
        assert isinstance(gate, Gate)
        return gate

    def __contains__(self, layer: object) -> bool:
        return isinstance(layer, str) and layer.replace(".", _DOT) in self.model_dict

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.model_dict)


def load_gates(path: str | os.PathLike[str]) -> GateBank:
    """Read a gate file, ours or the published one.

    Args:
        path: A safetensors file with the nine tensors of each layer's gate, named
            ``<layer with ___ for .>.<tensor>``, with or without the prefix ``model_dict.``.

    Raises:
        FusionError: The file can't be read, or a tensor is missing, unknown, or ill-formed.
    """
    path = Path(path)
    if not path.is_file():
        raise FusionError(f"no gate file at {path}; check the path, or train one with train.gate")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise FusionError(f"{path} is not a readable safetensors file: {error}") from error
    layers = _group_by_layer(tensors, path)
    gates = {}
    for layer, state_dict in layers.items():
        try:
            gates[layer] = Gate.from_diffsynth(state_dict)
        except FusionError as error:
            raise FusionError(f"{path}, layer {layer}: {error}") from error
    return GateBank(gates, metadata)


def save_gates(
    bank: GateBank, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write the gates as float32 under the published names; the file appears whole or not at all.

    Args:
        bank: The gates.
        path: The file to write or replace.
        metadata: Added to, and winning over, the bank's own.

    Raises:
        FusionError: The bank is empty, or the file can't be written.
    """
    if len(bank) == 0:
        raise FusionError("there are no gates to save")
    path = Path(path)
    tensors = {k: v.detach().float().cpu().contiguous() for k, v in bank.state_dict().items()}
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={**bank.metadata, **(metadata or {})})
    except (SafetensorError, OSError) as error:
        raise FusionError(f"can't write gates to {path}: {error}") from error


def _group_by_layer(tensors: Mapping[str, Tensor], path: Path) -> dict[str, dict[str, Tensor]]:
    layers: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        layer, _, name = key.removeprefix(_PREFIX).partition(".")
        state_dict = layers.setdefault(layer.replace(_DOT, "."), {})
        if not layer or name not in PARAMETER_NAMES or name in state_dict:
            unknown.append(key)
        state_dict[name] = tensor
    if unknown or not layers:
        some = ", ".join(unknown[:5]) or "none"
        raise FusionError(
            f"{path} is not a gate file: {len(unknown)} of its {len(tensors)} tensors are not a "
            f"gate's ({some}); expected names such as blocks___0___attn___a_to_qkv.weight_base"
        )
    return layers
