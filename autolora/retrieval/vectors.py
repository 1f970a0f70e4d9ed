"""Vector search with FAISS: exact for small pools, a graph or inverted lists for large ones.

Shape legend: n vectors, q queries, D dimensions, k results.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np

from autolora.errors import RetrievalError, shown

Kind = Literal["auto", "flat", "hnsw", "ivf"]
EXACT_LIMIT = 50_000
"""Up to this many vectors a scan over all of them is fast enough, and exact."""


def choose_kind(count: int) -> Kind:
    """The kind of index for a number of vectors.

    Args:
        count: How many vectors.

    Returns:
        ``flat`` up to `EXACT_LIMIT`, above that ``hnsw``, which needs no training and reaches a
        high recall.
    """
    return "flat" if count <= EXACT_LIMIT else "hnsw"


def build_vectors(vectors: np.ndarray, kind: Kind = "auto") -> Any:
    """Make a FAISS index by inner product.

    Args:
        vectors: Unit vectors ``[n, D]``, float32.
        kind: Kind of index; ``auto`` chooses by n.

    Returns:
        A FAISS index that holds the vectors verbatim.

    Raises:
        RetrievalError: An unknown kind, or vectors that are not finite.
    """
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    if not np.isfinite(vectors).all():
        raise RetrievalError("Vectors with NaN or infinite entries cannot be indexed.")
    count, dim = vectors.shape
    kind = choose_kind(count) if kind == "auto" else kind
    if kind == "flat":
        index: Any = faiss.IndexFlatIP(dim)
    elif kind == "hnsw":
        index = faiss.IndexHNSWFlat(dim, 32, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = 200
        index.hnsw.efSearch = 256
    elif kind == "ivf":
        lists = max(1, min(int(4 * count**0.5), count // 40))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, lists, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors)
        index.nprobe = min(lists, max(16, lists // 16))
    else:
        raise RetrievalError(f"Unknown index kind {kind!r}; known ones are flat, hnsw, ivf.")
    index.add(vectors)
    if kind == "ivf":
        index.make_direct_map()
    return index


def search_vectors(index: Any, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the nearest vectors.

    Args:
        index: A FAISS index.
        queries: ``[q, D]``.
        k: How many; more than there are is allowed.

    Returns:
        Scores ``[q, k']`` and row numbers ``[q, k']``, best first, with k' at most n. Entries that
        an approximate index did not find have row -1.

    Raises:
        RetrievalError: Queries of another length than the vectors.
    """
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    if queries.shape[1] != index.d:
        raise RetrievalError(
            f"The query has {queries.shape[1]} dimensions and the index {index.d}; they were made "
            "by different encoders: rebuild the index."
        )
    k = min(k, index.ntotal)
    if k < 1:
        return np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)
    scores, rows = index.search(queries, k)
    return scores, rows


def get_vectors(index: Any, rows: np.ndarray | None = None) -> np.ndarray:
    """Read vectors back.

    Args:
        index: A FAISS index.
        rows: Row numbers; all when None.

    Returns:
        ``[len(rows), D]``, float32, as they were added.
    """
    if rows is None:
        rows = np.arange(index.ntotal)
    if len(rows) == 0:
        return np.zeros((0, index.d), np.float32)
    found: np.ndarray = index.reconstruct_batch(np.ascontiguousarray(rows, np.int64))
    return found


def write_vectors(index: Any, path: Path) -> None:
    """Write an index to a file.

    Raises:
        RetrievalError: The file cannot be written, such as on a full disk.
    """
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:
        raise RetrievalError(
            f"The index file {shown(path)} cannot be written; make room for it or name another "
            "index folder."
        ) from error


def read_vectors(path: Path) -> Any:
    """Read an index from a file.

    Raises:
        RetrievalError: The file is missing or damaged.
    """
    try:
        return faiss.read_index(str(path))
    except RuntimeError as error:
        raise RetrievalError(
            f"The index file {shown(path)} is missing or damaged; rebuild the index."
        ) from error
