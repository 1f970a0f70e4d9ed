"""Attaches adapters to a model, exchanges them, and takes them out.

`attach` replaces layers by `FusedLinear`. `switch`, `add` and `remove` keep what is attached and
change only the layers that differ; other adapters' factors are not computed again. For models that
are compiled or captured as CUDA graphs, `reserve` sets memory aside for adapters that come later.
Factors may be copied to the accelerator while it works on something else (`ready_beside`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from autolora.errors import FusionError
from autolora.fusion.adapter import Adapter
from autolora.fusion.conv import weight_shape
from autolora.fusion.gate import GateBank
from autolora.fusion.linear import FusedLinear, linear_shape
from autolora.fusion.match import (
    AttachedAdapter,
    attached_layers,
    check_adapters,
    check_attached,
    check_strengths,
    find_layers,
    find_linears,
    match,
    replace_layer,
)
from autolora.fusion.merge import Merge, MergeReport, merge_, merge_of, restore
from autolora.fusion.packed import Capacity, Factors
from autolora.fusion.strategies import ShapedLinear, Strategy, get_strategy


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
    strategy: str | Strategy = "gated",
    gates: GateBank | None = None,
) -> AttachReport:
    """Put adapters around the linear layers of a model, or into its weights.

    Everything is checked before anything is changed. Adapters that are attached already are
    replaced; base layers are kept as they are, so that `detach` restores them to the bit. The
    strategy ``merged`` changes the weights, with a backup in memory.

    Args:
        module: The model, such as a FLUX DiT; adapters name its layers by module path.
        adapters: Pairs of adapter and strength; none at all detaches.
        strategy: The strategy or its name.
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
    strategy: str | Strategy = "gated",
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


