"""Bringing an index up to date with its pool, encoding only what changed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from autolora.errors import AutoLoRAError, RetrievalError, shown
from autolora.retrieval.index import PoolIndex, Provenance, write_generation
from autolora.retrieval.records import Record, TextRow, metadata_texts, sidecar_stamps
from autolora.safetensors_io import file_sha256

if TYPE_CHECKING:
    from autolora.lora.lora import LoRA
    from autolora.lora.pool import Pool, PoolEntry
    from autolora.retrieval.text import TextEncoder

Encode = Callable[["LoRA"], "Tensor | None"]
Progress = Callable[[int, int], None]


@dataclass
class RefreshReport:
    """What a refresh did.

    Attributes:
        encoded: Names that were opened because they are new or changed.
        kept: How many were taken over from the index before, or are copies of one encoded now.
        removed: Paths that are no longer in the pool.
        left_out: Reason by name, for files that cannot be used.
        rebuilt: Why nothing was taken over; empty when something could be.
        written: Whether a new generation was written.
    """

    encoded: list[str] = field(default_factory=list)
    kept: int = 0
    removed: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    rebuilt: str = ""
    written: bool = False


@dataclass
class _Row:
    """A record in the making, with its vector and texts."""

    record: Record
    vector: np.ndarray | None
    texts: list[tuple[str, str]]


class _Before:
    """The index before, by path and by content."""

    def __init__(self, index: PoolIndex | None) -> None:
        self.by_path: dict[str, _Row] = {}
        self.by_sha: dict[str, _Row] = {}
        self.text_vectors: dict[tuple[str, str], np.ndarray] = {}
        if index is None:
            return
        vectors = index.vectors("weights")
        rows = [_Row(r, None if r.vector is None else vectors[r.vector], []) for r in index.records]
        for text, vector in zip(index.texts, index.vectors("texts"), strict=True):
            rows[text.lora].texts.append((text.kind, text.text))
            self.text_vectors[text.kind, text.text] = vector
        self.by_path = {row.record.path: row for row in rows}
        self.by_sha = {row.record.sha256: row for row in rows if row.record.sha256}


def refresh_index(
    folder: str | os.PathLike[str],
    pool: Pool,
    provenance: Provenance,
    text_encoder: TextEncoder,
    encode: Encode | None = None,
    *,
    rebuild: bool = False,
    verify: bool = False,
    progress: Progress | None = None,
) -> tuple[PoolIndex, RefreshReport]:
    """Bring the index of a pool up to date, or make it.

    A file whose path, size and time are unchanged is taken over unopened; else its content hash
    decides, so a file that was moved or touched is not encoded again. A file that cannot be used
    is left out and listed. Any other failure leaves the index before in place.

    Args:
        folder: The index folder.
        pool: The pool; listed again first.
        provenance: What the index is made with. An index made with something else is rebuilt.
        text_encoder: Encodes metadata.
        encode: Gives a LoRA's unit vector ``[D]``, or None where it has none; an `AutoLoRAError`
            leaves the file out. None for an index of metadata only.
        rebuild: Take nothing over.
        verify: Hash every file, also where size and time are unchanged.
        progress: Called with files done and files in all.

    Returns:
        The index and what was done.

    Raises:
        RetrievalError: A vector of the wrong length, or a folder that cannot be written.
        PoolError: The pool is missing or empty.
    """
    pool.refresh()
    root = Path(folder)
    old, why = (None, "asked for") if rebuild else _open(root, provenance)
    before = _Before(old)
    report = RefreshReport(rebuilt=why)
    rows: list[_Row] = []
    stamps = _stamps(pool)
    for done, entry in enumerate(pool.entries):
        rows.append(_row(pool, entry, stamps, before, encode, provenance, verify, report))
        if progress is not None:
            progress(done + 1, len(pool.entries))
    paths = {row.record.path for row in rows}
    report.removed = sorted(path for path in before.by_path if path not in paths)
    report.left_out = {row.record.name: row.record.problem for row in rows if row.record.problem}
    records, texts, weights = _number(rows, provenance)
    # Texts are taken over with their records, so equal records have equal texts.
    if old is not None and records == old.records:
        return old, report
    vectors = _text_vectors(texts, text_encoder, before.text_vectors)
    report.written = True
    return write_generation(root, provenance, records, texts, weights, vectors), report


def _open(root: Path, provenance: Provenance) -> tuple[PoolIndex | None, str]:
    try:
        return PoolIndex.open(root, provenance), ""
    except RetrievalError as error:
        return None, str(error)


def _relative(pool: Pool, entry: PoolEntry) -> str:
    return entry.path.relative_to(pool.folder).as_posix()


def _stamps(pool: Pool) -> dict[str, str]:
    folders: dict[Path, dict[str, Path]] = {}
    for entry in pool.entries:
        folders.setdefault(entry.path.parent, {})[_relative(pool, entry)] = entry.path
    stamps: dict[str, str] = {}
    for parent, files in folders.items():
        stamps |= sidecar_stamps(parent, files)
    return stamps


def _row(
    pool: Pool,
    entry: PoolEntry,
    stamps: dict[str, str],
    before: _Before,
    encode: Encode | None,
    provenance: Provenance,
    verify: bool,
    report: RefreshReport,
) -> _Row:
    path = _relative(pool, entry)
    known = before.by_path.get(path)
    same = (
        known is not None
        and not verify
        and (known.record.size, known.record.mtime_ns) == (entry.size, entry.mtime_ns)
    )
    try:
        sha = known.record.sha256 if same and known is not None else file_sha256(entry.path)
    except (AutoLoRAError, OSError):
        sha = ""
    if not same:
        known = before.by_sha.get(sha)
    fields = Record(entry.name, path, entry.size, entry.mtime_ns, stamps[path], sha, entry.name)
    if known is None:
        report.encoded.append(entry.name)
        vector, problem = _encode(pool, entry.name, encode, provenance)
        if not problem and sha:
            # People keep copies; a copy further down the pool is not encoded again.
            before.by_sha[sha] = _Row(fields, vector, [])
    else:
        report.kept += 1
        vector, problem = known.vector, known.record.problem
    record = replace(fields, problem=problem)
    if problem:
        return _Row(record, None, [])
    if known is not None and (known.record.path, known.record.sidecars) == (path, stamps[path]):
        return _Row(replace(record, title=known.record.title), vector, known.texts)
    metadata = pool.metadata(entry.name)
    record = replace(record, title=metadata.title or entry.name)
    return _Row(record, vector, metadata_texts(metadata))


def _encode(
    pool: Pool, name: str, encode: Encode | None, provenance: Provenance
) -> tuple[np.ndarray | None, str]:
    """A LoRA's vector, or why it cannot be used."""
    try:
        lora = pool.load(name)
        vector = encode(lora) if encode is not None and provenance.dim else None
    except AutoLoRAError as error:
        return None, str(error)
    if vector is None:
        return None, ""
    if vector.shape != (provenance.dim,):
        raise RetrievalError(
            f"The encoder gave a vector of shape {list(vector.shape)} for {shown(name)}, expected "
            f"[{provenance.dim}]; the index would be useless."
        )
    array = vector.detach().float().cpu().numpy()
    if not np.isfinite(array).all():
        return None, f"LoRA {shown(name)} gives a vector that is not finite; its weights are bad."
    return array, ""


