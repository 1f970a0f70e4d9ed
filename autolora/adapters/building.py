"""From modules of a file to weight changes by layer."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

from autolora.adapters.changes import Change, Full, Hadamard, Kronecker, LowRank, Matrix
from autolora.adapters.deltas import LayerDelta, Magnitude, Piece
from autolora.adapters.formats import KeyMatch
from autolora.adapters.grouping import (
    RANKED,
    Group,
    layer_rows,
    layer_type,
    magnitude_axis,
    slice_names,
)
from autolora.adapters.namings import Part
from autolora.adapters.peft_config import PeftConfig
from autolora.flux.layers import output_slices


@dataclass
class Contents:
    """What a file changes in one model.

    Attributes:
        layers: Weight changes by layer.
        biases: Changes of biases, float32 ``[out]``, by layer.
        norms: Changes of normalization weights, float32, by module path.
        matched: Layer by key of the file.
    """

    layers: dict[str, LayerDelta] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    matched: dict[str, str] = field(default_factory=dict)


def build(
    path: Path,
    groups: Iterable[Group],
    tensors: Mapping[str, Tensor],
    configs: Mapping[Part, PeftConfig],
) -> dict[Part, Contents]:
    """Make weight changes of checked modules.

    Args:
        path: The file, for errors.
        groups: Its modules, with their shapes.
        tensors: Its tensors by key.
        configs: PEFT configuration by model.

    Returns:
        Changes by model, for those models that are changed.
    """
    found: dict[Part, Contents] = {}
    shapes: dict[tuple[Part, str], tuple[int, int]] = {}
    pieces: dict[tuple[Part, str], list[Piece]] = {}
    for group in groups:
        part, layer = group.target.part, group.target.layer
        contents = found.setdefault(part, Contents())
        contents.matched |= {match.key: layer for match in group.keys.values()}
        if group.target.is_norm:
            contents.norms[layer] = tensors[group.key("diff")].to(torch.float32)
            continue
        rows, out_features = _rows(path, group)
        scale = _scale(group, tensors, configs.get(part, PeftConfig()))
        if group.algorithm:
            shapes[part, layer] = (out_features, group.shape[1])
            piece = Piece(_change(group, tensors, scale), rows, _magnitude(group, tensors))
            pieces.setdefault((part, layer), []).append(piece)
        _add_biases(group, tensors, scale, rows, out_features, contents.biases)
    for (part, layer), parts in pieces.items():
        found[part].layers[layer] = LayerDelta(*shapes[part, layer], tuple(parts))
    return found


def _rows(path: Path, group: Group) -> tuple[tuple[slice, ...], int]:
    """Output rows that a module stands for, and how many the whole layer has."""
    out_features = layer_rows(path, group)
    kind = layer_type(group.target)
    if not group.target.slices or kind is None:
        return (slice(0, out_features),), out_features
    slices = output_slices(kind, out_features)
    return tuple(slices[name] for name in slice_names(group.target)), out_features


def _scale(group: Group, tensors: Mapping[str, Tensor], peft: PeftConfig) -> float:
    """``alpha / rank``, alpha from the module's own tensor or else from the configuration.

    The rank is that of the factors; for LoKr that of the side that is a product, and where both
    are stored whole, LyCORIS ignores alpha.
    """
    if not group.has_scale:
        whole = group.keys.get("lokr_w1")
        return 1.0 if whole is None or "alpha" in group.keys else _whole_scale(whole, peft)
    role = next(role for role in RANKED if role in group.keys)
    match = group.keys[role]
    rank = int(tensors[match.key].shape[1 if role == "B" else 0])
    if "alpha" in group.keys:
        return float(tensors[group.key("alpha")].item()) / rank
    return peft.scale(match.path, rank) if match.format.reads_peft else 1.0


def _whole_scale(match: KeyMatch, peft: PeftConfig) -> float:
    return peft.whole_scale(match.path) if match.format.reads_peft else 1.0


def _change(group: Group, tensors: Mapping[str, Tensor], scale: float) -> Change:
    def tensor(role: str) -> Tensor | None:
        return tensors[group.key(role)] if role in group.keys else None

    def side(prefix: str, number: int) -> Matrix:
        name = f"{prefix}_w{number}"
        core = tensor(f"{prefix}_t{number}")
        return Matrix(tensor(name), tensor(f"{name}_a"), tensor(f"{name}_b"), core)

    if group.algorithm == "lora":
        return LowRank(tensors[group.key("A")], tensors[group.key("B")], scale)
    if group.algorithm == "lokr":
        return Kronecker(side("lokr", 1), side("lokr", 2), scale)
    if group.algorithm == "loha":
        return Hadamard(side("hada", 1), side("hada", 2), scale)
    return Full(tensors[group.key("diff")])


def _magnitude(group: Group, tensors: Mapping[str, Tensor]) -> Magnitude | None:
    if "magnitude" not in group.keys:
        return None
    values = tensors[group.key("magnitude")]
    axis = magnitude_axis(tuple(values.shape), group.shape)
    return Magnitude(values.flatten(), cast(Literal["rows", "columns"], axis))


def _add_biases(
    group: Group,
    tensors: Mapping[str, Tensor],
    scale: float,
    rows: tuple[slice, ...],
    out_features: int,
    biases: dict[str, Tensor],
) -> None:
    """Add a module's bias (PEFT's is part of B, so scaled like it) to that of its layer."""
    for role, factor in (("bias", scale), ("diff_b", 1.0)):
        if role not in group.keys:
            continue
        bias = biases.setdefault(group.target.layer, torch.zeros(out_features))
        values = tensors[group.key(role)].flatten().to(torch.float64) * factor
        parts = values.split([where.stop - where.start for where in rows])
        for where, part in zip(rows, parts, strict=True):
            bias[where] += part.to(torch.float32)
