"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path


def write_whole(target: Path, data: bytes) -> None:
    """Write a file through a temporary one beside it; its folder is made where it is missing.

    Args:
        target: The file; one of this name is replaced.
        data: What shall be in it.

    Raises:
        OSError: It cannot be written; nothing is left behind, and a file that was there stays.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as part:
            part.write(data)
        os.chmod(temporary, 0o644)  # mkstemp makes the file private to its owner
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
