"""Put adapters into a model and take them out again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from autolora.errors import FusionError
from autolora.fusion.adapter import Adapter
from autolora.fusion.bank import GateBank
from autolora.fusion.linear import FusedLinear, linear_shape
from autolora.fusion.strategies import Strategy, get_strategy


@dataclass(frozen=True, slots=True)
class AttachedAdapter:
    """What became of one adapter.

    Attributes:
        name: Its name.
        strength: Its strength.
        layers: Layers it was put into.
        skipped: Its other layers, each with the reason.
    """

    name: str
    strength: float
    layers: tuple[str, ...]
    skipped: dict[str, str]


@dataclass(frozen=True, slots=True)
class AttachReport:
    """What `attach` did.

    Attributes:
        strategy: Name of the strategy.
        layers: Layers that now hold at least one adapter, in the model's order.
        adapters: One entry per adapter, in the caller's order.
        ungated: Those of ``layers`` for which a strategy that uses gates had none, so that they
            sum; empty for other strategies.
    """

    strategy: str
    layers: tuple[str, ...]
    adapters: tuple[AttachedAdapter, ...]
    ungated: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(self)


def attach(
    module: nn.Module,
    adapters: Sequence[tuple[Adapter, float]],
    strategy: str = "gated",
    gates: GateBank | None = None,
) -> AttachReport:
    """Put adapters around the linear layers of a model.

    Everything is checked before anything is changed. Adapters that are attached already are
    replaced; base layers are kept as they are, so that `detach` restores them to the bit.

    Args:
        module: The model, such as a FLUX DiT; adapters name its layers by module path.
        adapters: Pairs of adapter and strength; none at all detaches.
        strategy: Name of the strategy.
        gates: Trained gates for strategies that use them; None is the plain sum.

    Raises:
        FusionError: An unknown strategy, an adapter without a matching layer or of the wrong
            shape, two adapters of one name, a strength that is not finite, or gates for another
            model.
    """
    chosen = get_strategy(strategy)
    _check_adapters(adapters)
    linears = _find_linears(module)
    attached = tuple(_match(adapter, strength, linears) for adapter, strength in adapters)
    members: dict[str, list[tuple[Adapter, float]]] = {layer: [] for layer in linears}
    for pair, entry in zip(adapters, attached, strict=True):
        for layer in entry.layers:
            members[layer].append(pair)
    layers = tuple(layer for layer in linears if members[layer])
    ungated = _check_gates(chosen, gates, layers, linears)
    fused = {layer: _fuse(chosen, layer, linears[layer], members[layer], gates) for layer in layers}
    detach(module)
    for layer, replacement in fused.items():
        _replace(module, layer, replacement)
    return AttachReport(strategy, layers, attached, ungated)


def detach(module: nn.Module) -> int:
    """Take all adapters out: the base layers return as the same objects.

    Returns:
        The number of layers restored.
    """
    fused = attached_layers(module)
    for layer, replacement in fused.items():
        _replace(module, layer, replacement.base)
    return len(fused)


@contextmanager
def attached(
    module: nn.Module,
    adapters: Sequence[tuple[Adapter, float]],
    strategy: str = "gated",
    gates: GateBank | None = None,
) -> Iterator[AttachReport]:
    """Attach for the length of a ``with`` block; then what was attached before is there again.

    Raises:
        FusionError: As for `attach`.
    """
    before = attached_layers(module)
    report = attach(module, adapters, strategy, gates)
    try:
        yield report
    finally:
        detach(module)
        for layer, replacement in before.items():
            _replace(module, layer, replacement)


def set_strengths(module: nn.Module, strengths: Mapping[str, float]) -> None:
    """Change the strengths of attached adapters by name; the others keep theirs.

    Raises:
        FusionError: A name is not attached, or a strength is not finite; nothing is changed then.
    """
    fused = attached_layers(module)
    names = {name: None for layer in fused.values() for name in layer.names}
    for name, strength in strengths.items():
        if name not in names:
            raise FusionError(
                f"adapter {name!r} is not attached; attached: {', '.join(names) or 'none'}"
            )
        _check_strength(name, strength)
    for layer in fused.values():
        if not strengths.keys().isdisjoint(layer.names):
            current = zip(layer.names, layer.strengths, strict=True)
            layer.set_strengths([strengths.get(name, value) for name, value in current])


def attached_layers(module: nn.Module) -> dict[str, FusedLinear]:
    """Return the layers that hold adapters, by canonical name."""
    return {name: m for name, m in module.named_modules() if isinstance(m, FusedLinear)}


def linear_shapes(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Return ``(out, in)`` of every linear layer by path, as if nothing were attached."""
    shapes = {layer: linear_shape(base) for layer, base in _find_linears(module).items()}
    return {layer: shape for layer, shape in shapes.items() if shape is not None}


