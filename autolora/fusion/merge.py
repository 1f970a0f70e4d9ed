"""Adapters merged into the weights themselves, and the weights restored to the bit.

For a weight ``W [out, in]`` stored in some floating-point type and adapters of strength ``s_i``::

    W' = round(W + sum_i s_i dW_i)

is computed in float32 (float64 for float64 weights) and rounded once, to the nearest value of the
type that the weight is stored in. A delta that depends on the weight (DoRA) sees ``W`` without the
other adapters. Biases and normalization weights are merged alike. The module's class does not
matter, only that ``weight`` is a plain tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from autolora.errors import FusionError
from autolora.fusion.adapter import Adapter, DenseAdapter
from autolora.fusion.match import (
    AttachedAdapter,
    attached_layers,
    check_adapters,
    find_layers,
    match,
)

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
    elif target.parts and target.path.endswith(".weight") and tensor.dim() in (2, 4):
        shape = target.parts[0][0].shape(target.path.removesuffix(".weight"))
        if tuple(tensor.shape) != tuple(shape):
            problem = f"is stored as {list(tensor.shape)} where the layer is {list(shape)}"
    if problem is not None:
        raise FusionError(
            f"{target.path} {problem}, so that nothing can be merged into it; use an un-merged "
            "strategy such as sum or gated, or a model in float8, bfloat16 or float32"
        )


Original = Callable[[str], Tensor]
"""Gives the original tensor of a parameter path such as ``blocks.0.ff_a.0.weight``."""


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What was merged.

    Attributes:
        layers: Paths of the layers that were changed, in the model's order.
        adapters: One entry per adapter, in the caller's order.
        rounding: By layer, what storing the new weight in its type lost: the norm of the rounding
            error over the norm of what the adapters add (Frobenius). At 1 nothing of the adapters
            is left. Layers stored in float32 or wider are not listed.
    """

    layers: tuple[str, ...]
    adapters: tuple[AttachedAdapter, ...]
    rounding: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(self)


@dataclass(slots=True)
class Merge:
    """A merge that is in force.

    Attributes:
        pairs: The adapters with their strengths.
        backup: Where the original weights are.
        original: How they are read again, for ``backup="reread"``.
        saved: What is to be restored; the tensor is None where it is read again.
    """

    pairs: Pairs
    backup: Literal["memory", "reread"]
    original: Original | None
    saved: dict[str, tuple[nn.Module, str, Tensor | None]] = field(default_factory=dict)


_MERGES: WeakKeyDictionary[nn.Module, Merge] = WeakKeyDictionary()


def merge_(
    module: nn.Module,
    adapters: Pairs,
    backup: Literal["memory", "reread"] = "memory",
    original: Original | None = None,
) -> MergeReport:
    """Add adapters to the weights of a model, in place, until `restore`.

    Everything is checked before anything is changed, and an error on the way restores all.

    Args:
        module: The model, such as a FLUX DiT; adapters name its layers by module path.
        adapters: Pairs of adapter and strength.
        backup: ``memory`` keeps the original tensors (a copy on the CPU where they are on another
            device); ``reread`` keeps nothing.
        original: For ``reread``, gives the original tensor by parameter path, such as from the
            checkpoint. It is asked once before a weight is changed, and must then give the present
            one to the bit, and once more to restore.

    Raises:
        FusionError: Adapters are merged or attached already, an adapter does not fit, or a weight
            is packed, quantized with scales, not in memory, or not what `original` gives.
        LoRAFormatError: An adapter's delta cannot be computed.
    """
    if backup not in ("memory", "reread") or (backup == "reread") != (original is not None):
        raise FusionError(
            f"backup {backup!r} is not possible here; use 'memory', or 'reread' together with a "
            "function that gives the original tensors"
        )
    matched, targets, extra = _checked(module, adapters)
    merge = Merge(adapters, backup, original)
    rounding: dict[str, float] = {}
    try:
        for target in targets:
            error = _merge_target(target, merge, _add_weights)
            if error is not None:
                rounding[target.path.removesuffix(".weight")] = error
        for target in extra:
            _merge_target(target, merge, _add_vectors)
    except BaseException:
        _put_back(merge)
        raise
    _MERGES[module] = merge
    layers = tuple(target.path.removesuffix(".weight") for target in targets)
    return MergeReport(layers, tuple(matched), rounding)


def check_mergeable(module: nn.Module, adapters: Pairs) -> None:
    """Make sure that adapters can be merged into a model; nothing is changed.

    Raises:
        FusionError: As for `merge_`.
    """
    _checked(module, adapters)


def _checked(
    module: nn.Module, adapters: Pairs
) -> tuple[list[AttachedAdapter], list[Target], list[Target]]:
    """Which adapters fit where, the weights to change, and the biases and norms."""
    _refuse_occupied(module)
    check_adapters(adapters)
    linears = find_layers(module)
    matched = [match(adapter, strength, linears) for adapter, strength in adapters]
    targets = weight_targets(linears, adapters, matched)
    extra = bias_targets(linears, adapters, matched) + norm_targets(module, adapters, matched)
    for target in (*targets, *extra):
        check_plain(target)
    return matched, targets, extra


def restore(module: nn.Module) -> int:
    """Put the original weights back, to the bit.

    Returns:
        How many tensors were restored; 0 where nothing is merged.

    Raises:
        FusionError: A weight cannot be read again; calling once more goes on from there.
    """
    merge = _MERGES.get(module)
    if merge is None:
        return 0
    count = len(merge.saved)
    _put_back(merge)
    del _MERGES[module]
    return count


