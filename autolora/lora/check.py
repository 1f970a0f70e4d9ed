"""Checks LoRA files: whether each can be used, and which of them are the same LoRA.

Two files are the same if they change the same (`Fingerprint`), whatever their headers, formats or
precisions. A fingerprint is a few numbers, each a bilinear form of the weight changes, ``sum over
layers of c · uᵀ Δ v`` with fixed random vectors ``u [out]``, ``v [in]`` and a random weight ``c``
of the layer. It is linear in the change, so that the order of keys, split layers, split products
and the place of alpha do not matter, and it needs no dense matrix (``uᵀ B A v`` costs two products
with a vector). Over the random vectors, the squared distance of two fingerprints is on average that
of the changes (a random projection, https://doi.org/10.1090/conm/026/737400); their relative
distance estimates the relative Frobenius distance, within a third or so for eight numbers.
"""

import math
import struct
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from autolora.errors import LoRAFormatError, shown
from autolora.lora.covers import check_picture
from autolora.lora.deltas import LayerDelta, Piece
from autolora.lora.lora import LoRA
from autolora.lora.metadata import Metadata
from autolora.lora.parse import load_first_layer
from autolora.lora.pool import PoolEntry
from autolora.safetensors_io import open_file

if TYPE_CHECKING:
    from autolora.lora.load_report import LoadReport

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


MAX_OPENED = 2000
"""Largest pool of which every file is opened to compare one with it: some ten milliseconds each."""
_FIRST_LAYER_NEAR = 3 * NEAR  # one layer may differ more than all together
_TAIL = 1 << 12
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Twin:
    """A LoRA that changes the same as another one, or nearly so.

    Attributes:
        name: Its name.
        format: Its file format.
        difference: Relative distance of the changes of the transformer, as
            `Fingerprint.difference` estimates it.
        text_difference: The same of the text encoders; 1 where only one of the two has any.
    """

    name: str
    format: str
    difference: float
    text_difference: float

    @property
    def is_same(self) -> bool:
        """Whether the two differ by rounding in float32 at most."""
        return self.difference <= SAME and self.text_difference <= SAME

    @property
    def sentence(self) -> str:
        """What to tell the user of the other LoRA."""
        if self.is_same:
            return f"It changes the same as {shown(self.name)!r}, a file in {self.format} format."
        if self.difference <= SAME:
            return (
                f"It changes the transformer as {shown(self.name)!r} does, and the text encoders "
                "otherwise."
            )
        return (
            f"It is nearly the same as {shown(self.name)!r} (about {self.difference:.2g} apart, "
            "as copies in another precision and neighbouring epochs are)."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "name": self.name,
            "format": self.format,
            "same": self.is_same,
            "difference": self.difference,
            "text_difference": self.text_difference,
        }


def nearest(twins: Iterable[Twin | None]) -> Twin | None:
    """The one that differs least, if there is any."""
    found = [twin for twin in twins if twin is not None]
    return min(found, key=lambda twin: (twin.difference, twin.text_difference), default=None)


class KnownLoRAs:
    """Fingerprints of LoRAs seen so far, to find each new one among."""

    def __init__(self) -> None:
        self._seen: list[tuple[str, str, Fingerprint]] = []
        self._weights = torch.empty(64, PROBES, dtype=torch.float64)

    def add(self, name: str, lora: LoRA) -> Twin | None:
        """Look for a LoRA among those seen, and remember it.

        Args:
            name: Its name.
            lora: The LoRA; only its fingerprint is kept.

        Returns:
            The nearest of its twins, None where it has none.
        """
        fingerprint = Fingerprint.of(lora)
        weights = fingerprint.numbers.get("weights", torch.zeros(PROBES, dtype=torch.float64))
        count = len(self._seen)
        known = self._weights[:count]
        longer = known.norm(dim=1).clamp_min(float(weights.norm()))
        near: list[int] = (
            ((known - weights).norm(dim=1) <= NEAR * longer).nonzero().flatten().tolist()
        )
        twins = [_compared(*self._seen[number], fingerprint) for number in near]
        self._seen.append((name, lora.report.format, fingerprint))
        if count == len(self._weights):
            self._weights = torch.cat([self._weights, torch.empty_like(self._weights)])
        self._weights[count] = weights
        return nearest(twins)


def _compared(name: str, format: str, known: Fingerprint, new: Fingerprint) -> Twin | None:
    twin = Twin(name, format, new.difference(known), new.text_difference(known))
    return twin if twin.difference <= NEAR else None


