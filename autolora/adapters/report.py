"""What was read from a LoRA file, and what was not."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class LoadReport:
    """What became of every key of a file.

    Attributes:
        format: Name of the file format, or ``factors`` for an adapter made in memory.
        matched: Canonical layer that each used key went to, by key.
        dropped: Why a key was not used, by key.
        layers: How many layers the adapter changes.
        ranks: Smallest and largest rank of the pieces.
        scales: Smallest and largest ``alpha / rank`` of the pieces.
    """

    format: str
    matched: Mapping[str, str] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    layers: int = 0
    ranks: tuple[int, int] = (0, 0)
    scales: tuple[float, float] = (1.0, 1.0)

    @property
    def dropped_reasons(self) -> dict[str, int]:
        """How many keys were dropped for each reason, most frequent first."""
        return dict(Counter(self.dropped.values()).most_common())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON.

        Returns:
            All fields, with the counts that a summary needs.
        """
        return {
            "format": self.format,
            "layers": self.layers,
            "ranks": list(self.ranks),
            "scales": list(self.scales),
            "matched_count": len(self.matched),
            "dropped_count": len(self.dropped),
            "dropped_reasons": self.dropped_reasons,
            "matched": dict(self.matched),
            "dropped": dict(self.dropped),
        }
