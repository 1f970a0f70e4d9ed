"""The rows of an index: which files it knows, what they say, and their place in the vectors."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import astuple, dataclass
from pathlib import Path

from autolora.errors import RetrievalError, shown
from autolora.lora.metadata import Metadata

MAX_ROWS_PER_LORA = 24
_CAPTION_LIMIT = 32
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
    captions = [_one_line(caption) for caption in metadata.captions[:_CAPTION_LIMIT]]
    if captions := [caption for caption in captions if caption]:
        found.append(("captions", "\n".join(captions)))
    return found


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
        stems: LoRA files of that folder by the key that the result shall have.

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
