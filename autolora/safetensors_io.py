"""Strict reading of safetensors files.

Every entry of the header is checked before data is read, so that every damage has one clear
sentence. Layout of the format: 8 bytes header length (unsigned, little-endian), a JSON header, then
the data (https://github.com/huggingface/safetensors). Data is copied, not mapped: people copy new
files over old ones, which changes or ends a program that has the old one mapped.

Of base models only the headers are read here: names, shapes, whether the file is whole, and a
`Recipe` of what each tensor of a module is made of. Nothing in this module but `read_tensors` and
`cook` needs torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autolora.errors import ConfigError, LoRAFormatError, shown

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER_BYTES = 32 << 20
"""Longest header that is parsed; real ones, with pictures in them, have a few MB."""
MAX_HEADER_ITEMS = 1_000_000
"""Most commas and brackets in a header: bounds the memory that decoding it takes."""
MAX_DIMENSIONS = 32
MAX_FEATURES = 1 << 16
"""Most input or output channels of a layer that are believed; FLUX.1 has 21,504 at most."""
LARGEST_VALUE = 1e6
"""Largest magnitude of a weight or alpha that is believed; products of several stay finite."""
_HASH_CHUNK_BYTES = 1 << 20

DTYPE_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}
_TORCH_DTYPES: Mapping[str, str] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
}
NUMBER_DTYPES = frozenset(_TORCH_DTYPES)
FLOAT_DTYPES = frozenset(name for name in NUMBER_DTYPES if name[0] in "FB")

PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""First bytes of the archives and plain pickles that ``torch.save`` writes."""

_FOREIGN_STARTS: tuple[tuple[bytes, str], ...] = (
    (b"GGUF", "a GGUF file"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
    (b"<", "a web page, as a failed download leaves"),
    (b"{", "JSON text"),
)


@dataclass(frozen=True)
class TensorInfo:
    """One entry of a safetensors header.

    Attributes:
        dtype: The format's name of the element type, such as ``BF16``.
        shape: Sizes of the tensor's dimensions.
        begin: Where its data begins, in bytes after the header.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def floating(self) -> bool:
        """Whether its elements are floating point numbers."""
        return self.dtype in FLOAT_DTYPES


@dataclass(frozen=True)
class Header:
    """The checked header of a safetensors file.

    Attributes:
        metadata: Free text entries (``__metadata__``).
        tensors: Element type, shape and place by key, in the order of the header.
        data_start: Where the data begins, in bytes after the start of the file.
        stamp: The file as it was when the header was read; `read_tensors` compares it.
    """

    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]
    data_start: int
    stamp: FileStamp | None = None


@dataclass(frozen=True)
class FileStamp:
    """What tells one version of a file from another without reading it.

    Attributes:
        device: Device that holds the file.
        inode: Its number there.
        size: Its size in bytes.
        mtime_ns: When it was last written, in nanoseconds since 1970.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, file: BufferedReader) -> FileStamp:
        """Read the stamp of an open file."""
        found = os.fstat(file.fileno())
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def open_file(path: Path) -> BufferedReader:
    """Open a file, and only a file: a pipe would block and a device may never end.

    Args:
        path: The file.

    Returns:
        The open file; its user closes it.

    Raises:
        LoRAFormatError: It does not exist, is no regular file, or must not be read.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        if os.name == "nt" and path.is_dir():
            raise IsADirectoryError
        file = open(path, "rb", opener=lambda name, _: os.open(name, flags))  # noqa: SIM115
    except FileNotFoundError as error:
        raise _unusable(path, "does not exist; check the path") from error
    except IsADirectoryError as error:
        raise _unusable(path, "is a folder; name a .safetensors file in it") from error
    except PermissionError as error:
        raise _unusable(path, "must not be read by you; change its permissions") from error
    except (OSError, ValueError) as error:
        raise _unusable(path, f"cannot be opened: {_why(error)}") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise _unusable(path, "is a pipe or device, not a file; name a .safetensors file")
    return file


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Args:
        path: The file.

    Returns:
        Its metadata and tensor entries.

    Raises:
        LoRAFormatError: The file cannot be read or is not a whole, valid safetensors file.
    """
    with open_file(path) as file:
        stamp = FileStamp.of(file)
        try:
            raw = _read_header_bytes(path, file, stamp.size)
        except OSError as error:
            raise _unusable(path, f"cannot be read: {_why(error)}") from error
    entries = _parse_json(path, raw)
    metadata = _check_metadata(path, entries.pop("__metadata__", {}))
    spans: list[tuple[int, int, str]] = []
    tensors: dict[str, TensorInfo] = {}
    for key, entry in entries.items():
        tensors[key], end = _check_entry(path, key, entry)
        spans.append((tensors[key].begin, end, key))
    _check_spans(path, spans, stamp.size - 8 - len(raw))
    return Header(metadata, tensors, 8 + len(raw), stamp)


