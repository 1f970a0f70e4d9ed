"""Listing the LoRA files of a folder, without opening any."""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from autolora.adapters.paths import is_plain_name
from autolora.errors import shown

SUFFIX = ".safetensors"
PICKLE_SUFFIXES = frozenset({".pt", ".pth", ".ckpt", ".bin"})
_OTHER_WEIGHTS = frozenset({".gguf", ".onnx"})
_BAD_NAME = "has a line break or another control character in its name; rename it"


@dataclass(frozen=True)
class PoolEntry:
    """A LoRA file of a pool.

    Attributes:
        name: File stem; the path inside the pool without suffix where stems repeat.
        path: The file.
        size: Its size in bytes.
        mtime_ns: When it was last changed, in nanoseconds since 1970.
    """

    name: str
    path: Path
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Problem:
    """A file that cannot be used.

    Attributes:
        path: The file.
        reason: Why, as one sentence.
    """

    path: Path
    reason: str


class _Scan:
    """One walk through a folder; links are looked at and never walked through."""

    def __init__(self, folder: Path) -> None:
        self.files: list[tuple[str, int, int]] = []  # path inside the pool, size, mtime_ns
        self.problems: list[Problem] = []
        self._folder = str(folder)
        self._real = os.path.realpath(folder)
        pending = [""]
        while pending:
            pending += self._list(pending.pop())

    def _list(self, inside: str) -> list[str]:
        """Take the files of one folder; return the folders in it."""
        folders: list[str] = []
        place = os.path.join(self._folder, inside)
        try:
            with os.scandir(place) as items:
                for item in items:
                    if item.name.startswith("."):
                        continue
                    path = os.path.join(inside, item.name)
                    if item.is_dir(follow_symlinks=False):
                        if not is_plain_name(item.name):
                            self._report(path, _BAD_NAME)
                            continue
                        if _suffix(item.name) == SUFFIX:
                            self._report(path, "is a folder, not a file; rename it")
                        folders.append(path)
                    elif problem := self._take(item, path):
                        self._report(path, problem)
        except OSError as error:
            self._report(inside, f"cannot be listed: {shown(error.strerror)}")
        return folders

    def _take(self, item: "os.DirEntry[str]", path: str) -> str:
        """Add a file that can be opened, or tell why it cannot; nothing for other kinds of file."""
        suffix = _suffix(item.name)
        if item.is_symlink() and (suffix == SUFFIX or item.is_dir()):
            if problem := self._link_problem(item.path):
                return problem
            if item.is_dir():
                return ""
        if suffix in PICKLE_SUFFIXES:
            return (
                "is a pickle, which can run code when opened; convert it with `autolora pool add "
                "--allow-pickle` and take it out of the pool"
            )
        if suffix in _OTHER_WEIGHTS:
            return "is not a safetensors file; only those are read"
        if suffix != SUFFIX:
            return ""
        if not item.is_file():
            return "is a pipe or device, not a file; take it out of the pool"
        if not is_plain_name(item.name):
            return _BAD_NAME
        try:
            found = item.stat()
        except OSError:
            # Deleted since it was listed.
            return ""
        self.files.append((path, found.st_size, found.st_mtime_ns))
        return ""

    def _link_problem(self, path: str) -> str:
        try:
            target = os.path.realpath(path, strict=True)
        except OSError:
            return "is a link that leads nowhere; remove it"
        if target.startswith(self._real.rstrip(os.sep) + os.sep):
            return ""
        return "is a link that leaves the pool; put the files themselves in the pool"

    def _report(self, inside: str, problem: str) -> None:
        path = Path(self._folder, inside)
        self.problems.append(Problem(path, f"{shown(path)} {problem}."))


def scan(folder: Path) -> tuple[list[PoolEntry], list[Problem]]:
    """Find the LoRA files in a folder and the folders below it.

    Costs one directory entry and one ``stat`` per file. Hidden files and folders are passed over.

    Args:
        folder: The folder.

    Returns:
        Its LoRA files sorted by name, and what looks like one but must not be opened.
    """
    found = _Scan(folder)
    found.files.sort()
    stems = Counter(_stem(path) for path, _, _ in found.files)
    entries: dict[str, PoolEntry] = {}
    for path, size, mtime_ns in found.files:
        stem = _stem(path)
        plain = path.replace(os.sep, "/")
        name = stem if stems[stem] == 1 else plain[: -len(SUFFIX)]
        if name in entries:
            # Two spellings of the suffix, as in style.safetensors and style.SAFETENSORS.
            name = plain
        entries[name] = PoolEntry(name, folder / path, size, mtime_ns)
    return [entries[name] for name in sorted(entries)], found.problems


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _stem(path: str) -> str:
    return os.path.basename(path)[: -len(SUFFIX)]
