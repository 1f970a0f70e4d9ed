"""Matches adapters to the layers of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from autolora.errors import FusionError
from autolora.fusion.adapter import Adapter, DenseAdapter
from autolora.fusion.conv import weight_shape
from autolora.fusion.linear import FusedLinear, finite_strength, linear_shape


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


def attached_layers(module: nn.Module) -> dict[str, FusedLinear]:
    """Return the layers that hold adapters, by canonical name."""
    return {name: m for name, m in _named_modules(module) if isinstance(m, FusedLinear)}


def find_linears(module: nn.Module) -> dict[str, nn.Module]:
    """Return the base of every linear layer by its path, as if nothing were attached."""
    layers = find_layers(module)
    return {name: base for name, base in layers.items() if linear_shape(base) is not None}


def find_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Return the base of every linear layer and convolution by its path, likewise."""
    layers: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, child in _named_modules(module):
        if not name or name.startswith(inside):
            continue
        base = child.base if isinstance(child, FusedLinear) else child
        if weight_shape(base) is not None:
            layers[name] = base
            # A quantized layer may hold another linear inside; only the outer one is ours.
            inside = (f"{name}.",)
    return layers


def _named_modules(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """``named_modules`` without its chain of generators, which took a third of a switch."""
    found: dict[nn.Module, str] = {}

    def visit(child: nn.Module, name: str) -> None:
        if child in found:
            return
        found[child] = name
        prefix = f"{name}." if name else ""
        for key, grandchild in child._modules.items():
            if grandchild is not None:
                visit(grandchild, prefix + key)

    visit(module, "")
    return [(name, child) for child, name in found.items()]


def replace_layer(module: nn.Module, layer: str, replacement: nn.Module) -> None:
    """Put a module in the place of a layer."""
    parent, _, name = layer.rpartition(".")
    module.get_submodule(parent)._modules[name] = replacement


def check_adapters(adapters: Sequence[tuple[Adapter, float]]) -> None:
    """Make sure that names differ and strengths are numbers.

    Raises:
        FusionError: Two adapters of one name, or a strength that is not finite.
    """
    names = [adapter.name for adapter, _ in adapters]
    for name in names:
        if names.count(name) > 1:
            raise FusionError(f"adapter {name!r} is given twice; add up its strengths instead")
    for adapter, strength in adapters:
        finite_strength(repr(adapter.name), strength)


def check_strengths(names: Sequence[str], strengths: Mapping[str, float]) -> None:
    """Make sure that strengths are for adapters that are attached.

    Args:
        names: Names of the attached adapters.
        strengths: The strengths to change, by name.

    Raises:
        FusionError: A name is not attached, or a strength is not finite.
    """
    for name, strength in strengths.items():
        check_attached(names, name)
        finite_strength(repr(name), strength)


def check_attached(names: Sequence[str], name: str) -> None:
    """Make sure that an adapter is attached.

    Raises:
        FusionError: It is not; the message lists those that are.
    """
    if name not in names:
        raise FusionError(
            f"adapter {name!r} is not attached; attached: {', '.join(names) or 'none'}"
        )


def match(adapter: Adapter, strength: float, linears: Mapping[str, nn.Module]) -> AttachedAdapter:
    """Find the layers of a model that an adapter is for.

    Raises:
        FusionError: None of its layers is there, or one has another shape.
    """
    matched, skipped = [], {}
    for layer in adapter.layers:
        if layer not in linears:
            skipped[layer] = "the model has no linear layer of this name"
            continue
        shape = weight_shape(linears[layer])
        if shape != tuple(adapter.shape(layer)):
            raise FusionError(
                f"adapter {adapter.name!r} does not fit this model: layer {layer} is "
                f"{list(shape or ())} here and {list(adapter.shape(layer))} in the adapter; "
                "it was made for another base model"
            )
        matched.append(layer)
    if not matched and not _only_merges(adapter):
        some = ", ".join(list(adapter.layers)[:5]) or "none"
        raise FusionError(
            f"adapter {adapter.name!r} matches no layer of this model; its layers: {some}"
        )
    return AttachedAdapter(adapter.name, float(strength), tuple(matched), skipped)


def _only_merges(adapter: Adapter) -> bool:
    """Tell whether an adapter changes biases or normalization weights and no weight matrix."""
    return (
        isinstance(adapter, DenseAdapter)
        and not adapter.layers
        and bool(adapter.bias_layers or adapter.norms)
    )
