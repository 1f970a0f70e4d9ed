"""The tensors that a merge changes, and whether anything can be added to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autolora.errors import FusionError
from autolora.fusion.adapter import Adapter, DenseAdapter
from autolora.fusion.matching import AttachedAdapter

Pairs = Sequence[tuple[Adapter, float]]

_FLOATS = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
_SCALES = ("weight_scale", "weight_scale_inv", "scale_weight", "quant_state")


@dataclass(frozen=True, slots=True)
class Target:
    """One tensor to change and what is added to it.

    Attributes:
        path: Its path in the model.
        owner: The module that has it.
        name: Its name there, ``weight`` or ``bias``.
        parts: The adapters that change it, with their strengths.
    """

    path: str
    owner: nn.Module
    name: str
    parts: list[tuple[Adapter, float]]


def weight_targets(
    linears: Mapping[str, nn.Module], adapters: Pairs, matched: Sequence[AttachedAdapter]
) -> list[Target]:
    """Return the weights of the layers that adapters were matched to, in the model's order."""
    members: dict[str, list[tuple[Adapter, float]]] = {}
    for pair, entry in zip(adapters, matched, strict=True):
        for layer in entry.layers:
            members.setdefault(layer, []).append(pair)
    return [
        Target(f"{layer}.weight", linears[layer], "weight", members[layer])
        for layer in linears
        if layer in members
    ]


def bias_targets(
    linears: Mapping[str, nn.Module], adapters: Pairs, matched: Sequence[AttachedAdapter]
) -> list[Target]:
    """Return the biases that adapters change; one that is not there is noted as skipped."""
    targets: dict[str, Target] = {}
    for (adapter, strength), entry in zip(adapters, matched, strict=True):
        if not isinstance(adapter, DenseAdapter):
            continue
        for layer in adapter.bias_layers:
            path = f"{layer}.bias"
            owner, change = linears.get(layer), adapter.bias(layer)
            own = getattr(owner, "bias", None)
            if owner is None or own is None or change is None or own.shape != change.shape:
                entry.skipped[path] = "the model has no bias of this name and size"
                continue
            target = targets.setdefault(path, Target(path, owner, "bias", []))
            target.parts.append((adapter, strength))
    return list(targets.values())


def norm_targets(
    module: nn.Module, adapters: Pairs, matched: Sequence[AttachedAdapter]
) -> list[Target]:
    """Return the normalization weights that adapters change; a missing one is noted as skipped."""
    modules = dict(module.named_modules())
    targets: dict[str, Target] = {}
    for (adapter, strength), entry in zip(adapters, matched, strict=True):
        if not isinstance(adapter, DenseAdapter):
            continue
        for name, change in adapter.norms.items():
            owner = modules.get(name)
            weight = getattr(owner, "weight", None)
            path = f"{name}.weight"
            if owner is None or weight is None or weight.shape != change.shape:
                entry.skipped[path] = "the model has no normalization weight of this name and size"
                continue
            targets.setdefault(path, Target(path, owner, "weight", [])).parts.append(
                (adapter, strength)
            )
    return list(targets.values())


def check_plain(target: Target) -> None:
    """Make sure that a tensor holds the numbers themselves, in a type that can be added to.

    Raises:
        FusionError: It is packed, quantized with scales, not in memory, or of another shape.
    """
    tensor = getattr(target.owner, target.name, None)
    problem = None
    if not isinstance(tensor, Tensor):
        problem = "is not a tensor"
    elif type(tensor.data) is not Tensor:
        problem = f"is packed as {type(tensor.data).__name__}"
    elif tensor.dtype not in _FLOATS:
        problem = f"is packed as {str(tensor.dtype).removeprefix('torch.')}"
    elif any(getattr(target.owner, name, None) is not None for name in _SCALES):
        problem = "is quantized with scales"
    elif tensor.is_meta:
        problem = "is not in memory (it stays on the disk until it is used)"
    elif target.parts and target.path.endswith(".weight") and tensor.dim() == 2:
        shape = target.parts[0][0].shape(target.path.removesuffix(".weight"))
        if tuple(tensor.shape) != tuple(shape):
            problem = f"is stored as {list(tensor.shape)} where the layer is {list(shape)}"
    if problem is not None:
        raise FusionError(
            f"{target.path} {problem}, so that nothing can be merged into it; use an un-merged "
            "strategy such as sum or gated, or a model in float8, bfloat16 or float32"
        )