def read_tensors(path: Path, header: Header, keys: Iterable[str]) -> dict[str, Tensor]:
    """Read tensors of a file.

    Args:
        path: The file.
        header: What `read_header` gave for it.
        keys: Keys of the tensors wanted, of dtypes in `NUMBER_DTYPES`.

    Returns:
        CPU tensors in the dtype of the file, by key.

    Raises:
        LoRAFormatError: The file cannot be read, or has changed since its header was read.
    """
    import torch

    tensors: dict[str, Tensor] = {}
    with open_file(path) as file:
        _check_unchanged(path, file, header)
        try:
            for key in sorted(keys, key=lambda key: header.tensors[key].begin):
                info = header.tensors[key]
                tensor = torch.empty(info.shape, dtype=getattr(torch, _TORCH_DTYPES[info.dtype]))
                raw = tensor.reshape(-1).view(torch.uint8).numpy()
                file.seek(header.data_start + info.begin)
                if file.readinto(raw.data) != raw.nbytes:
                    raise _changed(path)
                tensors[key] = tensor
        except OSError as error:
            raise _unusable(path, f"cannot be read: {_why(error)}") from error
        _check_unchanged(path, file, header)
    return tensors


def file_sha256(path: Path) -> str:
    """Hash a whole file.

    Args:
        path: The file.

    Returns:
        SHA-256 as 64 hexadecimal digits.

    Raises:
        LoRAFormatError: The file cannot be read.
    """
    digest = hashlib.sha256()
    with open_file(path) as file:
        try:
            while chunk := file.read(_HASH_CHUNK_BYTES):
                digest.update(chunk)
        except OSError as error:
            raise _unusable(path, f"cannot be read: {_why(error)}") from error
    return digest.hexdigest()


def _unusable(path: Path, problem: str) -> LoRAFormatError:
    return LoRAFormatError(f"{shown(path)} {problem}.")


def _damaged(path: Path, problem: str) -> LoRAFormatError:
    return _unusable(path, f"is not a valid safetensors file: {problem}; download or save it again")


def _why(error: Exception) -> str:
    return shown(getattr(error, "strerror", None) or error)


def _changed(path: Path) -> LoRAFormatError:
    return _unusable(path, "changed while it was read; load it again when it is complete")


def _check_unchanged(path: Path, file: BufferedReader, header: Header) -> None:
    if header.stamp is not None and FileStamp.of(file) != header.stamp:
        raise _changed(path)


def _read_header_bytes(path: Path, file: BufferedReader, size: int) -> bytes:
    """Read the JSON bytes of a header."""
    start = file.read(32)
    _refuse_other_kinds(path, start, size)
    (length,) = struct.unpack("<Q", start[:8])
    if length > size - 8:
        raise _damaged(path, f"its header claims {length} bytes but only {size - 8} follow")
    if length > MAX_HEADER_BYTES:
        raise _damaged(path, f"its header has {length} bytes, more than {MAX_HEADER_BYTES}")
    file.seek(8)
    raw = file.read(length)
    if len(raw) != length:
        raise _changed(path)
    if sum(map(raw.count, (b",", b"[", b"{"))) > MAX_HEADER_ITEMS:
        raise _damaged(path, f"its header has more than {MAX_HEADER_ITEMS} items")
    return raw


