"""What a LoRA file is worth: whether it can be used, what was not, and what is known about it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autolora.adapters.covers import check_picture
from autolora.adapters.metadata import Metadata
from autolora.adapters.scan import PoolEntry
from autolora.errors import LoRAFormatError

if TYPE_CHECKING:
    from autolora.adapters.duplicates import Twin
    from autolora.adapters.lora import LoRA
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
        twin: The LoRA that it changes the same as, or nearly so, of those checked before it.
    """

    name: str
    path: Path
    problem: str = ""
    report: "LoadReport | None" = None
    metadata: Metadata | None = None
    notes: tuple[str, ...] = ()
    twin: "Twin | None" = None

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
            "twin": None if self.twin is None else self.twin.to_dict(),
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
    return _checked(path, path.stem if name is None else name, deep)[0]


def check_entries(
    entries: Sequence[PoolEntry], deep: bool = False, pool: Sequence[PoolEntry] = ()
) -> Iterator[FileCheck]:
    """Check files one by one; of those before, only a few numbers are kept.

    Args:
        entries: The files.
        deep: As for `check_file`, and also look for files that change the same.
        pool: Other files to look for the same in.

    Yields:
        What was found out about each, in order.
    """
    from autolora.adapters.duplicates import KnownLoRAs, PoolTwins, nearest

    known, owned = KnownLoRAs(), PoolTwins(pool)
    for entry in entries:
        found, lora = _checked(entry.path, entry.name, deep)
        if deep and lora is not None:
            twins = [known.add(entry.name, lora), *(t for _, t in owned.find(entry.path, lora))]
            found = replace(found, twin=nearest(twins))
        yield found


def _checked(path: Path, name: str, deep: bool) -> "tuple[FileCheck, LoRA | None]":
    """What was found out about a file, and what was loaded from it."""
    from autolora.adapters.lora import LoRA

    try:
        lora = LoRA.load(path)
    except LoRAFormatError as error:
        return FileCheck(name, path, str(error)), None
    metadata = Metadata.read(path)
    notes = list(metadata.warnings)
    if deep:
        notes += filter(None, map(check_picture, metadata.covers))
        report = lora.report
        others = report.biases or report.norms or report.text_encoders
        if report.norm == 0 and not others:
            notes.append("It changes nothing: all its weight changes are zero.")
    return FileCheck(name, path, "", lora.report, metadata, tuple(notes)), lora
