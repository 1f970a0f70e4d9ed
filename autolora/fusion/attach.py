"""Put adapters into a model and take them out again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from autolora.errors import FusionError
from autolora.fusion.adapter import Adapter
from autolora.fusion.bank import GateBank
from autolora.fusion.linear import FusedLinear, linear_shape
from autolora.fusion.matching import (
    AttachedAdapter,
    attached_layers,
    check_adapters,
    check_strengths,
    find_linears,
    match,
    replace_layer,
)
from autolora.fusion.merge import Merge, MergeReport, merge_, merge_of, restore
from autolora.fusion.strategies import Strategy, get_strategy


@dataclass(frozen=True, slots=True)
class AttachReport:
    """What `attach` did.

    Attributes:
        strategy: Name of the strategy.
        layers: Layers that now hold at least one adapter, in the model's order.
        adapters: One entry per adapter, in the caller's order.
        ungated: Those of ``layers`` for which a strategy that uses gates had none, so that they
            sum; empty for other strategies.
        rounding: By layer, what the rounding of a merged weight lost of the adapters, as
            `autolora.fusion.merge.MergeReport` says; empty for other strategies.
    """

    strategy: str
    layers: tuple[str, ...]
    adapters: tuple[AttachedAdapter, ...]
    ungated: tuple[str, ...]
    rounding: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(self)


def attach(
    module: nn.Module,
    adapters: Sequence[tuple[Adapter, float]],
    strategy: str = "gated",
    gates: GateBank | None = None,
) -> AttachReport:
    """Put adapters around the linear layers of a model, or into its weights.

    Everything is checked before anything is changed. Adapters that are attached already are
    replaced; base layers are kept as they are, so that `detach` restores them to the bit. The
    strategy ``merged`` changes the weights, with a backup in memory.

    Args:
        module: The model, such as a FLUX DiT; adapters name its layers by module path.
        adapters: Pairs of adapter and strength; none at all detaches.
        strategy: Name of the strategy.
        gates: Trained gates for strategies that use them; None is the plain sum.

    Raises:
        FusionError: An unknown strategy, an adapter without a matching layer or of the wrong
            shape, two adapters of one name, a strength that is not finite, gates for another
            model, or a weight that nothing can be merged into.
    """
    chosen = get_strategy(strategy)
    if chosen.merges:
        return _merge_instead(module, adapters)
    plan = plan_layers(module, adapters, chosen, gates)
    fused = {
        layer: fuse_layer(chosen, layer, plan.linears[layer], members, gates)
        for layer, members in plan.members.items()
    }
    detach(module)
    for layer, replacement in fused.items():
        replace_layer(module, layer, replacement)
    return plan.report


def detach(module: nn.Module) -> int:
    """Take all adapters out: base layers return as the same objects, merged weights to the bit.

    Returns:
        The number of layers, or for merged adapters of tensors, that were restored.
    """
    fused = attached_layers(module)
    for layer, replacement in fused.items():
        replace_layer(module, layer, replacement.base)
    return len(fused) + restore(module)


@contextmanager
def attached(
    module: nn.Module,
    adapters: Sequence[tuple[Adapter, float]],
    strategy: str = "gated",
    gates: GateBank | None = None,
) -> Iterator[AttachReport]:
    """Attach for the length of a ``with`` block; then what was in force before is so again.

    Raises:
        FusionError: As for `attach`.
    """
    before = _InForce.of(module)
    try:
        yield attach(module, adapters, strategy, gates)
    finally:
        before.put_back(module)


def set_strengths(module: nn.Module, strengths: Mapping[str, float]) -> None:
    """Change the strengths of attached or merged adapters by name; the others keep theirs.

    Raises:
        FusionError: A name is not attached, or a strength is not finite; nothing is changed then.
    """
    merge = merge_of(module)
    if merge is not None:
        check_strengths([adapter.name for adapter, _ in merge.pairs], strengths)
        pairs = [(adapter, strengths.get(adapter.name, value)) for adapter, value in merge.pairs]
        remerge(module, merge, pairs)
        return
    fused = attached_layers(module)
    check_strengths(attached_names(module), strengths)
    for layer in fused.values():
        if not strengths.keys().isdisjoint(layer.names):
            current = zip(layer.names, layer.strengths, strict=True)
            layer.set_strengths([strengths.get(name, value) for name, value in current])


def attached_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the adapters that are attached or merged."""
    merge = merge_of(module)
    if merge is not None:
        return tuple(adapter.name for adapter, _ in merge.pairs)
    layers = attached_layers(module).values()
    return tuple(dict.fromkeys(name for layer in layers for name in layer.names))