def _find_linears(module: nn.Module) -> dict[str, nn.Module]:
    """Return the base of every linear layer by its path, as if nothing were attached."""
    linears: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, child in module.named_modules():
        if not name or name.startswith(inside):
            continue
        base = child.base if isinstance(child, FusedLinear) else child
        if linear_shape(base) is not None:
            linears[name] = base
            # A quantized layer may hold another linear inside; only the outer one is ours.
            inside = (f"{name}.",)
    return linears


def _check_adapters(adapters: Sequence[tuple[Adapter, float]]) -> None:
    names = [adapter.name for adapter, _ in adapters]
    for name in names:
        if names.count(name) > 1:
            raise FusionError(f"adapter {name!r} is given twice; add up its strengths instead")
    for adapter, strength in adapters:
        _check_strength(adapter.name, strength)


def _check_strength(name: str, strength: float) -> None:
    if not isinstance(strength, (int, float)) or not math.isfinite(strength):
        raise FusionError(f"strength {strength!r} of adapter {name!r} is not a finite number")


def _match(adapter: Adapter, strength: float, linears: Mapping[str, nn.Module]) -> AttachedAdapter:
    matched, skipped = [], {}
    for layer in adapter.layers:
        if layer not in linears:
            skipped[layer] = "the model has no linear layer of this name"
            continue
        shape = linear_shape(linears[layer])
        if shape != tuple(adapter.shape(layer)):
            raise FusionError(
                f"adapter {adapter.name!r} does not fit this model: layer {layer} is "
                f"{list(shape or ())} here and {list(adapter.shape(layer))} in the adapter; "
                "it was made for another base model"
            )
        matched.append(layer)
    if not matched:
        some = ", ".join(list(adapter.layers)[:5]) or "none"
        raise FusionError(
            f"adapter {adapter.name!r} matches no layer of this model; its layers: {some}"
        )
    return AttachedAdapter(adapter.name, float(strength), tuple(matched), skipped)


def _check_gates(
    strategy: Strategy,
    gates: GateBank | None,
    layers: Sequence[str],
    linears: Mapping[str, nn.Module],
) -> tuple[str, ...]:
    """Check that the gates are made for this model; return the layers that have none."""
    if gates is None or not strategy.uses_gates:
        return tuple(layers) if strategy.uses_gates else ()
    for layer, gate in gates.items():
        shape = linear_shape(linears[layer]) if layer in linears else None
        if shape is None or shape[0] != gate.out_features:
            here = "is missing here" if shape is None else f"has {shape[0]} channels here"
            raise FusionError(
                f"the gates are for another model: layer {layer} with {gate.out_features} "
                f"channels {here}"
            )
    return tuple(layer for layer in layers if layer not in gates)


def _fuse(
    strategy: Strategy,
    layer: str,
    base: nn.Module,
    adapters: Sequence[tuple[Adapter, float]],
    gates: GateBank | None,
) -> FusedLinear:
    names = [adapter.name for adapter, _ in adapters]
    factors = [adapter.factors(layer) for adapter, _ in adapters]
    try:
        return strategy.fuse(layer, base, names, factors, [s for _, s in adapters], gates)
    except FusionError as error:
        raise FusionError(f"layer {layer}: {error}") from error


def _replace(module: nn.Module, layer: str, replacement: nn.Module) -> None:
    parent, _, name = layer.rpartition(".")
    module.get_submodule(parent)._modules[name] = replacement
