"""A folder of LoRAs, listed without opening a file, and a cache of the adapters used last.

The cache knows a file by its path and identity (size, time of change, inode), so that one that was
written again is read again. Least recently used adapters go first when the budget is spent.
Importing this module does not load torch.
"""

from __future__ import annotations

import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from autolora.errors import LoRAFormatError, Message, PoolError, shown
from autolora.files import is_followed, is_plain_name
from autolora.lora.formats import Description, describe_file
from autolora.lora.metadata import Metadata
from autolora.lora.names import NameIndex

if TYPE_CHECKING:
    import torch

    from autolora.lora.lora import BaseWeight, LoRA, PreparedLoRA

SUFFIX = ".safetensors"
PICKLE_SUFFIXES = frozenset({".pt", ".pth", ".ckpt", ".bin"})
_OTHER_WEIGHTS = frozenset({".gguf", ".onnx"})
_LEAVES = "is a link that leaves the pool"
_TO_FOLLOW = (
    "name the folder that it leads to with --follow-links, or as follow_links in the "
    "configuration, or put the files themselves in the pool"
)
MAX_LINK_NOTES = 3
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
    """One walk through a folder; links are walked through only where that was asked for."""

    def __init__(self, folder: Path) -> None:
        self.files: list[tuple[str, int, int]] = []  # path inside the pool, size, mtime_ns
        self.problems: list[Problem] = []
        self._folder = str(folder)
        self._real = os.path.realpath(folder)
        self._walked = {self._real}
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
                    if item.is_dir(follow_symlinks=False) or self._is_followed(item):
                        if not self._is_new(item):
                            continue
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

    def _take(self, item: os.DirEntry[str], path: str) -> str:
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
        if self._is_inside(target):
            return ""
        if is_followed(Path(target)):
            return ""
        return f"{_LEAVES}; {_TO_FOLLOW}"

    def _is_followed(self, item: os.DirEntry[str]) -> bool:
        """Whether an item is a link to a folder outside the pool that is to be walked through."""
        if not item.is_symlink() or not item.is_dir():
            return False
        target = os.path.realpath(item.path)
        return not self._is_inside(target) and is_followed(Path(target))

    def _is_new(self, item: os.DirEntry[str]) -> bool:
        """Whether a folder was not walked through yet; links may lead round in a circle."""
        if not item.is_symlink() and len(self._walked) == 1:
            return True  # no link was walked through that could lead here
        target = os.path.realpath(item.path)
        new = target not in self._walked
        self._walked.add(target)
        return new

    def _is_inside(self, target: str) -> bool:
        return target == self._real or target.startswith(self._real.rstrip(os.sep) + os.sep)

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

    def load(
        self, path: str | os.PathLike[str], name: str | None = None, family: str | None = None
    ) -> LoRA:
        """Read an adapter, or return the one that was read before.

        Args:
            path: The file.
            name: Name of the adapter; the file's stem where None.
            family: The base-model family that it is for; None finds it from the file.

        Raises:
            PoolError: The file is gone.
            LoRAFormatError: It cannot be used.
        """
        from autolora.lora.lora import LoRA

        file = Path(path)
        key = (os.path.abspath(file), name, family)
        with self._alone(key):
            identity = file_identity(file)
            with self._lock:
                entry = self._entries.get(key)
                if entry is not None and entry.identity == identity:
                    return self._hit(key, entry).lora
                self.misses += 1
            lora = LoRA.load(file, family)
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
            LoRAFormatError: As for `autolora.lora.lora.PreparedLoRA`.
        """
        from autolora.lora.lora import PreparedLoRA

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


class Pool:
    """The LoRA files in a folder and the folders below it.

    Making one only lists files; a file is opened when it is asked for, and one that cannot be used
    does not disturb the others.

    Attributes:
        folder: The pool's folder.
        entries: Its LoRA files, sorted by name.
        scan_problems: What looks like a LoRA file and must not be opened.
        cache: The adapters that were loaded lately.
    """

    folder: Path
    entries: list[PoolEntry]
    scan_problems: list[Problem]

    def __init__(
        self, folder: str | os.PathLike[str], cache_bytes: int = DEFAULT_CACHE_BYTES
    ) -> None:
        """List a folder's LoRA files.

        Args:
            folder: The folder.
            cache_bytes: How many bytes of loaded adapters to keep.

        Raises:
            PoolError: The folder does not exist, or has no LoRA file.
        """
        self.folder = Path(folder)
        self.cache = AdapterCache(cache_bytes)
        self._described: dict[Path, tuple[tuple[int, int], Description]] = {}
        self.refresh()

    def refresh(self) -> None:
        """List the folder again.

        Raises:
            PoolError: The folder does not exist, or has no LoRA file.
        """
        if not os.path.isdir(self.folder):
            kind = "is not a folder" if os.path.exists(self.folder) else "does not exist"
            raise PoolError(
                f"LoRA pool {shown(self.folder)} {kind}; make it and put .safetensors files in it, "
                "or name another folder."
            )
        self.entries, self.scan_problems = scan(self.folder)
        if not self.entries:
            hint = f" ({self.scan_problems[0].reason})" if self.scan_problems else ""
            raise PoolError(
                f"LoRA pool {shown(self.folder)} has no .safetensors file that can be used{hint}; "
                "put some in it, or name another folder."
            )
        self._by_name = {entry.name: entry for entry in self.entries}
        self._index: NameIndex | None = None

    def link_notes(self) -> list[str]:
        """Say which links are not followed, the first few by name."""
        links = [p for p in self.scan_problems if _LEAVES in p.reason]
        names = [shown(problem.path.relative_to(self.folder), 80) for problem in links]
        if not names:
            return []
        more = f" and {len(names) - MAX_LINK_NOTES} more" if len(names) > MAX_LINK_NOTES else ""
        return [f"Not followed: {', '.join(names[:MAX_LINK_NOTES])}{more}; {_TO_FOLLOW}."]

    @property
    def names(self) -> list[str]:
        """Names of the LoRAs, sorted."""
        return list(self._by_name)

    def __len__(self) -> int:
        """Count the LoRA files."""
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        """Tell whether a LoRA of this name is in the pool."""
        return name in self._by_name

    def __iter__(self) -> Iterator[PoolEntry]:
        """Go through the LoRA files, sorted by name."""
        return iter(self.entries)

    def __repr__(self) -> str:
        """Show the folder and how many files it has."""
        return f"Pool({str(self.folder)!r}, {len(self.entries)} LoRAs)"

    def entry(self, name: str) -> PoolEntry:
        """Look up a LoRA file.

        Args:
            name: Its name in the pool, or one that only it can mean.

        Returns:
            The entry.

        Raises:
            PoolError: No LoRA has this name, or several may be meant; the message names some.
        """
        found = self.find(name)
        if len(found) > 1:
            raise PoolError(
                "Pool {} has {} LoRAs that {} may mean: {}; name one of them.",
                shown(self.folder),
                len(found),
                repr(shown(name)),
                ", ".join(shown(entry.name) for entry in found[:5]),
            )
        if not found:
            folded = {known.casefold(): known for known in self._by_name}
            close = get_close_matches(name.casefold(), folded, n=3, cutoff=0.5)
            known = ", ".join(shown(folded[match]) for match in close)
            raise PoolError(
                "No LoRA named {} in pool {} ({} LoRAs)",
                repr(shown(name)),
                shown(self.folder),
                len(self),
                advice=Message("did you mean {}?", known)
                if close
                else "`autolora pool list` shows the names.",
            )
        return found[0]

    def find(self, name: str) -> list[PoolEntry]:
        """Find the files that a name may mean, as people and other programs write it.

        Args:
            name: A name of the pool, or a like one: see `autolora.lora.names`.

        Returns:
            The file of exactly this name; else those that fit it best, more than one where it is
            not clear.
        """
        exact = self._by_name.get(name)
        if exact is not None:
            return [exact]
        if self._index is None:
            self._index = NameIndex(self.folder, self.entries)
        return self._index.find(name)

    def resolve(self, name: str) -> str:
        """Return the name of the one file that a name may mean; the name itself otherwise."""
        found = self.find(name)
        return found[0].name if len(found) == 1 else name

    def load(self, name: str, family: str | None = None) -> LoRA:
        """Load a LoRA, or take it from the cache when its file has not changed.

        Args:
            name: Its name in the pool.
            family: The base-model family that it is for; None finds it from the file.

        Returns:
            The adapter, under its name in the pool.

        Raises:
            PoolError: No LoRA has this name.
            LoRAFormatError: Its file cannot be used.
        """
        entry = self.entry(name)
        return self.cache.load(entry.path, entry.name, family)

    def describe(self, name: str) -> Description:
        """Tell which base-model family a LoRA is for, from its file's header.

        Args:
            name: Its name in the pool.

        Returns:
            Family, format, and why the file cannot be used, if so; remembered until it changes.

        Raises:
            PoolError: No LoRA has this name.
        """
        entry = self.entry(name)
        known = self._described.get(entry.path)
        if known is None or known[0] != (entry.size, entry.mtime_ns):
            known = ((entry.size, entry.mtime_ns), describe_file(entry.path))
            self._described[entry.path] = known
        return known[1]

    def families(self) -> dict[str, list[str]]:
        """List the LoRAs by the base model that they are for.

        Returns:
            Names by the base model's title; those of files that may be for several are under the
            titles joined by ``or``, and those that nothing tells of under ``unknown``.
        """
        found: dict[str, list[str]] = {}
        for entry in self.entries:
            found.setdefault(self.describe(entry.name).title or "unknown", []).append(entry.name)
        return dict(sorted(found.items()))

    def metadata(self, name: str) -> Metadata:
        """Read a LoRA's metadata without its weights.

        Args:
            name: Its name in the pool.

        Returns:
            What header and sidecar files say.

        Raises:
            PoolError: No LoRA has this name.
        """
        return Metadata.read(self.entry(name).path)

    def check(self, progress: Callable[[int, int], None] | None = None) -> list[Problem]:
        """Open every file and list those that cannot be used.

        Args:
            progress: Called with the number of files done and of all.

        Returns:
            Files with the reason, sorted by path; empty when all is well.
        """
        problems = list(self.scan_problems)
        for done, entry in enumerate(self.entries, 1):
            try:
                _load(entry)
            except LoRAFormatError as error:
                problems.append(Problem(entry.path, str(error)))
            if progress is not None:
                progress(done, len(self.entries))
        return sorted(problems, key=lambda problem: str(problem.path))


def _load(entry: PoolEntry) -> LoRA:
    # Imported here so that listing a pool does not need torch.
    from autolora.lora.lora import LoRA

    lora = LoRA.load(entry.path)
    lora.name = entry.name
    return lora
