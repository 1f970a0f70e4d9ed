"""What a LoRA file is worth: whether it can be used, what was not, and what is known about it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autolora.adapters.covers import check_picture
from autolora.adapters.metadata import Metadata
from autolora.adapters.scan import PoolEntry
from autolora.errors import LoRAFormatError

if TYPE_CHECKING:
    from autolora.adapters.report import LoadReport


@dataclass(frozen=True)
class FileCheck:
    """What was found out about one file.

    Attributes:
        name: Its name in the pool, or file stem.
        path: The file.
        problem: Why it cannot be used, as one sentence; empty when it can.
        report: What became of its keys; None when it cannot be used.
        metadata: What header and sidecars say; None when it cannot be used.
        notes: What is odd without making it useless, one sentence each.
    """

    name: str
    path: Path
    problem: str = ""
    report: "LoadReport | None" = None
    metadata: Metadata | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with every key that was matched or dropped."""
        return {
            "name": self.name,
            "path": str(self.path),
            "usable": not self.problem,
            "problem": self.problem,
            "report": None if self.report is None else self.report.to_dict(),
            "metadata": None if self.metadata is None else self.metadata.to_dict(),
            "notes": list(self.notes),
        }


def check_file(path: Path, name: str | None = None, deep: bool = False) -> FileCheck:
    """Open a LoRA file and find out what is in it.

    Args:
        path: The file.
        name: Its name; the stem when None.
        deep: Also look into its pictures, and whether it changes anything.

    Returns:
        What was found; a file that cannot be used has a `problem` and raises nothing.
    """
    from autolora.adapters.lora import LoRA

    name = path.stem if name is None else name
    try:
        report = LoRA.load(path).report
    except LoRAFormatError as error:
        return FileCheck(name, path, str(error))
    metadata = Metadata.read(path)
    notes = list(metadata.warnings)
    if deep:
        notes += filter(None, map(check_picture, metadata.covers))
        if report.norm == 0:
            notes.append("It changes nothing: all its weight changes are zero.")
    return FileCheck(name, path, "", report, metadata, tuple(notes))


def check_entries(entries: Sequence[PoolEntry], deep: bool = False) -> Iterator[FileCheck]:
    """Check the files of a pool one by one; none of them stays in memory.

    Args:
        entries: The files.
        deep: As for `check_file`.

    Yields:
        What was found out about each, in order.
    """
    for entry in entries:
        yield check_file(entry.path, entry.name, deep)
