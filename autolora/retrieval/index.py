"""The index of a pool: FAISS vectors of weights and of metadata texts, and SQLite rows beside them.

An index folder holds generations, each a folder of its own, and a file ``CURRENT`` that names the
one in use. A new generation is complete before ``CURRENT`` is replaced, so a reader sees the old
index or the new one and never a mixture, and a failure leaves the old one in place. Several
programs may build at once; the last one to finish wins.
"""

from __future__ import annotations

import os
import re
import shutil
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout

from autolora.errors import RetrievalError, shown
from autolora.retrieval.records import Record, TextRow, read_records, write_records
from autolora.retrieval.vectors import (
    Kind,
    build_vectors,
    get_vectors,
    read_vectors,
    search_vectors,
    write_vectors,
)

FORMAT_VERSION = 1
Channel = Literal["weights", "texts"]
_CURRENT = "CURRENT"
_LOCK_SECONDS = 60.0
_ABANDONED_SECONDS = 24 * 3600.0
"""Age from which a generation that nobody finished is taken to belong to a program that died."""


@dataclass(frozen=True)
class Provenance:
    """What an index was made with; one made with anything else cannot be searched.

    Attributes:
        encoder: Hash or name of the LoRA encoder; empty for an index of metadata only.
        dim: Length of its vectors; 0 without an encoder.
        text_encoder: Name of the text encoder.
        text_dim: Length of its vectors.
        format_version: Version of the files.
    """

    encoder: str
    dim: int
    text_encoder: str
    text_dim: int
    format_version: int = FORMAT_VERSION

    def to_dict(self) -> dict[str, str]:
        """Fields as text."""
        return {key: str(value) for key, value in asdict(self).items()}

    def difference(self, stored: dict[str, str]) -> str:
        """What differs from stored provenance.

        Args:
            stored: Fields as text.

        Returns:
            One phrase, empty when nothing differs.
        """
        names = {
            "encoder": "LoRA encoder",
            "dim": "vector length",
            "text_encoder": "text encoder",
            "text_dim": "text vector length",
            "format_version": "format version",
        }
        for key, value in self.to_dict().items():
            if stored.get(key) != value:
                was, now = (shown(v or "none", 16) for v in (stored.get(key, ""), value))
                return f"{names[key]} {was}, now {now}"
        return ""


class PoolIndex:
    """A read-only, complete index of a pool.

    Attributes:
        provenance: What it was made with.
        records: Every file of the pool; those with a `problem` have no vectors.
        texts: Pieces of metadata, in the order of their vectors.
    """

    def __init__(
        self,
        provenance: Provenance,
        records: Sequence[Record],
        texts: Sequence[TextRow],
        weights: Any,
        text_vectors: Any,
    ) -> None:
        """Hold loaded parts; use `open`, or `refresh_index` to make one.

        Args:
            provenance: What it was made with.
            records: Files.
            texts: Pieces of metadata.
            weights: FAISS index of the encoder's vectors; None without an encoder.
            text_vectors: FAISS index of the metadata's vectors.
        """
        self.provenance = provenance
        self.records = list(records)
        self.texts = list(texts)
        self._channels: dict[str, Any] = {"weights": weights, "texts": text_vectors}
        with_vector = [(r.vector, i) for i, r in enumerate(records) if r.vector is not None]
        self._weight_owner = np.array([i for _, i in sorted(with_vector)], np.int64)
        self._text_owner = np.array([row.lora for row in texts], np.int64)

    def __len__(self) -> int:
        """Count the files that can be used."""
        return sum(not record.problem for record in self.records)

    @property
    def problems(self) -> list[Record]:
        """Files that were left out, with the reason in `problem`."""
        return [record for record in self.records if record.problem]

    def channel_size(self, channel: Channel) -> int:
        """Number of vectors in a channel."""
        index = self._channels[channel]
        return 0 if index is None else int(index.ntotal)

    def search(
        self, channel: Channel, queries: np.ndarray, k: int
    ) -> list[list[tuple[int, float, int]]]:
        """Find the vectors nearest to queries.

        Args:
            channel: ``weights`` or ``texts``.
            queries: Unit vectors ``[q, D]``.
            k: How many per query.

        Returns:
            For each query (position of the record, similarity, row in the channel), best first.
        """
        index = self._channels[channel]
        if index is None:
            return [[] for _ in queries]
        owner = self._weight_owner if channel == "weights" else self._text_owner
        scores, rows = search_vectors(index, queries, k)
        return [
            [(int(owner[r]), float(s), int(r)) for s, r in zip(*pair, strict=True) if r >= 0]
            for pair in zip(scores, rows, strict=True)
        ]

    def vectors(self, channel: Channel, rows: np.ndarray | None = None) -> np.ndarray:
        """Vectors of a channel.

        Args:
            channel: ``weights`` or ``texts``.
            rows: Row numbers; all when None.

        Returns:
            ``[n, D]``; without the channel ``[0, 0]``.
        """
        index = self._channels[channel]
        return np.zeros((0, 0), np.float32) if index is None else get_vectors(index, rows)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], expected: Provenance | None = None) -> PoolIndex:
        """Open the current generation of an index folder.

        Args:
            folder: The index folder.
            expected: What the index must have been made with; not checked when None.

        Returns:
            The index.

        Raises:
            RetrievalError: There is none, it is damaged, or it was made with something else.
        """
        root = Path(folder)
        home = root / current_generation(root)
        stored, records, texts = read_records(home / "pool.sqlite")
        if expected is not None and (difference := expected.difference(stored)):
            raise RetrievalError(
                f"The index {shown(root)} was made with another retriever ({difference}); "
                "run autolora index --rebuild."
            )
        try:
            provenance = Provenance(
                stored["encoder"],
                int(stored["dim"]),
                stored["text_encoder"],
                int(stored["text_dim"]),
                int(stored["format_version"]),
            )
        except (KeyError, ValueError) as error:
            raise RetrievalError(
                f"The index {shown(root)} does not say how it was made; "
                "run autolora index --rebuild."
            ) from error
        weights = read_vectors(home / "weights.faiss") if provenance.dim else None
        text_vectors = read_vectors(home / "texts.faiss")
        index = cls(provenance, records, texts, weights, text_vectors)
        index._check(root)
        return index

    def _check(self, root: Path) -> None:
        good = self.channel_size("texts") == len(self.texts)
        good &= self.channel_size("weights") == len(self._weight_owner)
        if not good:
            raise RetrievalError(
                f"The index {shown(root)} is damaged: rows and vectors do not agree; "
                "run autolora index --rebuild."
            )


