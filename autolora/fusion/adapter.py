"""The protocols of adapters: what fusion needs of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Adapter(Protocol):
    """A named set of low-rank deltas by canonical layer name.

    At strength 1 the adapter adds ``B @ A`` to the weight of a layer; its own alpha / rank scale is
    already folded into the factors.
    """

    @property
    def name(self) -> str:
        """The name by which strengths are set and gates are reported."""
        ...

    @property
    def layers(self) -> Sequence[str]:
        """Canonical names of the layers that the adapter changes."""
        ...

    def factors(self, layer: str) -> tuple[Tensor, Tensor]:
        """Return ``A [r, in]`` and ``B [out, r]`` of one layer, scale folded in; floating point."""
        ...

    def shape(self, layer: str) -> tuple[int, ...]:
        """Return ``(out, in)``, the shape of the weight that the layer's delta is made for."""
        ...


@runtime_checkable
class DenseAdapter(Adapter, Protocol):
    """An adapter that may change more than low-rank factors can say, for merging.

    LoKr, LoHa, DoRA and full differences are dense; biases and normalization weights can only be
    merged.
    """

    @property
    def needs_base(self) -> Sequence[str]:
        """Layers whose delta depends on the weight that it is added to (DoRA)."""
        ...

    @property
    def bias_layers(self) -> Sequence[str]:
        """Layers whose bias is changed; some may not be among `layers`."""
        ...

    @property
    def norms(self) -> Mapping[str, Tensor]:
        """Changes of normalization weights by module path, ``[channels]`` at strength 1."""
        ...

    def exact(self, layer: str) -> bool:
        """Return whether `factors` says all there is to say of a layer's weight."""
        ...

    def delta(self, layer: str, base: Tensor | None = None) -> Tensor:
        """Return the dense change of a weight at strength 1, float32 ``[out, in]``.

        Args:
            layer: Canonical layer name.
            base: The dense weight ``[out, in]``, for layers of `needs_base`.
        """
        ...

    def bias(self, layer: str) -> Tensor | None:
        """Return the change of a layer's bias at strength 1, ``[out]``, or None."""
        ...
