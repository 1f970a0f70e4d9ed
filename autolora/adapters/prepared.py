"""An adapter made ready to be attached: every layer's factors, computed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from autolora.adapters.lora import LoRA

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BaseWeight = Callable[[str], "Tensor"]
"""Gives a layer's dense weight ``[out, in]`` by canonical name."""


class PreparedLoRA:
    """A LoRA in the form that un-merged fusion takes; factors are the same tensors at every call.

    Layers that are not low-rank (LoKr, LoHa, DoRA, full differences) are approximated, and their
    relative errors are told.

    Attributes:
        lora: The adapter itself.
        errors: Relative error (Frobenius) of each layer that had to be approximated.
        nbytes: Bytes that the factors occupy, and as many again for what fusion derives from them
            and keeps while they live.
    """

    def __init__(
        self,
        lora: LoRA,
        rank: int,
        base: BaseWeight | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Compute all factors.

        Args:
            lora: The adapter.
            rank: Rank of the layers that are approximated.
            base: Gives base weights; needed for DoRA layers only.
            device: An accelerator to keep the factors on; None or a CPU is the memory.

        Raises:
            LoRAFormatError: A layer depends on base weights, and there is no `base`.
        """
        self.lora = lora
        source, self.errors = low_rank_form(lora, rank, base)
        self._factors = {layer: source.factors(layer) for layer in source.layers}
        if device is not None and device.type != "cpu":
            self._factors = {
                layer: (_to_device(down, device), _to_device(up, device))
                for layer, (down, up) in self._factors.items()
            }
        self._shapes = {layer: source.shape(layer) for layer in source.layers}
        self.nbytes = 2 * sum(
            tensor.numel() * tensor.element_size()
            for pair in self._factors.values()
            for tensor in pair
        )

    @property
    def name(self) -> str:
        """The adapter's name."""
        return self.lora.name

    @property
    def layers(self) -> list[str]:
        """Names of the layers that have factors, sorted."""
        return list(self._factors)

    def factors(self, layer: str) -> tuple[Tensor, Tensor]:
        """Return ``A [r, in]`` and ``B [out, r]`` of one layer, float32, scale folded in."""
        return self._factors[layer]

    def shape(self, layer: str) -> tuple[int, int]:
        """Return ``(out, in)``, the shape of the weight that the layer's delta is made for."""
        return self._shapes[layer]

    def __repr__(self) -> str:
        """Show name, layers and how many are approximated."""
        return (
            f"PreparedLoRA({self.name!r}, {len(self._factors)} layers, "
            f"{len(self.errors)} approximated)"
        )


def low_rank_form(
    lora: LoRA, rank: int, base: BaseWeight | None = None
) -> tuple[LoRA, Mapping[str, float]]:
    """Return an adapter with low-rank layers only, and the relative errors of the others.

    Args:
        lora: Any adapter.
        rank: Rank of the layers that are approximated.
        base: Gives base weights; needed for DoRA layers only.

    Raises:
        LoRAFormatError: A layer depends on base weights, and there is no `base`.
    """
    if all(lora.exact(layer) for layer in lora.layers):
        return lora, {}
    approximated = lora.low_rank(rank, base)
    return approximated, dict(approximated.report.errors)


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    # Page-locked memory is copied without the processor, beside what the device computes.
    pinned = tensor.pin_memory() if device.type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)
