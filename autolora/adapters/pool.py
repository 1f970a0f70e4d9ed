"""A folder of LoRAs."""

import os
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from autolora.adapters.cache import DEFAULT_CACHE_BYTES, AdapterCache
from autolora.adapters.metadata import Metadata
from autolora.adapters.scan import PoolEntry, Problem, scan
from autolora.errors import LoRAFormatError, PoolError, shown

if TYPE_CHECKING:
    from autolora.adapters.lora import LoRA


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
        return self.cache.load(self.entry(name).path, name)

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


def _load(entry: PoolEntry) -> "LoRA":
    # Imported here so that listing a pool does not need torch.
    from autolora.adapters.lora import LoRA

    lora = LoRA.load(entry.path)
    lora.name = entry.name
    return lora
