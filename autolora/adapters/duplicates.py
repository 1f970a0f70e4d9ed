"""Finding the same LoRA under two names.

Files are compared from their ends: two LoRAs of one trainer share size and header, but hardly the
last kilobytes of their weights, so that telling them apart costs two short reads.
"""

import hashlib
import os
import struct
from collections import defaultdict
from collections.abc import Iterable
from io import BufferedReader
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
    starts = _data_start(a.path), _data_start(b.path)
    if not 8 <= starts[0] < a.size or a.size - starts[0] != b.size - starts[1]:
        return False
    return _same_from(a, b, *starts)


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


def _data_start(path: Path) -> int:
    try:
        with open_file(path) as file:
            start = file.read(8)
    except (LoRAFormatError, OSError):
        return -1
    return 8 + struct.unpack("<Q", start)[0] if len(start) == 8 else -1


def _same_from(a: PoolEntry, b: PoolEntry, start_a: int, start_b: int) -> bool:
    try:
        with open_file(a.path) as file_a, open_file(b.path) as file_b:
            tail = -min(_TAIL, a.size - start_a)
            if _read_tail(file_a, tail) != _read_tail(file_b, tail):
                return False
            file_a.seek(start_a)
            file_b.seek(start_b)
            while chunk := file_a.read(_CHUNK):
                if file_b.read(_CHUNK) != chunk:
                    return False
            return not file_b.read(1)
    except (LoRAFormatError, OSError):
        return False


def _read_tail(file: BufferedReader, tail: int) -> bytes:
    file.seek(tail, os.SEEK_END)
    return file.read()
