"""How a loader did on a file, as numbers and as words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

EXACT = 1e-5
"""Relative Frobenius error up to which a layer counts as exact: float32 rounding is a hundredth."""

ROUNDED = 1e-2
"""Error up to which it counts as rounded: bfloat16 has steps of 0.004 to 0.008."""


_ROWS = 512


@dataclass
class Outcome:
    """One loader on one file.

    Attributes:
        layers: Layers whose truth is compared.
        exact: How many agree with it.
        rounded: How many agree but for the rounding of half precision.
        dropped: How many the loader left unchanged though the file changes them.
        worst_error: Largest relative error of the layers that it changed.
        ratios: Smallest and largest multiple of the truth that wrong layers hold (least squares).
        raised: Type and first line of the exception, empty when there was none.
        hangs: Whether it did not come back.
    """

    layers: int = 0
    exact: int = 0
    rounded: int = 0
    dropped: int = 0
    worst_error: float = 0.0
    ratios: list[float] = field(default_factory=list)
    raised: str = ""
    hangs: bool = False

    @property
    def wrong(self) -> int:
        """Layers that are changed, but not as the file says."""
        return self.layers - self.exact - self.rounded - self.dropped

    def add(self, value: Tensor | None, truth: Tensor) -> None:
        """Count one layer.

        Args:
            value: What the loader made of it, None for nothing.
            truth: What it should be, float64.
        """
        self.layers += 1
        if value is None or not bool(value.any()):
            self.exact += not bool(truth.any())
            self.dropped += bool(truth.any())
            return
        apart, along, size = 0.0, 0.0, 0.0
        # A few rows at a time: a layer of the true width has 66 million weights.
        for mine, own in zip(value.split(_ROWS), truth.split(_ROWS), strict=True):
            change = mine.to(torch.float64)
            apart += float((change - own).square().sum())
            along += float((change * own).sum())
            size += float(own.square().sum())
        error = (apart / size) ** 0.5 if size else float("inf")
        self.worst_error = max(self.worst_error, error)
        if error <= EXACT:
            self.exact += 1
        elif error <= ROUNDED:
            self.rounded += 1
        elif size:
            self._note(along / size)

    def _note(self, ratio: float) -> None:
        low, high = self.ratios or (ratio, ratio)
        self.ratios = [min(low, ratio), max(high, ratio)]

    def words(self) -> str:
        """A cell of the table."""
        if self.raised:
            return f"{'never ends' if self.hangs else 'error'}: {self.raised}"
        if self.exact == self.layers:
            return "exact"
        parts = [f"{self.exact} of {self.layers} exact"] if self.exact else []
        if self.rounded:
            parts.append(f"{self.rounded} rounded (error up to {self.worst_error:.2g})")
        if self.wrong:
            counted = f"{self.wrong} wrong" if parts or self.dropped else "all wrong"
            parts.append(f"{counted} ({self._multiples()})")
        if self.dropped:
            nothing = self.dropped == self.layers
            parts.append("all dropped, no error" if nothing else f"{self.dropped} dropped")
        return "; ".join(parts)

    def _multiples(self) -> str:
        error = f"error {self.worst_error:.2g}"
        if not self.ratios:
            return error
        low, high = (f"{ratio:.3g}" for ratio in self.ratios)
        return f"x {low}, {error}" if low == high else f"x {low} to {high}, {error}"

    def to_dict(self) -> dict[str, Any]:
        """For the JSON line."""
        return {**asdict(self), "wrong": self.wrong, "words": self.words()}


def measured(
    layers: dict[str, Callable[[], Tensor]], change: Callable[[str], Tensor | None]
) -> Outcome:
    """Compare every layer, one at a time.

    Args:
        layers: The truth by layer name, computed when called.
        change: What the loader made of a layer.
    """
    outcome = Outcome()
    for layer, truth in layers.items():
        outcome.add(change(layer), truth())
    return outcome
