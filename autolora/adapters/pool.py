"""A folder of LoRAs."""

import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from autolora.adapters.metadata import Metadata
from autolora.errors import LoRAFormatError, PoolError, shown

if TYPE_CHECKING:
    from autolora.adapters.lora import LoRA

DEFAULT_CACHE_BYTES = 2 << 30
_SUFFIX = ".safetensors"
_OTHER_WEIGHTS = frozenset({".pt", ".pth", ".ckpt", ".bin", ".gguf"})


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


class Pool:
    """The LoRA files in a folder and the folders below it.

    Making one only lists files; a file is opened when it is asked for, and one that cannot be used
    does not disturb the others.

    Attributes:
        folder: The pool's folder.
        entries: Its LoRA files, sorted by name.
    """

    folder: Path
    entries: list[PoolEntry]

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
        self._cache_bytes = cache_bytes
        self._cache: OrderedDict[str, tuple[PoolEntry, LoRA]] = OrderedDict()
        self._lock = threading.Lock()
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
        files, self._scan_problems = _scan(self.folder)
        if not files:
            hint = f" ({self._scan_problems[0].reason})" if self._scan_problems else ""
            raise PoolError(
                f"LoRA pool {shown(self.folder)} has no .safetensors file that can be used{hint}; "
                "put some in it, or name another folder."
            )
        self.entries = _name_entries(self.folder, files)
        self._by_name = {entry.name: entry for entry in self.entries}

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
            name: Its name in the pool.

        Returns:
            The entry.

        Raises:
            PoolError: No LoRA has this name; the message suggests some that have a like one.
        """
        entry = self._by_name.get(name)
        if entry is None:
            folded = {known.casefold(): known for known in self._by_name}
            close = get_close_matches(name.casefold(), folded, n=3, cutoff=0.5)
            hint = (
                f"did you mean {', '.join(shown(folded[match]) for match in close)}?"
                if close
                else "`autolora pool list` shows the names."
            )
            raise PoolError(
                f"No LoRA named {shown(name)!r} in pool {shown(self.folder)} "
                f"({len(self)} LoRAs); {hint}"
            )
        return entry

    def load(self, name: str) -> "LoRA":
        """Load a LoRA, or take it from the cache when its file has not changed.

        Args:
            name: Its name in the pool.

        Returns:
            The adapter, under its name in the pool.

        Raises:
            PoolError: No LoRA has this name.
            LoRAFormatError: Its file cannot be used.
        """
        entry = _restat(self.entry(name))
        with self._lock:
            cached = self._cache.get(name)
            if cached is not None and cached[0] == entry:
                self._cache.move_to_end(name)
                return cached[1]
        lora = _load(entry)
        with self._lock:
            self._cache[name] = (entry, lora)
            self._cache.move_to_end(name)
            self._trim()
        return lora

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

    def check(self) -> list[Problem]:
        """Open every file and list those that cannot be used.

        Returns:
            Files with the reason, sorted by path; empty when all is well.
        """
        problems = list(self._scan_problems)
        for entry in self.entries:
            try:
                _load(entry)
            except LoRAFormatError as error:
                problems.append(Problem(entry.path, str(error)))
        return sorted(problems, key=lambda problem: str(problem.path))

    def _trim(self) -> None:
        """Forget the adapters used longest ago until the rest fits; the newest always stays."""
        total = sum(lora.nbytes for _, lora in self._cache.values())
        while total > self._cache_bytes and len(self._cache) > 1:
            _, (_, oldest) = self._cache.popitem(last=False)
            total -= oldest.nbytes


def _load(entry: PoolEntry) -> "LoRA":
    # Imported here so that listing a pool does not need torch.
    from autolora.adapters.lora import LoRA

    lora = LoRA.load(entry.path)
    lora.name = entry.name
    return lora


def _restat(entry: PoolEntry) -> PoolEntry:
    try:
        stat = entry.path.stat()
    except OSError as error:
        raise PoolError(
            f"{shown(entry.path)} is gone from the pool; list the pool again."
        ) from error
    return PoolEntry(entry.name, entry.path, stat.st_size, stat.st_mtime_ns)


def _scan(folder: Path) -> tuple[list[Path], list[Problem]]:
    """Find LoRA files below a folder, and what looks like one but must not be opened."""
    files: list[Path] = []
    problems: list[Problem] = []
    root = folder.resolve()

    def unreadable(error: OSError) -> None:
        problems.append(Problem(Path(error.filename), f"{shown(error.filename)} cannot be listed."))

    for parent, folders, names in os.walk(folder, onerror=unreadable):
        here = Path(parent)
        problems += [
            problem
            for name in folders
            if (here / name).is_symlink() and (problem := _leaving(root, here / name))
        ]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            file = here / name
            problem = _file_problem(root, file)
            if problem is not None:
                problems.append(problem)
            elif file.suffix.lower() == _SUFFIX:
                files.append(file)
    return files, problems


def _file_problem(root: Path, file: Path) -> Problem | None:
    suffix = file.suffix.lower()
    if suffix in _OTHER_WEIGHTS:
        return Problem(file, f"{shown(file)} is not a safetensors file; only those are read.")
    if suffix != _SUFFIX:
        return None
    if file.is_symlink() and (problem := _leaving(root, file)):
        return problem
    if not file.is_file():
        return Problem(file, f"{shown(file)} is not a file that can be read.")
    return None


def _leaving(root: Path, link: Path) -> Problem | None:
    try:
        inside = link.resolve().is_relative_to(root)
    except (OSError, RuntimeError):
        inside = False
    if inside:
        return None
    return Problem(
        link, f"{shown(link)} is a link that leaves the pool; put the files themselves in the pool."
    )


def _name_entries(folder: Path, files: list[Path]) -> list[PoolEntry]:
    stems = Counter(file.stem for file in files)
    entries: dict[str, PoolEntry] = {}
    for file in files:
        inside = file.relative_to(folder).with_suffix("").as_posix()
        try:
            stat = file.stat()
        except OSError:
            # Deleted since it was listed.
            continue
        name = file.stem if stems[file.stem] == 1 else inside
        if name in entries:
            # Two spellings of the suffix, as in style.safetensors and style.SAFETENSORS.
            name = file.relative_to(folder).as_posix()
        entries[name] = PoolEntry(name, file, stat.st_size, stat.st_mtime_ns)
    return [entries[name] for name in sorted(entries)]
