"""Adapters that were read lately, kept in memory.

A file is known by its path and identity (size, time of change, inode): one that was written again
is read again. What was used longest ago is forgotten first when the budget is spent. Importing this
does not load torch.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from autolora.errors import PoolError, shown

if TYPE_CHECKING:
    import torch

    from autolora.adapters.lora import LoRA
    from autolora.adapters.prepared import BaseWeight, PreparedLoRA

DEFAULT_CACHE_BYTES = 2 << 30

Identity = tuple[int, int, int]
"""Size in bytes, time of change in nanoseconds, inode."""


@dataclass(slots=True)
class _Entry:
    """One adapter with what was made ready of it."""

    lora: LoRA
    identity: Identity | None
    nbytes: int
    prepared: dict[Hashable, PreparedLoRA] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.nbytes + sum(ready.nbytes for ready in self.prepared.values())


class AdapterCache:
    """Least-recently-used adapters, parsed and prepared, within a budget of bytes.

    Safe to use from several threads; a file that several ask for at once is read once. Adapters
    that are in use elsewhere live on after they are forgotten here.

    Attributes:
        max_bytes: The budget. The adapter used last always stays, whatever its size.
        hits: How often something was there.
        misses: How often it had to be read or prepared.
    """

    def __init__(self, max_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        """Make an empty cache.

        Args:
            max_bytes: The budget in bytes.
        """
        self.max_bytes = max_bytes
        self.hits = 0
        self.misses = 0
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._busy: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()

    def load(self, path: str | os.PathLike[str], name: str | None = None) -> LoRA:
        """Read an adapter, or return the one that was read before.

        Args:
            path: The file.
            name: Name of the adapter; the file's stem where None.

        Raises:
            PoolError: The file is gone.
            LoRAFormatError: It cannot be used.
        """
        from autolora.adapters.lora import LoRA

        file = Path(path)
        key = (os.path.abspath(file), name)
        with self._alone(key):
            identity = file_identity(file)
            with self._lock:
                entry = self._entries.get(key)
                if entry is not None and entry.identity == identity:
                    return self._hit(key, entry).lora
                self.misses += 1
            lora = LoRA.load(file)
            if name is not None:
                lora.name = name
            with self._lock:
                self._store(key, _Entry(lora, identity, lora.nbytes))
        return lora

    def prepare(
        self,
        lora: LoRA,
        rank: int,
        base: BaseWeight | None = None,
        device: torch.device | None = None,
    ) -> PreparedLoRA:
        """Return an adapter's factors, computed at most once while it is kept.

        Args:
            lora: The adapter, from `load` or from elsewhere.
            rank: Rank of the layers that must be approximated.
            base: Gives the base weights of one and the same model at every call.
            device: An accelerator to keep the factors on.

        Raises:
            LoRAFormatError: As for `autolora.adapters.prepared.PreparedLoRA`.
        """
        from autolora.adapters.prepared import PreparedLoRA

        form = (rank, str(device))
        with self._alone(id(lora)):
            with self._lock:
                key, entry = self._find(lora)
                if form in entry.prepared:
                    return self._hit(key, entry).prepared[form]
                self.misses += 1
            ready = PreparedLoRA(lora, rank, base, device)
            with self._lock:
                entry.prepared[form] = ready
                newer = self._entries.get(key, entry) is not entry
                self._store(id(lora) if newer else key, entry)
        return ready

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        with self._lock:
            return sum(entry.total for entry in self._entries.values())

    def __len__(self) -> int:
        """Count the adapters that are kept."""
        return len(self._entries)

    def _find(self, lora: LoRA) -> tuple[Hashable, _Entry]:
        for key, entry in self._entries.items():
            if entry.lora is lora:
                return key, entry
        # The entry holds the adapter, so that no other one can get its number.
        return id(lora), _Entry(lora, None, lora.nbytes)

    def _hit(self, key: Hashable, entry: _Entry) -> _Entry:
        self.hits += 1
        self._entries.move_to_end(key)
        return entry

    def _store(self, key: Hashable, entry: _Entry) -> None:
        self._entries[key] = entry
        self._entries.move_to_end(key)
        total = sum(kept.total for kept in self._entries.values())
        while total > self.max_bytes and len(self._entries) > 1:
            _, oldest = self._entries.popitem(last=False)
            total -= oldest.total

    @contextmanager
    def _alone(self, key: Hashable) -> Iterator[None]:
        """Let one thread at a time work on a key; the others then find what it made."""
        with self._lock:
            lock = self._busy.setdefault(key, threading.Lock())
        try:
            with lock:
                yield
        finally:
            with self._lock:
                if not lock.locked():
                    self._busy.pop(key, None)


def file_identity(path: Path) -> Identity:
    """Return what changes when a file is written again.

    Raises:
        PoolError: The file is gone.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise PoolError(f"{shown(path)} is gone from the pool; list the pool again.") from error
    return stat.st_size, stat.st_mtime_ns, stat.st_ino
