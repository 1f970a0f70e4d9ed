"""A few numbers that say what a LoRA changes, so that the same one is known in any format.

Each number is a bilinear form of the weight changes, ``sum over layers of c · uᵀ Δ v`` with fixed
random vectors ``u [out]``, ``v [in]`` and a random weight ``c`` of the layer. That is linear in the
change: the order of keys, the split of fused layers, the split of a product into factors and the
place of alpha do not matter, and no dense matrix is needed (``uᵀ B A v`` costs two products with a
vector). Over the random vectors, the squared distance of two fingerprints is on average that of the
changes (a random projection, https://doi.org/10.1090/conm/026/737400), so that their relative
distance estimates the relative Frobenius distance, within a third or so for eight numbers.
"""

import math
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from autolora.adapters.deltas import LayerDelta, Piece
from autolora.adapters.lora import LoRA

PROBES = 8
"""How many numbers there are: two unrelated LoRAs agree to 5 % once in 10^10 pairs."""
SAME = 1e-5
"""Largest relative distance at which two LoRAs count as the same: rounding in float32."""
NEAR = 0.05
"""Largest one at which they count as nearly the same: rounding to bfloat16 gives 0.002, to eight
bits 0.03."""

_TEXT: tuple[Literal["clip", "t5"], ...] = ("clip", "t5")


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """What a LoRA changes, as numbers that do not depend on its format.

    Attributes:
        numbers: Float64 `PROBES` numbers of each kind of change: ``weights``, ``magnitudes``
            (DoRA's), ``biases``, ``norms``, ``clip``, ``t5``; kinds that it lacks are left out.
    """

    numbers: Mapping[str, Tensor]

    @classmethod
    def of(cls, lora: LoRA) -> "Fingerprint":
        """Take the fingerprint of an adapter; every stored tensor is read once."""
        numbers: dict[str, Tensor] = {}

        def add(kind: str, place: str, values: Tensor) -> None:
            known = numbers.get(kind, torch.zeros(PROBES, dtype=torch.float64))
            numbers[kind] = known + _layer_weights(place) * values

        for layer in lora.layers:
            delta = lora.layer_delta(layer)
            add("weights", layer, sketch(delta))
            if delta.needs_base:
                add("magnitudes", layer, _sketch_magnitudes(delta))
        for layer in lora.bias_layers:
            add("biases", layer, _sketch_vector(lora.bias(layer)))
        for path, change in lora.norms.items():
            add("norms", path, _sketch_vector(change))
        for which in _TEXT:
            if (encoder := lora.text_encoder(which)) is not None:
                inner = cls.of(encoder).numbers
                for kind in inner:
                    add(which, kind, inner[kind])
        return cls(numbers)

    def difference(self, other: "Fingerprint") -> float:
        """Estimate how far apart two adapters are for the transformer.

        Args:
            other: Another one's fingerprint.

        Returns:
            The largest relative distance of any kind of change, 0 for the same, about 1.4 for
            unrelated ones; NaN where numbers are too large to compare.
        """
        kinds = (self.numbers.keys() | other.numbers.keys()) - set(_TEXT)
        return self._largest(other, kinds)

    def text_difference(self, other: "Fingerprint") -> float:
        """The same for the text encoders."""
        return self._largest(other, _TEXT)

    def _largest(self, other: "Fingerprint", kinds: Collection[str]) -> float:
        nothing = torch.zeros(PROBES, dtype=torch.float64)
        distances = [
            relative_distance(self.numbers.get(kind, nothing), other.numbers.get(kind, nothing))
            for kind in kinds
        ]
        return math.nan if any(map(math.isnan, distances)) else max(distances, default=0.0)


def relative_distance(a: Tensor, b: Tensor) -> float:
    """Distance of two vectors over the length of the longer one; 0 for two of zeros."""
    longer = max(float(a.norm()), float(b.norm()))
    return float((a - b).norm()) / longer if longer else 0.0


def sketch(delta: LayerDelta) -> Tensor:
    """Bilinear forms ``uᵀ Δ v`` of a layer's change.

    Args:
        delta: The change, of any kind; DoRA magnitudes are left out.

    Returns:
        Float64 ``[PROBES]``.
    """
    out, into = _vectors(delta.out_features, 0), _vectors(delta.in_features, 1)
    total = torch.zeros(PROBES, dtype=torch.float64)
    for piece in delta.pieces:
        total += piece.change.bilinear(_rows(out, piece), into)
    return total


def _sketch_magnitudes(delta: LayerDelta) -> Tensor:
    total = torch.zeros(PROBES, dtype=torch.float64)
    for piece in delta.pieces:
        if piece.magnitude is None:
            continue
        values = piece.magnitude.values.to(torch.float64)
        if piece.magnitude.axis == "rows":
            out = _vectors(delta.out_features, 0)
            total += values @ _rows(out, piece).to(torch.float64)
        else:
            # Parts of a split layer have their own lengths of the same columns.
            own = _layer_weights(str(piece.rows[0].start))
            total += own * (values @ _vectors(delta.in_features, 1).to(torch.float64))
    return total


def _rows(vectors: Tensor, piece: Piece) -> Tensor:
    """The entries of vectors ``[out, PROBES]`` for the rows of a piece, in its order."""
    parts = [vectors[where] for where in piece.rows]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _sketch_vector(values: Tensor | None) -> Tensor:
    assert values is not None
    return values.to(torch.float64) @ _vectors(len(values), 0).to(torch.float64)


@lru_cache(maxsize=32)
def _vectors(size: int, side: int) -> Tensor:
    """Random vectors ``[size, PROBES]``, the same ones in every run; outputs 0, inputs 1."""
    return torch.randn(size, PROBES, generator=torch.Generator().manual_seed(2 * size + side))


@lru_cache(maxsize=4096)
def _layer_weights(place: str) -> Tensor:
    """Random weights ``[PROBES]`` of a layer, so that layers cannot be exchanged."""
    seed = zlib.crc32(place.encode("utf-8", "backslashreplace"))
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(PROBES, generator=generator, dtype=torch.float64)
