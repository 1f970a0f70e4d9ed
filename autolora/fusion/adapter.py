"""What fusion asks of an adapter."""

from __future__ import annotations

from collections.abc import Sequence
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
        """Return ``A [r, in]`` and ``B [out, r]`` of one layer, float32, scale folded in."""
        ...

    def shape(self, layer: str) -> tuple[int, int]:
        """Return ``(out, in)``, the shape of the weight that the layer's delta is made for."""
        ...
