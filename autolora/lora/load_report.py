"""What was read from a LoRA file, and what was not."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

from autolora.families.detect import layer_table
from autolora.lora.formats import DENOISER, Part

if TYPE_CHECKING:
    from autolora.lora.deltas import Contents, LayerDelta


@dataclass(frozen=True)
class LoadReport:
    """What became of every key of a file.

    Attributes:
        format: Name of the file format, or ``factors`` for an adapter made in memory.
        matched: Canonical layer that each used key went to, by key; several layers of one key are
            joined by ``+``. Text-encoder layers begin with the encoder's name in DiffSynth's
            pipeline.
        dropped: Why a key was not used, by key.
        layers: How many layers of the denoiser the adapter changes the weight of.
        total: How many linear layers and convolutions the denoiser has: those of the published
            model, or for layers of another width, of as many blocks as the file numbers.
        ranks: Smallest and largest rank of the pieces; zeros when none has a rank.
        scales: Smallest and largest ``alpha / rank`` of the pieces.
        dtypes: Element types of the tensors that weight changes are stored as, such as
            ``bfloat16``.
        algorithms: How many layers each algorithm changes (LoRA, LoKr, LoHa, DoRA, full).
        biases: How many layers have their bias changed.
        norms: How many normalization weights are changed.
        text_encoders: How many layers of each text encoder (such as ``clip``) are changed.
        errors: Relative Frobenius error of each layer that `LoRA.low_rank` had to approximate.
        norm_of: Computes the norm.
        family: Name of the base-model family; empty where there is no file.
    """

    format: str
    matched: Mapping[str, str] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    layers: int = 0
    total: int = 0
    ranks: tuple[int, int] = (0, 0)
    scales: tuple[float, float] = (1.0, 1.0)
    dtypes: tuple[str, ...] = ()
    algorithms: Mapping[str, int] = field(default_factory=dict)
    biases: int = 0
    norms: int = 0
    text_encoders: Mapping[str, int] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    norm_of: Callable[[], float | None] | None = field(default=None, repr=False, compare=False)
    family: str = ""

    @property
    def dropped_reasons(self) -> dict[str, int]:
        """How many keys were dropped for each reason, most frequent first."""
        return dict(Counter(self.dropped.values()).most_common())

    @cached_property
    def norm(self) -> float | None:
        """Frobenius norm of the whole change of the denoiser's weights at strength 1.

        Computed when first asked for; None where it depends on the base weights (DoRA).
        """
        return None if self.norm_of is None else self.norm_of()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON.

        Returns:
            All fields, with the norm and the counts that a summary needs.
        """
        return {
            "format": self.format,
            "family": self.family,
            "layers": self.layers,
            "total": self.total,
            "ranks": list(self.ranks),
            "scales": list(self.scales),
            "norm": self.norm,
            "dtypes": list(self.dtypes),
            "algorithms": dict(self.algorithms),
            "biases": self.biases,
            "norms": self.norms,
            "text_encoders": dict(self.text_encoders),
            "matched_count": len(self.matched),
            "dropped_count": len(self.dropped),
            "dropped_reasons": self.dropped_reasons,
            "matched": dict(self.matched),
            "dropped": dict(self.dropped),
            "errors": dict(self.errors),
        }


def make_report(
    format: str,
    parts: "Mapping[Part, Contents]",
    dropped: Mapping[str, str],
    family: str,
    of: Part = DENOISER,
) -> LoadReport:
    """Sum up what was read.

    Args:
        format: Name of the file format.
        parts: What was read, by model.
        dropped: Why a key was not used, by key.
        family: Name of the base-model family.
        of: The model whose layers are counted.

    Returns:
        The report.
    """
    contents, table = parts[of], layer_table(family)
    encoders = {encoder.name: encoder.module for encoder in table.text_encoders}
    matched = {
        key: layer if part == DENOISER else f"{encoders[part]}.{layer}"
        for part, found in parts.items()
        for key, layer in found.matched.items()
    }
    return LoadReport(
        format=format,
        matched=dict(sorted(matched.items())),
        dropped=dict(sorted(dropped.items())),
        family=family,
        total=table.count(
            {name: (d.out_features, d.in_features) for name, d in contents.layers.items()}
        )
        if of == DENOISER
        else len(contents.layers),
        biases=len(contents.biases),
        norms=len(contents.norms),
        text_encoders={part: len(parts[part].layers) for part in parts if part != DENOISER},
        **layer_facts(contents.layers),
    )


def layer_facts(layers: "Mapping[str, LayerDelta]") -> dict[str, Any]:
    """The fields of a report that follow from weight changes alone.

    Args:
        layers: Weight changes by layer.

    Returns:
        Values by field name.
    """
    pieces = list(chain.from_iterable(delta.pieces for delta in layers.values()))
    ranks = [piece.change.rank for piece in pieces if piece.change.rank is not None]
    scales = [piece.change.scale for piece in pieces] or [1.0]
    kinds = Counter(
        kind for delta in layers.values() for kind in {piece.algorithm for piece in delta.pieces}
    )
    dtypes = {str(t.dtype).removeprefix("torch.") for piece in pieces for t in piece.tensors}
    return {
        "layers": len(layers),
        "ranks": (min(ranks, default=0), max(ranks, default=0)),
        "scales": (min(scales), max(scales)),
        "dtypes": tuple(sorted(dtypes)),
        "algorithms": dict(sorted(kinds.items())),
        "norm_of": lambda: norm_of_layers(layers),
    }


def norm_of_layers(layers: "Mapping[str, LayerDelta]") -> float | None:
    """Frobenius norm of several weight changes together.

    Args:
        layers: Weight changes by layer.

    Returns:
        The norm, or None where one depends on the base weights.
    """
    total = 0.0
    for delta in layers.values():
        square = delta.square_norm()
        if square is None:
            return None
        total += square
    return float(total**0.5)