@contextmanager
def merged(
    module: nn.Module,
    adapters: Pairs,
    backup: Literal["memory", "reread"] = "memory",
    original: Original | None = None,
) -> Iterator[MergeReport]:
    """Merge for the length of a ``with`` block; the weights are restored also after an error.

    Raises:
        FusionError: As for `merge_`.
    """
    report = merge_(module, adapters, backup, original)
    try:
        yield report
    finally:
        restore(module)


def merge_of(module: nn.Module) -> Merge | None:
    """Return the merge that is in force in a model, or None."""
    return _MERGES.get(module)


def base_weight(module: nn.Module, layer: str) -> Tensor:
    """Return a layer's own dense weight, without any adapter.

    Args:
        module: The model, with or without adapters attached or merged.
        layer: Canonical layer name.

    Returns:
        Float32 ``[out, in]``, or float64 for such weights.

    Raises:
        FusionError: There is no such layer, or its weight is packed or not in memory.
    """
    linear = find_layers(module).get(layer)
    if linear is None:
        raise FusionError(f"the model has no linear layer {layer!r}")
    path = f"{layer}.weight"
    target = Target(path, linear, "weight", [])
    check_plain(target)
    merge = _MERGES.get(module)
    if merge is not None and path in merge.saved:
        return _wide(_original(merge, path))
    return _wide(getattr(target.owner, target.name).detach())


def _refuse_occupied(module: nn.Module) -> None:
    for other in _MERGES:
        if other is module or other in set(module.modules()) or module in set(other.modules()):
            raise FusionError("adapters are merged into this model already; restore it first")
    if attached_layers(module):
        raise FusionError("adapters are attached to this model; detach them before merging")


def _merge_target(
    target: Target, merge: Merge, add: Callable[[str, Tensor, list[tuple[Adapter, float]]], None]
) -> float | None:
    """Change one tensor; return the relative rounding error where its type is narrow."""
    parts = [(adapter, strength) for adapter, strength in target.parts if strength != 0]
    if not parts:
        return None
    stored = getattr(target.owner, target.name)
    data = stored.data
    with torch.inference_mode(False), torch.no_grad():
        # Never written in place: the tensor may be shared, or be a file in memory.
        before = _wide(data)
        total = before.clone()
        add(target.path, total, parts)
        result = _rounded(total, data.dtype)
        error = None
        if result.dtype != total.dtype:
            added = (total - before).norm()
            lost = (result.to(total.dtype) - total).norm()
            error = float(lost / added) if added > 0 else 0.0
    merge.saved[target.path] = (target.owner, target.name, _save(target.path, data, merge))
    stored.data = result
    return error


def _save(path: str, data: Tensor, merge: Merge) -> Tensor | None:
    if merge.original is None:
        return data if data.device.type == "cpu" else data.to("cpu")
    again = merge.original(path)
    if again.shape != data.shape or not _same_bits(again.to(data.device, data.dtype), data):
        raise FusionError(
            f"{path}: what is read again is not the model's present weight; use backup='memory', "
            "or give the tensors that this model was loaded from"
        )
    return None


def _put_back(merge: Merge) -> None:
    for path in reversed(list(merge.saved)):
        owner, name, _ = merge.saved[path]
        stored = getattr(owner, name)
        data = _original(merge, path)
        # The model may have been moved or cast meanwhile.
        stored.data = data.to(device=stored.device, dtype=stored.dtype)
        del merge.saved[path]


def _original(merge: Merge, path: str) -> Tensor:
    data = merge.saved[path][2]
    if data is not None:
        return data
    assert merge.original is not None
    try:
        return merge.original(path)
    except (OSError, KeyError, RuntimeError) as error:
        raise FusionError(
            f"{path} cannot be read again ({error}); make its file readable and restore once more"
        ) from error


def _add_weights(path: str, total: Tensor, parts: list[tuple[Adapter, float]]) -> None:
    layer = path.removesuffix(".weight")
    dora = any(isinstance(a, DenseAdapter) and layer in a.needs_base for a, _ in parts)
    base = total.to("cpu", copy=True) if dora else None
    for adapter, strength in parts:
        if isinstance(adapter, DenseAdapter) and not adapter.exact(layer):
            delta = adapter.delta(layer, base if layer in adapter.needs_base else None)
            total.add_(delta.to(total), alpha=strength)
        else:
            down, up = adapter.factors(layer)
            if total.dim() == 2:
                total.addmm_(up.to(total), down.to(total), alpha=strength)
            else:  # the kernel of a convolution counts as inputs
                total.add_((up.to(total) @ down.to(total)).reshape(total.shape), alpha=strength)


def _add_vectors(path: str, total: Tensor, parts: list[tuple[Adapter, float]]) -> None:
    owner, _, name = path.rpartition(".")
    for adapter, strength in parts:
        assert isinstance(adapter, DenseAdapter)
        change = adapter.bias(owner) if name == "bias" else adapter.norms[owner]
        assert change is not None
        total.add_(change.to(total), alpha=strength)


def _wide(data: Tensor) -> Tensor:
    return data if data.dtype == torch.float64 else data.to(torch.float32)


def _rounded(total: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to the nearest value of a type; what is beyond its range becomes its largest."""
    limit = torch.finfo(dtype).max
    if limit < torch.finfo(torch.bfloat16).max:
        total = total.clamp(-limit, limit)
    return total.to(dtype)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    one, other = one.contiguous(), other.contiguous()
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))