def linear_shapes(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Return ``(out, in)`` of every linear layer by path, as if nothing were attached."""
    shapes = {layer: linear_shape(base) for layer, base in find_linears(module).items()}
    return {layer: shape for layer, shape in shapes.items() if shape is not None}


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What attaching means for every layer; nothing is changed yet.

    Attributes:
        linears: The base of every linear layer.
        members: The adapters of each layer that holds any, in the model's order.
        report: What is going to be told.
    """

    linears: dict[str, nn.Module]
    members: dict[str, list[tuple[Adapter, float]]]
    report: AttachReport


def plan_layers(
    module: nn.Module,
    adapters: Sequence[tuple[Adapter, float]],
    strategy: Strategy,
    gates: GateBank | None,
) -> LayerPlan:
    """Check adapters and gates against a model.

    Raises:
        FusionError: As for `attach`.
    """
    check_adapters(adapters)
    linears = find_linears(module)
    matched = tuple(match(adapter, strength, linears) for adapter, strength in adapters)
    members: dict[str, list[tuple[Adapter, float]]] = {layer: [] for layer in linears}
    for pair, entry in zip(adapters, matched, strict=True):
        for layer in entry.layers:
            members[layer].append(pair)
    members = {layer: pairs for layer, pairs in members.items() if pairs}
    ungated = _check_gates(strategy, gates, tuple(members), linears)
    report = AttachReport(strategy.name, tuple(members), matched, ungated)
    return LayerPlan(linears, members, report)


@dataclass(frozen=True, slots=True)
class _InForce:
    """What is attached or merged at some moment."""

    fused: dict[str, FusedLinear]
    merge: Merge | None

    @classmethod
    def of(cls, module: nn.Module) -> _InForce:
        return cls(attached_layers(module), merge_of(module))

    def put_back(self, module: nn.Module) -> None:
        if self.merge is not None and self.merge is merge_of(module):
            for layer, other in attached_layers(module).items():
                replace_layer(module, layer, other.base)
            return
        detach(module)
        for layer, replacement in self.fused.items():
            replace_layer(module, layer, replacement)
        if self.merge is not None:
            merge_(module, self.merge.pairs, self.merge.backup, self.merge.original)


def _merge_instead(module: nn.Module, adapters: Sequence[tuple[Adapter, float]]) -> AttachReport:
    before = _InForce.of(module)
    detach(module)
    if not adapters:
        return AttachReport("merged", (), (), ())
    try:
        return _told(merge_(module, adapters))
    except BaseException:
        before.put_back(module)
        raise


def remerge(
    module: nn.Module, merge: Merge, pairs: Sequence[tuple[Adapter, float]]
) -> AttachReport:
    """Merge other adapters or strengths in the place of a merge in force, backed up as it was.

    Raises:
        FusionError: As for `autolora.fusion.merge.merge_`; the former merge is in force then.
    """
    before = _InForce.of(module)
    restore(module)
    if not pairs:
        return AttachReport("merged", (), (), ())
    try:
        return _told(merge_(module, pairs, merge.backup, merge.original))
    except BaseException:
        before.put_back(module)
        raise


def _told(report: MergeReport) -> AttachReport:
    return AttachReport("merged", report.layers, report.adapters, (), report.rounding)


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


def fuse_layer(
    strategy: Strategy,
    layer: str,
    base: nn.Module,
    adapters: Sequence[tuple[Adapter, float]],
    gates: GateBank | None,
) -> FusedLinear:
    """Put the adapters of one layer around its base.

    Raises:
        FusionError: An adapter's factors are not what it promised.
    """
    names = [adapter.name for adapter, _ in adapters]
    factors = [adapter.factors(layer) for adapter, _ in adapters]
    try:
        return strategy.fuse(layer, base, names, factors, [s for _, s in adapters], gates)
    except FusionError as error:
        raise FusionError(f"layer {layer}: {error}") from error
