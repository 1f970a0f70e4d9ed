"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(target: Path, suffix: str = ".part") -> Iterator[Path]:
    """Give a temporary file beside the target, which takes its place when all went well.

    Args:
        target: The file; one of this name is replaced. Its folder is made where it is missing.
        suffix: Of the temporary file's name, for programs that go by it.

    Yields:
        The temporary file, empty.

    Raises:
        OSError: It cannot be written; nothing is left behind, and a file that was there stays.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(
        dir=target.parent, prefix=f".{target.stem[:40]}.", suffix=suffix
    )
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp makes the file private to its owner
        temporary.replace(target)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
