"""Adapters that are more than low-rank, for the tests of merging."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


class DenseFake:
    """An adapter of full differences, with biases, norms and deltas that depend on the weight."""

    def __init__(
        self,
        name: str,
        deltas: Mapping[str, Tensor],
        biases: Mapping[str, Tensor] | None = None,
        norms: Mapping[str, Tensor] | None = None,
        of_base: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> None:
        self.name = name
        self.norms = dict(norms or {})
        self._deltas = dict(deltas)
        self._biases = dict(biases or {})
        self._of_base = dict(of_base or {})

    @property
    def layers(self) -> list[str]:
        return sorted(self._deltas)

    @property
    def bias_layers(self) -> tuple[str, ...]:
        return tuple(self._biases)

    @property
    def needs_base(self) -> tuple[str, ...]:
        return tuple(self._of_base)

    def shape(self, layer: str) -> tuple[int, int]:
        out, inner = self._deltas[layer].shape
        return out, inner

    def exact(self, layer: str) -> bool:
        return False

    def factors(self, layer: str) -> tuple[Tensor, Tensor]:
        raise AssertionError("a dense adapter has no factors")

    def delta(self, layer: str, base: Tensor | None = None) -> Tensor:
        if layer in self._of_base:
            assert base is not None and base.dtype == torch.float32
            return self._of_base[layer](base)
        assert base is None
        return self._deltas[layer]

    def bias(self, layer: str) -> Tensor | None:
        return self._biases.get(layer)


def random_dense(
    name: str, shapes: Mapping[str, tuple[int, int]], seed: int, biases: bool = False
) -> DenseFake:
    """Random full differences for all the given layers."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {k: torch.randn(shape, generator=generator) * 0.1 for k, shape in shapes.items()}
    shifts = {k: torch.randn(shape[0], generator=generator) for k, shape in shapes.items()}
    return DenseFake(name, deltas, shifts if biases else None)