def current_generation(root: Path) -> str:
    """Name of the generation in use.

    Args:
        root: The index folder.

    Returns:
        Name of a folder inside it.

    Raises:
        RetrievalError: There is no index.
    """
    try:
        name = (root / _CURRENT).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RetrievalError(
            f"There is no index at {shown(root)}; run autolora index to build it."
        ) from error
    if not re.fullmatch(r"generation-\w+", name):
        raise RetrievalError(f"The index {shown(root)} is damaged; run autolora index --rebuild.")
    return name


def write_generation(
    root: Path,
    provenance: Provenance,
    records: Sequence[Record],
    texts: Sequence[TextRow],
    weights: np.ndarray,
    text_vectors: np.ndarray,
    kind: Kind = "auto",
) -> PoolIndex:
    """Write a complete new generation, then make it the current one.

    Args:
        root: The index folder; made when missing.
        provenance: What the index was made with.
        records: Files.
        texts: Pieces of metadata.
        weights: Encoder vectors ``[n, D]`` in the order of the records' `vector`.
        text_vectors: Metadata vectors ``[m, D']`` in the order of `texts`.
        kind: Kind of FAISS index.

    Returns:
        The index.

    Raises:
        RetrievalError: The folder cannot be written.
    """
    home = root / f"building-{uuid.uuid4().hex[:12]}"
    try:
        home.mkdir(parents=True)
        write_records(home / "pool.sqlite", provenance.to_dict(), records, texts)
        channels = {"texts": build_vectors(text_vectors, kind)}
        if provenance.dim:
            channels["weights"] = build_vectors(weights, kind)
        for name, vectors in channels.items():
            write_vectors(vectors, home / f"{name}.faiss")
        _publish(root, home)
    except BaseException as error:
        shutil.rmtree(home, ignore_errors=True)
        if isinstance(error, OSError):
            raise RetrievalError(
                f"The index folder {shown(root)} cannot be written "
                f"({error.strerror or type(error).__name__}); free it or name another one."
            ) from error
        raise
    return PoolIndex(provenance, records, texts, channels.get("weights"), channels["texts"])


def _publish(root: Path, built: Path) -> None:
    """Make a finished folder the current generation, and clear away what is no longer needed."""
    name = built.name.replace("building", "generation", 1)
    pointer = built / _CURRENT
    pointer.write_text(name, encoding="utf-8")
    try:
        # Without the lock, two programs that finish together could each clear the other's away.
        with FileLock(root / ".lock", timeout=_LOCK_SECONDS):
            try:
                before = current_generation(root)
            except RetrievalError:
                before = ""
            built.rename(root / name)
            os.replace(root / name / _CURRENT, root / _CURRENT)
            # The generation before stays for readers that have just looked up its name.
            _clear(root, {name, before})
    except Timeout as error:
        raise RetrievalError(
            f"Another program has been writing to the index folder {shown(root)} for "
            f"{_LOCK_SECONDS:.0f} seconds; wait for it or end it."
        ) from error


def _clear(root: Path, kept: set[str]) -> None:
    abandoned = time.time() - _ABANDONED_SECONDS
    for folder in root.glob("generation-*"):
        if folder.name not in kept:
            shutil.rmtree(folder, ignore_errors=True)
    for folder in root.glob("building-*"):
        with suppress(OSError):  # its program may clear it away at the same moment
            if folder.stat().st_mtime < abandoned:
                shutil.rmtree(folder)
