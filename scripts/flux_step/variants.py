"""Ways to run adapters in the linear layers of a model, to be timed beside each other.

A variant is a set of modules by layer name; installing it puts them in the place of the bare
linear layers and changes nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from autolora.fusion import FusedLinear, Gate

Factors = list[tuple[Tensor, Tensor]]
Variant = Mapping[str, nn.Module]


class StackedMerger(nn.Module):
    """DiffSynth 2.1's LoRA merger, said again: all outputs stacked, then the gate as written.

    Compare ``LoRAHotLoadMixin.lora_forward`` and ``LoraMerger.forward`` of DiffSynth-Studio.
    """

    def __init__(self, base: nn.Module, factors: Factors, gate: Gate) -> None:
        super().__init__()
        self.base, self.factors, self.gate = base, factors, gate

    def forward(self, x: Tensor) -> Tensor:
        """Return the gated sum."""
        outputs = torch.stack([x @ a.T @ b.T for a, b in self.factors])
        return self.gate(self.base(x), outputs)


class SeparateSum(nn.Module):
    """Unmerged adapters as PEFT runs them: two small layers each, added one after the other."""

    def __init__(self, base: nn.Module, factors: Factors) -> None:
        super().__init__()
        self.base, self.factors = base, factors

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum."""
        result = self.base(x)
        for a, b in self.factors:
            result = result + nn.functional.linear(nn.functional.linear(x, a), b) * 1.0
        return result


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers inside the blocks, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "blocks." in name
    }


def random_adapters(
    layers: Mapping[str, nn.Linear], count: int, rank: int, dtype: torch.dtype
) -> dict[str, Factors]:
    """Return factors by layer whose outputs are small beside the base's."""
    result: dict[str, Factors] = {}
    for name, layer in layers.items():
        device = layer.weight.device
        generator = torch.Generator(device).manual_seed(len(result))
        result[name] = [
            tuple(
                torch.randn(*shape, device=device, generator=generator, dtype=dtype) * scale
                for shape, scale in (
                    ((rank, layer.in_features), layer.in_features**-0.5),
                    ((layer.out_features, rank), 0.1 * rank**-0.5),
                )
            )
            for _ in range(count)
        ]
    return result


def random_gates(layers: Mapping[str, nn.Linear]) -> dict[str, Gate]:
    """Return gates away from neutral, float32, on the layers' device."""
    gates = {}
    for name, layer in layers.items():
        gate = Gate(layer.out_features).to(layer.weight.device).requires_grad_(False)
        for parameter in gate.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        gates[name] = gate
    return gates


def gated(layers: Variant, factors: Mapping[str, Factors], gates: Mapping[str, Gate]) -> Variant:
    """AutoLoRA's gated fusion."""
    return {name: FusedLinear(layer, factors[name], gates[name]) for name, layer in layers.items()}


def summed(layers: Variant, factors: Mapping[str, Factors]) -> Variant:
    """AutoLoRA's plain sum."""
    return {name: FusedLinear(layer, factors[name]) for name, layer in layers.items()}


def stacked(
    layers: Variant, factors: Mapping[str, Factors], gates: Mapping[str, Gate], dtype: torch.dtype
) -> Variant:
    """DiffSynth's merger."""
    return {
        name: StackedMerger(layer, factors[name], copy.deepcopy(gates[name]).to(dtype))
        for name, layer in layers.items()
    }


def separate(
    model: nn.Module, layers: Variant, factors: Mapping[str, Factors]
) -> tuple[Variant, str]:
    """PEFT's own layers where it is installed, otherwise what they compute; and which it is."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        said_again = {name: SeparateSum(layer, factors[name]) for name, layer in layers.items()}
        return said_again, "unmerged sum (as PEFT)"
    names = [str(i) for i in range(len(next(iter(factors.values()))))]
    for i, name in enumerate(names):
        rank = next(iter(factors.values()))[i][0].shape[0]
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(layers))
        # On the meta device: the weights are ours.
        inject_adapter_in_model(config, model, name, low_cpu_mem_usage=True)
    result = {name: model.get_submodule(name) for name in layers}
    for layer_name, layer in result.items():
        for name, (a, b) in zip(names, factors[layer_name], strict=True):
            layer.lora_A[name].weight = nn.Parameter(a, requires_grad=False)
            layer.lora_B[name].weight = nn.Parameter(b, requires_grad=False)
        layer.set_adapter(names)
        layer.requires_grad_(False).eval()
    install(model, layers)
    return result, "PEFT, unmerged"


def install(model: nn.Module, variant: Variant) -> None:
    """Put a variant's modules into the model."""
    for name, module in variant.items():
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._modules[leaf] = module
