"""Headers of checkpoint files: names, shapes and whether the file is whole. Needs no torch."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from autolora.errors import ConfigError, shown

MAX_HEADER_BYTES = 100_000_000
"""Longest header that safetensors itself accepts."""

_FLOATING = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})

_OTHER_SUFFIXES: Mapping[str, str] = {
    ".gguf": "a GGUF file",
    ".ckpt": "a pickle, which can run code when it is read",
    ".pt": "a pickle, which can run code when it is read",
    ".pth": "a pickle, which can run code when it is read",
    ".bin": "a pickle, which can run code when it is read",
    ".incomplete": "a download that has not ended",
    ".part": "a download that has not ended",
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint.

    Attributes:
        dtype: The format's name of the element type, such as ``BF16``.
        shape: Sizes of its dimensions.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def floating(self) -> bool:
        """Whether its elements are floating point numbers."""
        return self.dtype in _FLOATING


def read_headers(paths: Iterable[Path]) -> dict[str, TensorInfo]:
    """Read the headers of the files that make up one checkpoint.

    Args:
        paths: A file, or all shards.

    Returns:
        Tensors by name.

    Raises:
        ConfigError: A file is missing, incomplete or not safetensors.
    """
    tensors: dict[str, TensorInfo] = {}
    for path in paths:
        tensors.update(read_header(path))
    return tensors


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read a safetensors header and compare it with the size of the file.

    Args:
        path: The file.

    Returns:
        Tensors by name.

    Raises:
        ConfigError: The file is missing, incomplete or not safetensors.
    """
    kind = _OTHER_SUFFIXES.get(path.suffix.lower())
    if kind is not None:
        raise ConfigError(
            f"{shown(path)} is {kind}; give the .safetensors file of this checkpoint instead."
        )
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if start[:4] == b"GGUF":
                raise _not_safetensors(path, "a GGUF file")
            if start[:1] in (b"<", b"v") and length > MAX_HEADER_BYTES:
                raise _not_safetensors(path, "a web page or a Git LFS pointer")
            raw = file.read(length) if 2 <= length <= MAX_HEADER_BYTES else b""
    except OSError as error:
        reason = shown(error.strerror or error)
        raise ConfigError(f"The checkpoint {shown(path)} cannot be read: {reason}.") from error
    if len(start) < 8 or (length <= MAX_HEADER_BYTES and len(raw) < length):
        raise _incomplete(path, size, None)
    try:
        entries = json.loads(raw)
        entries.pop("__metadata__", None)
        tensors = {name: TensorInfo(e["dtype"], tuple(e["shape"])) for name, e in entries.items()}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _not_safetensors(path, "not safetensors") from error
    expected = 8 + length + end
    if size < expected:
        raise _incomplete(path, size, expected)
    if not tensors:
        raise ConfigError(f"The checkpoint {shown(path)} holds no tensors; download it again.")
    return tensors


def _not_safetensors(path: Path, what: str) -> ConfigError:
    return ConfigError(
        f"The checkpoint {shown(path)} is {what}; download the .safetensors file again."
    )


def _incomplete(path: Path, size: int, expected: int | None) -> ConfigError:
    whole = f"{gigabytes(size)} of {gigabytes(expected)}" if expected else gigabytes(size)
    return ConfigError(
        f"The checkpoint {shown(path)} is incomplete ({whole} are there); download it again."
    )


def gigabytes(count: float) -> str:
    """Show a number of bytes in decimal units, as file managers and hubs do."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"
