"""Finding the same LoRA under two names: copies, other headers, other formats, other precisions.

What counts is what a file changes (`autolora.adapters.fingerprint`), not its bytes.
"""

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autolora.adapters.fingerprint import (
    NEAR,
    PROBES,
    SAME,
    Fingerprint,
    relative_distance,
    sketch,
)
from autolora.adapters.loader import load_first_layer
from autolora.adapters.lora import LoRA
from autolora.adapters.reader import open_file
from autolora.adapters.scan import PoolEntry
from autolora.errors import LoRAFormatError, shown

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
