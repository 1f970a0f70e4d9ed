"""Room for adapters that come later, for models that are compiled or captured once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from autolora.errors import FusionError
from autolora.fusion.attach import attached_names
from autolora.fusion.bank import GateBank
from autolora.fusion.linear import FusedLinear
from autolora.fusion.matching import attached_layers, find_linears, replace_layer
from autolora.fusion.plans import Capacity
from autolora.fusion.strategies import get_strategy


def reserve(
    module: nn.Module,
    capacity: Capacity,
    dtype: torch.dtype,
    device: torch.device,
    strategy: str = "gated",
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
