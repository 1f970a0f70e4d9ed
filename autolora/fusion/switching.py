"""Change what is attached, touching nothing but what differs.

`attach` builds every layer anew. Here layers that are attached already are kept as objects, and
only those that an adapter comes to or goes from are changed; the factors of the other adapters are
neither asked for nor computed again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from autolora.errors import FusionError
from autolora.fusion.adapter import Adapter
from autolora.fusion.arithmetic import Factors
from autolora.fusion.attach import (
    AttachReport,
    attach,
    attached_names,
    fuse_layer,
    plan_layers,
    remerge,
)
from autolora.fusion.bank import GateBank
from autolora.fusion.linear import FusedLinear
from autolora.fusion.matching import (
    AttachedAdapter,
    attached_layers,
    check_attached,
    replace_layer,
)
from autolora.fusion.merge import merge_of
from autolora.fusion.strategies import get_strategy

Members = Sequence[tuple[Adapter, float]]
Entry = tuple[str, Factors, float]
"""Name, factors and strength of an adapter in one layer."""


def switch(
    module: nn.Module,
    adapters: Members,
    strategy: str = "gated",
    gates: GateBank | None = None,
) -> AttachReport:
    """Go from what is attached to other adapters, strengths, gates or another strategy.

    The result is that of `attach`, to the bit. A layer whose adapters, factors (the same tensors)
    and strengths stay is not touched, nor is what it has computed from them; adapters that keep
    their factors, as `autolora.adapters.PreparedLoRA` does, therefore make a switch cheap.

    Args:
        module: The model.
        adapters: Pairs of adapter and strength, as they shall be afterwards; none detaches.
        strategy: Name of the strategy.
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
    strategy: str = "gated",
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
    return count


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