class PoolTwins:
    """Finds what a pool has of a LoRA that is not in it yet.

    Of each file of the pool one layer is read, and the whole file only where that layer agrees. In
    a pool of more than `MAX_OPENED` files, only those whose last bytes agree are looked at: copies
    and files with an edited header, as all bytes of the weights are the same in them.

    Attributes:
        entries: The files of the pool; more may be added.
        by_bytes: Whether the pool is too large to open every file.
    """

    def __init__(
        self,
        entries: Iterable[PoolEntry],
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Look nothing up yet.

        Args:
            entries: The files of the pool.
            progress: Called with the number of files looked at and of all.
        """
        self._progress = progress
        self.entries = list(entries)
        self.by_bytes = len(self.entries) > MAX_OPENED
        self._first: dict[Path, tuple[str, Tensor] | None] = {}

    def find(self, path: Path, lora: LoRA) -> Iterator[tuple[PoolEntry, Twin]]:
        """Find the twins of a LoRA, its own file left out.

        Args:
            path: Its file.
            lora: What was loaded from it.

        Yields:
            A file of the pool, and how it compares.
        """
        fingerprint: Fingerprint | None = None
        for done, entry in enumerate(self.entries, 1):
            if self._progress is not None:
                self._progress(done, len(self.entries))
            if _is_same_file(path, entry.path) or not self._may_be_twin(path, entry.path):
                continue
            try:
                known = LoRA.load(entry.path)
            except LoRAFormatError:
                continue
            fingerprint = fingerprint or Fingerprint.of(lora)
            found = (entry.name, known.report.format, Fingerprint.of(known))
            if (twin := _compared(*found, fingerprint)) is not None:
                yield entry, twin

    def _may_be_twin(self, path: Path, other: Path) -> bool:
        if self.by_bytes:
            return _tail(other) == _tail(path)
        own, known = self._first_layer(path), self._first_layer(other)
        if own is None or known is None:
            return own is known
        near = relative_distance(own[1], known[1]) <= _FIRST_LAYER_NEAR
        return own[0] == known[0] and near

    def _first_layer(self, path: Path) -> tuple[str, Tensor] | None:
        if path not in self._first:
            try:
                found = load_first_layer(path)
            except LoRAFormatError:
                found = None
            self._first[path] = None if found is None else (found[0], sketch(found[1]))
        return self._first[path]


def _is_same_file(a: Path, b: Path) -> bool:
    try:
        return a.samefile(b)
    except OSError:
        return False


def same_bytes(a: Path, b: Path) -> bool:
    """Tell whether two files have the same bytes.

    Args:
        a: A file.
        b: Another one.

    Returns:
        False as well where one of them cannot be read.
    """
    try:
        with open_file(a) as file_a, open_file(b) as file_b:
            while chunk := file_a.read(_CHUNK):
                if file_b.read(_CHUNK) != chunk:
                    return False
            return not file_b.read(1)
    except (LoRAFormatError, OSError):
        return False


def group_twins(pairs: Sequence[tuple[str, Twin]]) -> list[list[str]]:
    """Put the names of LoRAs that change the same together.

    Args:
        pairs: Names with the twin that each was found to have.

    Returns:
        Groups of two or more names, sorted; pairs that are not `Twin.is_same` are left out.
    """
    groups: dict[str, list[str]] = {}
    for name, twin in pairs:
        if twin.is_same:
            group = groups.setdefault(twin.name, [twin.name])
            group.append(name)
            groups[name] = group
    unique = {id(group): sorted(group) for group in groups.values()}
    return sorted(unique.values())


def _tail(path: Path) -> bytes:
    """The last kilobytes of a safetensors file's data; nothing where it has none."""
    try:
        with open_file(path) as file:
            size = file.seek(0, 2)
            file.seek(0)
            start = file.read(8)
            data_start = 8 + struct.unpack("<Q", start)[0] if len(start) == 8 else size
            if data_start >= size:
                return b""
            file.seek(max(data_start, size - _TAIL))
            return file.read(_TAIL)
    except (LoRAFormatError, OSError):
        return b""


@dataclass(frozen=True)
class FileCheck:
    """What was found out about one file.

    Attributes:
        name: Its name in the pool, or file stem.
        path: The file.
        problem: Why it cannot be used, as one sentence; empty when it can.
        report: What became of its keys; None when it cannot be used.
        metadata: What header and sidecars say; None when it cannot be used.
        notes: What is odd without making it useless, one sentence each.
        twin: The LoRA that it changes the same as, or nearly so, of those checked before it.
    """

    name: str
    path: Path
    problem: str = ""
    report: "LoadReport | None" = None
    metadata: Metadata | None = None
    notes: tuple[str, ...] = ()
    twin: "Twin | None" = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with every key that was matched or dropped."""
        return {
            "name": self.name,
            "path": str(self.path),
            "usable": not self.problem,
            "problem": self.problem,
            "report": None if self.report is None else self.report.to_dict(),
            "metadata": None if self.metadata is None else self.metadata.to_dict(),
            "notes": list(self.notes),
            "twin": None if self.twin is None else self.twin.to_dict(),
        }


def check_file(path: Path, name: str | None = None, deep: bool = False) -> FileCheck:
    """Open a LoRA file and find out what is in it.

    Args:
        path: The file.
        name: Its name; the stem when None.
        deep: Also look into its pictures, and whether it changes anything.

    Returns:
        What was found; a file that cannot be used has a `problem` and raises nothing.
    """
    return _checked(path, path.stem if name is None else name, deep)[0]


def check_entries(
    entries: Sequence[PoolEntry], deep: bool = False, pool: Sequence[PoolEntry] = ()
) -> Iterator[FileCheck]:
    """Check files one by one; of those before, only a few numbers are kept.

    Args:
        entries: The files.
        deep: As for `check_file`, and also look for files that change the same.
        pool: Other files to look for the same in.

    Yields:
        What was found out about each, in order.
    """
    known, owned = KnownLoRAs(), PoolTwins(pool)
    for entry in entries:
        found, lora = _checked(entry.path, entry.name, deep)
        if deep and lora is not None:
            twins = [known.add(entry.name, lora), *(t for _, t in owned.find(entry.path, lora))]
            found = replace(found, twin=nearest(twins))
        yield found


def _checked(path: Path, name: str, deep: bool) -> "tuple[FileCheck, LoRA | None]":
    """What was found out about a file, and what was loaded from it."""
    from autolora.lora.lora import LoRA

    try:
        lora = LoRA.load(path)
    except LoRAFormatError as error:
        return FileCheck(name, path, str(error)), None
    metadata = Metadata.read(path)
    notes = list(metadata.warnings)
    if deep:
        notes += filter(None, map(check_picture, metadata.covers))
        report = lora.report
        others = report.biases or report.norms or report.text_encoders
        if report.norm == 0 and not others:
            notes.append("It changes nothing: all its weight changes are zero.")
    return FileCheck(name, path, "", lora.report, metadata, tuple(notes)), lora
