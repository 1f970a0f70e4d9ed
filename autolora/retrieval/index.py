"""The index of a pool: FAISS vectors of weights and of metadata texts, and SQLite rows beside them.

An index folder holds generations, each a folder of its own, and a file ``CURRENT`` that names the
one in use. A new generation is complete before ``CURRENT`` is replaced, so a reader sees the old
index or the new one and never a mixture, and a failure leaves the old one in place. Several
programs may build at once; the last one to finish wins. An update encodes only what changed.

Rows hold the files that the index knows, what their metadata say, and their place in the vectors.
Search is exact for small pools, and goes by a graph or inverted lists in large ones.

Shape legend: n vectors, q queries, D dimensions, k results.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import faiss
import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from autolora.errors import AutoLoRAError, RetrievalError, shown
from autolora.lora.metadata import Metadata
from autolora.retrieval.lexicon import lexicon
from autolora.retrieval.prompt_terms import read_words
from autolora.safetensors_io import file_sha256

if TYPE_CHECKING:
    from autolora.lora.lora import LoRA
    from autolora.lora.pool import Pool, PoolEntry
    from autolora.retrieval.text import TextEncoder

MAX_ROWS_PER_LORA = 24
_CAPTION_LIMIT = 32
_MOST_CAPTIONS = 0.6
_MOST_PHRASES = 3
_LAST = frozenset(
    {"style", "drawing", "painting", "picture", "image", "photo", "background", "backdrop"}
)
_SCHEMA = """
CREATE TABLE provenance (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE loras (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, path TEXT NOT NULL UNIQUE,
    size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, sidecars TEXT NOT NULL,
    sha256 TEXT NOT NULL, title TEXT NOT NULL, vector INTEGER, problem TEXT NOT NULL
);
CREATE INDEX loras_sha256 ON loras (sha256);
CREATE TABLE texts (
    id INTEGER PRIMARY KEY, lora INTEGER NOT NULL REFERENCES loras (id),
    kind TEXT NOT NULL, text TEXT NOT NULL
);
"""


@dataclass(frozen=True)
class Record:
    """A file of the pool as the index knows it.

    Attributes:
        name: Its name in the pool.
        path: Its path inside the pool, with forward slashes.
        size: Bytes.
        mtime_ns: When it was last changed.
        sidecars: Names, sizes and times of the files beside it, as one string.
        sha256: Hash of its content.
        title: Name for people.
        vector: Row in the encoder's vectors, None without one.
        problem: Why it cannot be used; empty when it can.
    """

    name: str
    path: str
    size: int
    mtime_ns: int
    sidecars: str
    sha256: str
    title: str
    vector: int | None = None
    problem: str = ""


@dataclass(frozen=True)
class TextRow:
    """A piece of metadata with its own vector.

    Attributes:
        lora: Position of the record.
        kind: ``title``, ``trigger``, ``tag``, ``description`` or ``captions``.
        text: What it says; captions are joined by line breaks and share one mean vector.
    """

    lora: int
    kind: str
    text: str

    @property
    def pieces(self) -> list[str]:
        """The texts whose mean vector stands for this row."""
        return self.text.split("\n") if self.kind == "captions" else [self.text]


_NOT_A_NAME = re.compile(
    r"\b(lora|locon|lycoris|flux|flux1|dev|schnell|safetensors|epoch|step|steps|rank|final|"
    r"v?\d+(\.\d+)*k?)\b",
    re.IGNORECASE,
)


def readable(name: str) -> str:
    """What a file name says to people.

    Args:
        name: A title or file stem such as ``Neon_Sign-flux_v2``.

    Returns:
        The words that mean something (``Neon Sign``), empty when there are none.
    """
    words = re.sub(r"[\W_]+", " ", name)
    return " ".join(_NOT_A_NAME.sub(" ", words).split())


def metadata_texts(metadata: Metadata) -> list[tuple[str, str]]:
    """The pieces of metadata that are worth searching.

    Args:
        metadata: What is known about a LoRA.

    Returns:
        Pairs of kind and text, without repetitions; at most `MAX_ROWS_PER_LORA`.
    """
    found: list[tuple[str, str]] = []
    if title := readable(metadata.title):
        found.append(("title", title))
    found += [("trigger", _one_line(word)) for word in metadata.trigger_words]
    # Frequent words of the training captions say what it is about where its author does not.
    found += [("tag", _one_line(tag)) for tag in metadata.tags or metadata.suggestions]
    if description := _one_line(metadata.description):
        found.append(("description", description[:400]))
    found = [pair for pair in dict.fromkeys(found) if pair[1]][: MAX_ROWS_PER_LORA - 1]
    style = lexicon().style(title)
    if style is not None:
        found += [("look", look) for look in lexicon().looks(style)]
    captions = [_one_line(caption) for caption in metadata.captions[:_CAPTION_LIMIT]]
    found += [("phrase", phrase) for phrase in common_phrases(captions)]
    if captions := [caption for caption in captions if caption]:
        found.append(("captions", "\n".join(captions)))
    return found


def common_phrases(captions: Sequence[str]) -> list[str]:
    """What most captions of a LoRA speak of: its name, where nobody tells it.

    Args:
        captions: Captions of one LoRA.

    Returns:
        Runs of one to three words, lemmas in lower case, the longest of each.
    """
    counts: Counter[str] = Counter()
    for caption in captions:
        words = read_words(caption)
        places = ((i, j) for i in range(len(words)) for j in range(i + 1, i + 4))
        runs = [words[i:j] for i, j in places if j <= len(words)]
        said = [run for run in runs if all(word.role != "stop" for word in run)]
        # "style" and "drawing" alone are nothing; "pop art" is, with its last word.
        told = [run for run in said if run[0].role == "content" and run[-1].stem not in _LAST]
        counts.update({" ".join(word.stem for word in run) for run in told})
    least = max(2, _MOST_CAPTIONS * len(captions))
    common = [phrase for phrase, count in counts.items() if count >= least]
    inside = {p for p in common for q in common if p != q and f" {p} " in f" {q} "}
    return [phrase for phrase in common if phrase not in inside][:_MOST_PHRASES]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def write_records(
    path: Path,
    provenance: dict[str, str],
    records: Sequence[Record],
    texts: Iterable[TextRow],
) -> None:
    """Write the rows to a new SQLite file.

    Args:
        path: The file; must not exist.
        provenance: What the index was made with.
        records: Files, in order.
        texts: Pieces of metadata, in the order of their vectors.

    Raises:
        RetrievalError: The file cannot be written, such as on a full disk.
    """
    try:
        with closing(sqlite3.connect(path)) as connection:
            connection.executescript(_SCHEMA)
            connection.executemany("INSERT INTO provenance VALUES (?, ?)", provenance.items())
            connection.executemany(
                "INSERT INTO loras VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                ((i, *astuple(r)) for i, r in enumerate(records)),
            )
            connection.executemany(
                "INSERT INTO texts VALUES (?, ?, ?, ?)",
                ((i, row.lora, row.kind, row.text) for i, row in enumerate(texts)),
            )
            connection.commit()
    except sqlite3.Error as error:
        raise RetrievalError(
            f"The index file {shown(path)} cannot be written ({shown(error)}); make room for it "
            "or name another index folder."
        ) from error


def read_records(path: Path) -> tuple[dict[str, str], list[Record], list[TextRow]]:
    """Read the rows.

    Args:
        path: A file that `write_records` wrote.

    Returns:
        Provenance, files and pieces of metadata.

    Raises:
        RetrievalError: The file is missing or damaged.
    """
    try:
        uri = f"{path.resolve().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True)) as connection:
            provenance = dict(connection.execute("SELECT key, value FROM provenance"))
            records = [
                Record(*row)
                for row in connection.execute(
                    "SELECT name, path, size, mtime_ns, sidecars, sha256, title, vector, problem "
                    "FROM loras ORDER BY id"
                )
            ]
            rows = connection.execute("SELECT lora, kind, text FROM texts ORDER BY id")
            return provenance, records, [TextRow(*row) for row in rows]
    except sqlite3.Error as error:
        raise RetrievalError(
            f"The index file {shown(path)} is missing or damaged; rebuild the index."
        ) from error


def sidecar_stamps(folder: Path, stems: dict[str, Path]) -> dict[str, str]:
    """Summarise the files beside each LoRA, so that a change is seen without opening them.

    Args:
        folder: One folder.
        stems: LoRA files of that folder by the key that the result gets.

    Returns:
        Names, sizes and times of the files that start with the LoRA's stem and a dot, and of the
        folder's model card, as JSON.
    """
    beside: dict[str, list[tuple[str, int, int]]] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() == ".safetensors" or not file.is_file():
            continue
        stat = file.stat()
        entry = (file.name, stat.st_size, stat.st_mtime_ns)
        # A stem may itself hold dots, so every prefix that ends before a dot may own the file.
        parts = file.name.split(".")
        for cut in range(1, len(parts)):
            beside.setdefault(".".join(parts[:cut]), []).append(entry)
    # A folder's README.md may be the model card of the only LoRA in it.
    card = [entry for entry in beside.get("README", []) if entry[0] == "README.md"]
    return {key: json.dumps(beside.get(path.stem, []) + card) for key, path in stems.items()}


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


FORMAT_VERSION = 2
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
