"""Finding the same LoRA under two names.

Files are compared from their ends: two LoRAs of one trainer share size and header, but hardly the
last kilobytes of their weights, so that telling them apart costs a short read.
"""

import hashlib
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from autolora.adapters.reader import open_file, read_header
from autolora.adapters.scan import PoolEntry
from autolora.errors import LoRAFormatError

MAX_HEADER_DIFFERENCE = 4 << 20
"""Files whose sizes differ by more are not taken for one LoRA with two headers."""
_TAIL = 1 << 12
_CHUNK = 1 << 20


def same_bytes(a: PoolEntry, b: PoolEntry) -> bool:
    """Tell whether two files have the same bytes.

    Args:
        a: A file.
        b: Another one.

    Returns:
        False as well where one of them cannot be read.
    """
    return a.size == b.size and _same_from(a, b, 0, 0)


def same_weights(a: PoolEntry, b: PoolEntry) -> bool:
    """Tell whether two safetensors files have the same data behind their headers.

    Args:
        a: A file.
        b: Another one.

    Returns:
        False as well where one of them cannot be read.
    """
    if abs(a.size - b.size) > MAX_HEADER_DIFFERENCE:
        return False
    starts = _ends(a)[0], _ends(b)[0]
    if min(starts) < 8 or a.size - starts[0] != b.size - starts[1]:
        return False
    return _same_from(a, b, *starts)


def find_twins(entry: PoolEntry, others: Iterable[PoolEntry]) -> Iterator[tuple[PoolEntry, bool]]:
    """Find the files that hold the same weights as a safetensors file.

    Opens each file of about the same size once, and reads further only where the ends agree.

    Args:
        entry: The file.
        others: Files to compare it with.

    Yields:
        A file with the same weights, and whether its header is the same as well.
    """
    start, tail = _ends(entry)
    for other in others:
        if abs(entry.size - other.size) > MAX_HEADER_DIFFERENCE:
            continue
        other_start, other_tail = _ends(other)
        if entry.size - start != other.size - other_start or tail != other_tail:
            continue
        if same_bytes(entry, other):
            yield other, True
        elif same_weights(entry, other):
            yield other, False


def weights_sha256(path: Path) -> str:
    """Hash the data of a safetensors file without its header, which people edit.

    Args:
        path: The file.

    Returns:
        SHA-256 as 64 hexadecimal digits; trainers store it as ``sshs_model_hash``.

    Raises:
        LoRAFormatError: The file cannot be read.
    """
    start = read_header(path).data_start
    digest = hashlib.sha256()
    with open_file(path) as file:
        file.seek(start)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def find_duplicates(entries: Iterable[PoolEntry]) -> list[list[str]]:
    """Group LoRAs that have the same weights, by reading all files.

    Args:
        entries: Files of a pool.

    Returns:
        Groups of two or more names, sorted; files that cannot be read are left out.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for entry in entries:
        try:
            groups[weights_sha256(entry.path)].append(entry.name)
        except (LoRAFormatError, OSError):
            continue
    return sorted(sorted(names) for names in groups.values() if len(names) > 1)


def _ends(entry: PoolEntry) -> tuple[int, bytes]:
    """Where the data of a file begins, and its last kilobytes; -1 where it has none."""
    try:
        with open_file(entry.path) as file:
            start = file.read(8)
            data_start = 8 + struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if not 8 <= data_start <= entry.size:
                return -1, b""
            file.seek(max(data_start, entry.size - _TAIL))
            return data_start, file.read(_TAIL)
    except (LoRAFormatError, OSError):
        return -1, b""


def _same_from(a: PoolEntry, b: PoolEntry, start_a: int, start_b: int) -> bool:
    try:
        with open_file(a.path) as file_a, open_file(b.path) as file_b:
            file_a.seek(start_a)
            file_b.seek(start_b)
            while chunk := file_a.read(_CHUNK):
                if file_b.read(_CHUNK) != chunk:
                    return False
            return not file_b.read(1)
    except (LoRAFormatError, OSError):
        return False