def _number(
    rows: Sequence[_Row], provenance: Provenance
) -> tuple[list[Record], list[TextRow], np.ndarray]:
    """Give records their rows in the vectors."""
    records: list[Record] = []
    texts: list[TextRow] = []
    vectors: list[np.ndarray] = []
    for row in rows:
        place = None
        if row.vector is not None:
            place = len(vectors)
            vectors.append(row.vector)
        texts += [TextRow(len(records), kind, text) for kind, text in row.texts]
        records.append(replace(row.record, vector=place))
    joined = np.stack(vectors) if vectors else np.zeros((0, provenance.dim), np.float32)
    return records, texts, joined


def _text_vectors(
    texts: Sequence[TextRow],
    encoder: TextEncoder,
    known: dict[tuple[str, str], np.ndarray],
) -> np.ndarray:
    """Vectors ``[m, D]`` of pieces of metadata; only new ones are encoded."""
    new = [row for row in texts if (row.kind, row.text) not in known]
    pieces = list(dict.fromkeys(piece for row in new for piece in row.pieces))
    encoded = dict(zip(pieces, encoder.encode(pieces), strict=True)) if pieces else {}
    vectors = dict(known)
    for row in new:
        mean = torch.stack([encoded[piece] for piece in row.pieces]).mean(0)
        unit = torch.nn.functional.normalize(mean, dim=0)
        vectors[row.kind, row.text] = unit.float().cpu().numpy()
    if not texts:
        return np.zeros((0, encoder.dim), np.float32)
    return np.stack([vectors[row.kind, row.text] for row in texts])