def _refuse_other_kinds(path: Path, start: bytes, size: int) -> None:
    if size == 0:
        raise _unusable(path, "is empty; download or save it again")
    # A safetensors file may begin with any byte, so a header that would fit speaks first.
    fits = len(start) > 8 and start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] <= size - 8
    if start.startswith(PICKLE_STARTS) and not fits:
        raise _unusable(
            path,
            "is a pickle (.pt, .ckpt, .bin), which can run code when opened; get a .safetensors "
            "file, or convert it with `autolora pool add --allow-pickle`",
        )
    for magic, kind in _FOREIGN_STARTS:
        if start.startswith(magic) and not fits:
            raise _unusable(path, f"is {kind}; only safetensors files are read")
    if len(start) < 8:
        raise _damaged(path, f"it has only {size} bytes")


def _parse_json(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
            raise _damaged(path, f"its header names {shown(twice)!r} twice")
        return result

    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "its header is not JSON") from error
    if not isinstance(entries, dict):
        raise _damaged(path, "its header is not a JSON object")
    return entries


def _check_metadata(path: Path, metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict):
        raise _damaged(path, "__metadata__ is not a JSON object")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise _damaged(path, f"metadata {shown(key)!r} is not text")
    return metadata


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _check_entry(path: Path, key: str, entry: object) -> tuple[TensorInfo, int]:
    def bad(problem: str) -> LoRAFormatError:
        return _damaged(path, f"key {shown(key)!r} {problem}")

    if not isinstance(entry, dict):
        raise bad("has no entry of dtype, shape and data_offsets")
    dtype, shape, offsets = (entry.get(name) for name in ("dtype", "shape", "data_offsets"))
    width = DTYPE_BYTES.get(dtype) if isinstance(dtype, str) else None
    if width is None:
        raise bad(f"has unknown dtype {shown(dtype)!r}")
    if not isinstance(shape, list) or not all(map(_is_size, shape)):
        raise bad("has a shape that is not a list of sizes")
    if len(shape) > MAX_DIMENSIONS:
        raise bad(f"has {len(shape)} dimensions, more than {MAX_DIMENSIONS}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise bad("has data_offsets that are not two positions")
    begin, end = offsets
    # No tensor without values needs sizes whose product overflows.
    if math.prod(dim for dim in shape if dim) >= 2**63:
        raise bad(f"has a shape too large for any file, {shape}")
    expected = width * math.prod(shape)
    if end - begin != expected:
        raise bad(f"of shape {shape} and dtype {dtype} needs {expected} bytes, not {end - begin}")
    return TensorInfo(str(dtype), tuple(shape), begin), end


def _check_spans(path: Path, spans: list[tuple[int, int, str]], data_bytes: int) -> None:
    """Tensors must cover the data exactly: no gap, no overlap, nothing left over."""
    position = 0
    for begin, end, key in sorted(spans):
        if begin != position:
            fault = "overlaps the tensor before it" if begin < position else "leaves a gap"
            raise _damaged(path, f"key {shown(key)!r} {fault}")
        position = end
    if position > data_bytes:
        raise _unusable(
            path,
            f"is cut off: its tensors need {position} bytes and {data_bytes} are there; "
            "download it again",
        )
    if position < data_bytes:
        raise _damaged(path, f"{data_bytes - position} bytes follow the last tensor")


MAX_CHECKPOINT_HEADER_BYTES = 100_000_000
"""Longest header of a base model, the most that safetensors itself accepts."""

_OTHER_SUFFIXES: Mapping[str, str] = {
    ".gguf": "a GGUF file",
    ".ckpt": "a pickle, which can run code when it is read",
    ".pt": "a pickle, which can run code when it is read",
    ".pth": "a pickle, which can run code when it is read",
    ".bin": "a pickle, which can run code when it is read",
    ".incomplete": "a download that has not ended",
    ".part": "a download that has not ended",
}


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
        tensors.update(read_checkpoint_header(path))
    return tensors


def read_checkpoint_header(path: Path) -> dict[str, TensorInfo]:
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
            if start[:1] in (b"<", b"v") and length > MAX_CHECKPOINT_HEADER_BYTES:
                raise _not_safetensors(path, "a web page or a Git LFS pointer")
            raw = file.read(length) if 2 <= length <= MAX_CHECKPOINT_HEADER_BYTES else b""
    except OSError as error:
        reason = shown(error.strerror or error)
        raise ConfigError(f"The checkpoint {shown(path)} cannot be read: {reason}.") from error
    if len(start) < 8 or (length <= MAX_CHECKPOINT_HEADER_BYTES and len(raw) < length):
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


Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Recipe:
    """What one tensor is made of.

    Attributes:
        sources: Names in the file; several are put on top of each other.
        swap_halves: Whether the upper and lower half of the rows change places: diffusers keep
            the final modulation as scale and shift, BFL and DiffSynth as shift and scale.
        leading: How many dimensions of size 1 to put in front.
        trailing: How many dimensions of size 1 to put behind: 1 x 1 convolutions that are kept
            as linear layers. A negative number takes them away.
        part: Which of how many equal parts of the rows it is, counted from 0.
        transposed: Whether rows and columns change places.
    """

    sources: tuple[str, ...]
    swap_halves: bool = False
    leading: int = 0
    trailing: int = 0
    part: tuple[int, int] = (0, 1)
    transposed: bool = False


def shape_of(recipe: Recipe, tensors: Mapping[str, TensorInfo]) -> tuple[int, ...]:
    """Shape of what a recipe gives."""
    shapes = [tensors[name].shape for name in recipe.sources]
    joined = shapes[0]
    if len(shapes) > 1:
        joined = (sum(shape[0] for shape in shapes), *joined[1:])
    if recipe.part[1] > 1:
        joined = (joined[0] // recipe.part[1], *joined[1:])
    if recipe.transposed:
        joined = (joined[1], joined[0])
    if recipe.trailing < 0:
        joined = joined[: recipe.trailing]
    return (1,) * recipe.leading + joined + (1,) * recipe.trailing


def count_blocks(names: Iterable[str], blocks: str) -> int:
    """Number of blocks under a name, one more than the highest index.

    Args:
        names: Names of tensors.
        blocks: Dotted path of the list of blocks.
    """
    pattern = re.compile(re.escape(blocks) + r"\.(\d{1,5})\.")
    return max((int(m[1]) + 1 for name in names if (m := pattern.match(name))), default=0)


def cook(recipe: Recipe, read: Callable[[str], Tensor]) -> Tensor:
    """Make the tensor of a recipe.

    Args:
        recipe: The recipe.
        read: Gives a tensor of the file by name.
    """
    import torch

    parts = [read(name) for name in recipe.sources]
    tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
    if recipe.swap_halves:
        first, second = tensor.chunk(2)
        tensor = torch.cat((second, first))
    if recipe.part[1] > 1:
        tensor = tensor.chunk(recipe.part[1])[recipe.part[0]].contiguous()
    if recipe.transposed:
        tensor = tensor.T.contiguous()
    if recipe.trailing < 0:
        return tensor.reshape(tensor.shape[: recipe.trailing])
    for _ in range(recipe.leading):
        tensor = tensor[None]
    return tensor[(..., *(None,) * recipe.trailing)] if recipe.trailing else tensor
