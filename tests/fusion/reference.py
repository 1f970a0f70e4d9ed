"""Fusion written out naively, as the independent truth for the tests of ``autolora.fusion``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from autolora.fusion import Gate

GATE_VECTORS = ("weight_base", "weight_lora", "weight_cross", "weight_out", "bias")
GATE_NORMS = ("norm_base.weight", "norm_base.bias", "norm_lora.weight", "norm_lora.bias")


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalise the last dimension from its definition, with the variance of the population."""
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + eps) * weight + bias


def gated_sum(
    y: Tensor,
    x: Tensor,
    factors: Sequence[tuple[Tensor, Tensor]],
    strengths: Sequence[float],
    gate: Mapping[str, Tensor],
) -> Tensor:
    """The published equation, one adapter at a time, in the dtype of its arguments."""
    normed = layer_norm(y, gate["norm_base.weight"], gate["norm_base.bias"])
    total = torch.zeros_like(y)
    for (a, b), strength in zip(factors, strengths, strict=True):
        output = strength * (x @ a.T @ b.T)
        lora = layer_norm(output, gate["norm_lora.weight"], gate["norm_lora.bias"])
        argument = (
            normed * gate["weight_base"]
            + lora * gate["weight_lora"]
            + normed * lora * gate["weight_cross"]
            + gate["bias"]
        )
        total = total + torch.sigmoid(argument) * output
    return y + gate["weight_out"] * total


def plain_sum(
    y: Tensor, x: Tensor, factors: Sequence[tuple[Tensor, Tensor]], strengths: Sequence[float]
) -> Tensor:
    """Base output plus each adapter's dense delta."""
    for (a, b), strength in zip(factors, strengths, strict=True):
        y = y + strength * (x @ (b @ a).T)
    return y


def random_gate_tensors(out_features: int, generator: torch.Generator) -> dict[str, Tensor]:
    """One layer's gate far from neutral, under the published names."""
    tensors = {
        name: torch.randn(out_features, generator=generator)
        for name in (*GATE_VECTORS, *GATE_NORMS)
    }
    for name in ("norm_base.weight", "norm_lora.weight"):
        tensors[name] = 1 + 0.3 * tensors[name]
    return tensors


def random_gate(out_features: int, generator: torch.Generator) -> Gate:
    """A gate far from neutral."""
    return Gate.from_diffsynth(random_gate_tensors(out_features, generator))


def random_factors(
    ranks: Sequence[int], in_features: int, out_features: int, generator: torch.Generator
) -> list[tuple[Tensor, Tensor]]:
    """Factors whose outputs are of about the base's size and whose rows do not have zero mean."""
    return [
        (
            torch.randn(rank, in_features, generator=generator) / in_features**0.5,
            torch.randn(out_features, rank, generator=generator) / rank**0.5 + 0.2,
        )
        for rank in ranks
    ]


def double(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors in float64."""
    return {name: tensor.detach().double() for name, tensor in tensors.items()}


def double_factors(factors: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """The same factors in float64."""
    return [(a.detach().double(), b.detach().double()) for a, b in factors]


class FakeAdapter:
    """The least that fusion accepts as an adapter."""

    def __init__(self, name: str, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        self.name = name
        self._factors = dict(factors)

    @property
    def layers(self) -> list[str]:
        return sorted(self._factors)

    def factors(self, layer: str) -> tuple[Tensor, Tensor]:
        return self._factors[layer]

    def shape(self, layer: str) -> tuple[int, int]:
        a, b = self._factors[layer]
        return b.shape[0], a.shape[1]


class TinyBlock(nn.Module):
    """One residual block with a modulation layer, named as in FLUX's single blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.Module()
        self.norm.linear = nn.Linear(width, width)
        self.to_qkv_mlp = nn.Linear(width, 2 * width)
        self.proj_out = nn.Linear(2 * width, width)
        self.activation = nn.GELU()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        hidden = self.activation(self.to_qkv_mlp(x))
        return x + self.norm.linear(emb)[:, None] * self.proj_out(hidden)


class TinyModel(nn.Module):
    """Two blocks; inputs ``[B, T, width]`` and ``[B, width]``."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.single_blocks = nn.ModuleList([TinyBlock(width) for _ in range(2)])

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for block in self.single_blocks:
            x = block(x, emb)
        return x


def model_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """``(out, in)`` of every plain linear layer, attached to or not."""
    return {
        name.removesuffix(".base"): (m.out_features, m.in_features)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear)
    }


def random_adapter(
    name: str, shapes: Mapping[str, tuple[int, int]], rank: int, seed: int
) -> FakeAdapter:
    """An adapter for all the given layers."""
    generator = torch.Generator().manual_seed(seed)
    factors = {
        layer: random_factors([rank], in_, out, generator)[0]
        for layer, (out, in_) in shapes.items()
    }
    return FakeAdapter(name, factors)