def layer_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the weight's shape of every layer that adapters can act in, by path, likewise.

    Returns:
        ``(out, in)`` of linear layers, ``(out, in, height, width)`` of convolutions.
    """
    shapes = {layer: weight_shape(base) for layer, base in find_layers(module).items()}
    return {layer: shape for layer, shape in shapes.items() if shape is not None}


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What attaching means for every layer; nothing is changed yet.

    Attributes:
        linears: The base of every linear layer and convolution.
        members: The adapters of each layer that holds any, in the model's order.
        report: The report to return.
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
    strategy.begin([adapter.name for adapter, _ in adapters])
    linears = find_layers(module)
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
        shape = weight_shape(linears[layer]) if layer in linears else None
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


Members = Sequence[tuple[Adapter, float]]
Entry = tuple[str, Factors, float]
"""Name, factors and strength of an adapter in one layer."""


def switch(
    module: nn.Module,
    adapters: Members,
    strategy: str | Strategy = "gated",
    gates: GateBank | None = None,
) -> AttachReport:
    """Go from what is attached to other adapters, strengths, gates or another strategy.

    The result is that of `attach`, to the bit. A layer whose adapters, factors (the same tensors)
    and strengths stay is not touched, nor is what it has computed from them; adapters that keep
    their factors, as `autolora.lora.PreparedLoRA` does, therefore make a switch cheap.

    Args:
        module: The model.
        adapters: Pairs of adapter and strength, as they should be afterwards; none detaches.
        strategy: The strategy or its name.
        gates: Trained gates for strategies that use them; None is the plain sum.

    Raises:
        FusionError: As for `attach`; nothing is changed then.
    """
    chosen = get_strategy(strategy)
    if chosen.merges or merge_of(module) is not None:
        return attach(module, adapters, strategy, gates)
    plan = plan_layers(module, adapters, chosen, gates)
    present = attached_layers(module)
    updates: list[tuple[str, FusedLinear, Sequence[Entry]]] = []
    built: dict[str, FusedLinear] = {}
    for layer, members in plan.members.items():
        fused = present.get(layer)
        if fused is not None and chosen.updates(layer, fused, gates):
            entries = [(a.name, a.factors(layer), float(s)) for a, s in members]
            if not _same(entries, _entries(fused)):
                updates.append((layer, fused, entries))
        else:
            built[layer] = fuse_layer(chosen, layer, plan.linears[layer], members, gates)
    leaving = present.keys() - plan.members.keys()
    reserved = [layer for layer in leaving if present[layer].capacity is not None]
    _update([*updates, *((layer, present[layer], ()) for layer in reserved)])
    for layer, replacement in built.items():
        replace_layer(module, layer, replacement)
    for layer in leaving - set(reserved):
        replace_layer(module, layer, present[layer].base)
    return plan.report


def add(
    module: nn.Module,
    adapter: Adapter,
    strength: float = 1.0,
    strategy: str | Strategy = "gated",
    gates: GateBank | None = None,
) -> AttachedAdapter:
    """Attach one more adapter, after those that are attached already.

    Args:
        module: The model.
        adapter: The adapter.
        strength: Its strength.
        strategy: What the others are attached by; a layer that holds none yet gets it.
        gates: As for the others.

    Raises:
        FusionError: An adapter of this name is attached, the others are attached otherwise, or as
            for `attach`; nothing is changed then.
    """
    chosen = get_strategy(strategy)
    if adapter.name in attached_names(module):
        raise FusionError(f"adapter {adapter.name!r} is attached already; change its strength")
    if chosen.shapes:
        raise FusionError(f"adapters under {chosen.name} depend on each other; attach them at once")
    merge = merge_of(module)
    if merge is not None or chosen.merges:
        if merge is None and attached_names(module):
            raise FusionError("the other adapters are not merged; detach them first, or use theirs")
        if merge is None:
            return attach(module, [(adapter, strength)], "merged").adapters[0]
        return remerge(module, merge, [*merge.pairs, (adapter, strength)]).adapters[-1]
    plan = plan_layers(module, [(adapter, strength)], chosen, gates)
    present = attached_layers(module)
    updates: list[tuple[str, FusedLinear, list[Entry]]] = []
    built: dict[str, FusedLinear] = {}
    for layer, members in plan.members.items():
        fused = present.get(layer)
        if fused is None:
            built[layer] = fuse_layer(chosen, layer, plan.linears[layer], members, gates)
        elif chosen.updates(layer, fused, gates):
            new = (adapter.name, adapter.factors(layer), float(strength))
            updates.append((layer, fused, [*_entries(fused), new]))
        else:
            raise FusionError(f"layer {layer}: the other adapters go through other gates")
    _update(updates)
    for layer, replacement in built.items():
        replace_layer(module, layer, replacement)
    return plan.report.adapters[0]


def remove(module: nn.Module, name: str) -> int:
    """Take one adapter out; the others stay as they are.

    Returns:
        The number of layers that it was in (for merged adapters, of all layers merged anew).

    Raises:
        FusionError: It is not attached.
    """
    check_attached(attached_names(module), name)
    merge = merge_of(module)
    if merge is not None:
        rest = [pair for pair in merge.pairs if pair[0].name != name]
        return len(remerge(module, merge, rest).layers)
    count = 0
    for layer, fused in attached_layers(module).items():
        if name not in fused.names:
            continue
        count += 1
        rest_of_layer = [entry for entry in _entries(fused) if entry[0] != name]
        if rest_of_layer or fused.capacity is not None:
            _update([(layer, fused, rest_of_layer)])
        else:
            replace_layer(module, layer, fused.base)
    _shape_anew(module)
    return count


def _shape_anew(module: nn.Module) -> None:
    """Let a strategy that looks at all adapters know that there are others."""
    for fused in attached_layers(module).values():
        if isinstance(fused, ShapedLinear):
            fused.strategy.begin(attached_names(module))
            fused.set_strengths(fused.strengths)


def _entries(fused: FusedLinear) -> list[Entry]:
    return list(zip(fused.names, fused.factors, fused.strengths, strict=True))


def _same(entries: Sequence[Entry], others: Sequence[Entry]) -> bool:
    """Tell whether names and strengths are equal and factors are the very same tensors."""
    return len(entries) == len(others) and all(
        name == other and strength == value and a is c and b is d
        for (name, (a, b), strength), (other, (c, d), value) in zip(entries, others, strict=True)
    )


def _update(updates: Sequence[tuple[str, FusedLinear, Sequence[Entry]]]) -> None:
    """Give layers other adapters; all of them keep theirs where one refuses."""
    done: list[tuple[FusedLinear, list[Entry]]] = []
    for layer, fused, entries in updates:
        done.append((fused, _entries(fused)))
        try:
            fused.set_adapters(*_columns(entries))
        except BaseException as error:
            for changed, before in done:
                changed.set_adapters(*_columns(before))
            if isinstance(error, FusionError):
                raise FusionError(f"layer {layer}: {error}") from error
            raise


def _columns(entries: Sequence[Entry]) -> tuple[list[str], list[Factors], list[float]]:
    return [e[0] for e in entries], [e[1] for e in entries], [e[2] for e in entries]


def make_ready(module: nn.Module, dtype: torch.dtype, device: torch.device | None = None) -> int:
    """Compute now what the first call of every attached layer would, such as device copies.

    Args:
        module: The model.
        dtype: Type of the layers' outputs.
        device: Where they will be; the CPU where None.

    Returns:
        The number of layers.
    """
    layers = attached_layers(module)
    with torch.no_grad():  # which also spares looking whether anything trains
        for fused in layers.values():
            fused.prepare(dtype, device or torch.device("cpu"))
    return len(layers)


def ready_beside(module: nn.Module, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """Bring attached adapters to the accelerator on a stream of their own.

    Meant for the moment before something else is computed there, such as the text of a prompt.

    Args:
        module: The model with the adapters.
        dtype: Type of the layers' outputs.
        device: Where they will be.

    Returns:
        What to call before the model is. Work queued afterwards waits for the adapters, the host
        does not. On a CPU nothing is done here, and layers make themselves ready when called.
    """
    if device.type != "cuda":
        return lambda: None
    beside = torch.cuda.Stream(device)
    # So that memory of earlier adapters is not overwritten while queued work still reads it.
    beside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(beside):
        make_ready(module, dtype, device)
        event = beside.record_event()
    return lambda: torch.cuda.current_stream(device).wait_event(event)


WARM_UP_CALLS = 3  # kernels are compiled and workspaces made before the capture


def capture(function: Callable[..., Any], *inputs: Tensor) -> Callable[..., Any]:
    """Record a call once and return a function that replays it with other inputs.

    Adapters may be exchanged between replays if they were attached with a `Capacity`: their
    buffers are written in place. Anything else that the function reads must stay where it is.

    Args:
        function: Takes tensors and returns a tensor, or a tuple of tensors; must not look at their
            values on the host. Gradients are not recorded.
        inputs: An example of each input, on one CUDA device. Later inputs must be of the same
            shapes and dtypes; they are copied.

    Returns:
        A function of the same inputs. Its result is overwritten by the next call.

    Raises:
        FusionError: The inputs are not on a CUDA device.
    """
    if not inputs or not all(tensor.is_cuda for tensor in inputs):
        raise FusionError("a graph can only be captured with inputs on a CUDA device")
    static = [tensor.clone() for tensor in inputs]
    with torch.no_grad(), torch.cuda.device(inputs[0].device):
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM_UP_CALLS):
                function(*static)
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = function(*static)

    def replay(*others: Tensor) -> Any:
        for place, tensor in zip(static, others, strict=True):
            if place.shape != tensor.shape:
                raise FusionError(
                    f"a captured graph takes {list(place.shape)}, not {list(tensor.shape)}"
                )
            place.copy_(tensor)
        graph.replay()
        return result

    return replay


def reserve(
    module: nn.Module,
    capacity: Capacity,
    dtype: torch.dtype,
    device: torch.device,
    strategy: str | Strategy = "gated",
    gates: GateBank | None = None,
    layers: Callable[[str], bool] | None = None,
) -> tuple[str, ...]:
    """Wrap every linear layer with room for adapters, before `torch.compile` or a capture.

    `autolora.fusion.switch`, `add`, `remove` and `set_strengths` then change the adapters in
    place: the model's modules stay, nothing is compiled anew, and captured graphs follow.
    `detach` gives the bare model back.

    Args:
        module: The model; nothing may be attached to it.
        capacity: The most that one layer's adapters may need; buffers of that size are kept for
            each layer.
        dtype: Of the layers' outputs.
        device: Where the layers compute.
        strategy: What adapters will be attached by; not one that merges.
        gates: Trained gates for a strategy that uses them; `switch` must be given the same.
        layers: Tells by canonical name which layers adapters may come to; all where None.

    Returns:
        The layers, in the model's order.

    Raises:
        FusionError: Something is attached already, the strategy merges, or no layer is chosen.
    """
    chosen = get_strategy(strategy)
    if chosen.shapes:
        raise FusionError(f"no room can be made for the strategy {chosen.name}; use sum or gated")
    if chosen.merges or attached_names(module) or attached_layers(module):
        raise FusionError("room for adapters can only be made in a bare model; detach first")
    linears = {n: m for n, m in find_linears(module).items() if layers is None or layers(n)}
    if not linears:
        raise FusionError("no linear layer was chosen to make room in")
    for layer, base in linears.items():
        fused = FusedLinear(base, (), chosen.gate(layer, gates), capacity=capacity)
        fused.prepare(dtype, device)
        replace_layer(module, layer, fused)
    return tuple(linears)
