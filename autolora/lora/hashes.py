"""LoRAs of a pool by the hashes that pictures carry.

Programs name a LoRA by the beginning of the SHA-256 of its file (Civitai's AutoV2, ComfyUI's
savers, Fooocus) or of its tensor data alone (A1111's ``Lora hashes``, Civitai's AutoV3, SwarmUI),
which stays the same when somebody edits the header.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterable
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autolora.lora.pool import Pool, PoolEntry

FEWEST_DIGITS = 8
"""Of a hash that tells files apart."""
MAX_HASHED_BYTES = 8 << 30
"""Most bytes that are read in search of a hash, beside files whose name fits."""
_CHUNK_BYTES = 1 << 20


def clean_hash(text: object) -> str:
    """A hash in lower-case digits without ``0x`` or ``sha256:``; empty where it is none."""
    plain = str(text).strip().lower().removeprefix("sha256:").removeprefix("0x")
    return plain if re.fullmatch(rf"[0-9a-f]{{{FEWEST_DIGITS},64}}", plain) else ""


def has_hash(entry: PoolEntry, digits: str) -> bool:
    """Tell whether a file is the one of a hash.

    Args:
        entry: A file of a pool.
        digits: The hash, or its beginning, of file or tensor data.
    """
    try:
        hashes = _hashes(os.fspath(entry.path), entry.size, entry.mtime_ns)
    except OSError:
        return False
    return any(known.startswith(digits) for known in hashes)


def find_by_hash(
    pool: Pool,
    digits: str,
    likely: Iterable[PoolEntry] = (),
    besides: Collection[str] = (),
) -> PoolEntry | None:
    """Find the file of a hash.

    Files are read once as long as they do not change, at most `MAX_HASHED_BYTES` in a search.

    Args:
        pool: The pool.
        digits: At least `FEWEST_DIGITS` hexadecimal digits.
        likely: Files to look at first.
        besides: Names of files that do not count.

    Returns:
        The file, or None.
    """
    first = list(likely)
    known = {entry.name for entry in first}
    left = MAX_HASHED_BYTES
    for entry in [*first, *(entry for entry in pool if entry.name not in known)]:
        if entry.name in besides:
            continue
        if entry.name not in known:
            left -= entry.size
            if left < 0:
                return None
        if has_hash(entry, digits):
            return entry
    return None


@lru_cache(maxsize=1 << 16)
def _hashes(path: str, size: int, mtime_ns: int) -> tuple[str, str]:
    """SHA-256 of a file and of what follows its header; size and time are those of the content."""
    whole, data = hashlib.sha256(), hashlib.sha256()
    with open(path, "rb") as file:
        start = file.read(8)
        header = file.read(min(int.from_bytes(start, "little"), size))
        whole.update(start + header)
        while chunk := file.read(_CHUNK_BYTES):
            whole.update(chunk)
            data.update(chunk)
    return whole.hexdigest(), data.hexdigest()
