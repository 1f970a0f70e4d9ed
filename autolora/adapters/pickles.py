"""Reading pickles (.pt, .ckpt, .bin) when a user insists, to turn them into safetensors.

A pickle is a program: opening one can do anything. They are read only on request, only through
``torch.load(weights_only=True)``, which runs no code of the file in torch 2.6 and later
(https://github.com/advisories/GHSA-53q9-r3pm-6pq6), and only when they hold plain tensors that are
really in the file.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autolora.adapters.reader import PICKLE_STARTS, open_file
from autolora.errors import LoRAFormatError, shown

WRAPPERS = ("state_dict", "lora", "lora_state_dict", "model", "weights", "module")
"""Keys under which training programs put the tensors."""

_DTYPES = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16}
    | {torch.float8_e4m3fn, torch.float8_e5m2, torch.bool, torch.uint8}
    | {torch.int64, torch.int32, torch.int16, torch.int8}
)


def is_pickle(path: Path) -> bool:
    """Tell whether a file begins as ``torch.save`` writes them.

    Args:
        path: The file.

    Returns:
        True for archives and plain pickles.

    Raises:
        LoRAFormatError: The file cannot be opened.
    """
    with open_file(path) as file:
        start = file.read(16)
    # A safetensors header of 512 or 1,024 bytes looks like the start of a pickle, but for this.
    return start.startswith(PICKLE_STARTS) and start[8:9] != b"{"


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a pickle.

    Args:
        path: A file that `is_pickle`.

    Returns:
        Contiguous CPU tensors by key; numbers become tensors.

    Raises:
        LoRAFormatError: It holds anything but named tensors, or claims more than is in it.
    """
    with open_file(path) as file:
        size = file.seek(0, 2)
    if zipfile.is_zipfile(path):
        _check_archive(path, size)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # The unpickler refuses with many kinds of error, and damaged files give yet others.
        raise _refused(
            path,
            "holds more than plain tensors, or is damaged; ask its author for a safetensors file",
        ) from error
    entries = _entries(path, loaded)
    tensors = {key: _tensor(path, key, value) for key, value in entries.items()}
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > size:
        raise _refused(path, "claims tensors larger than the file; do not use it")
    return {key: tensor.contiguous().clone() for key, tensor in tensors.items()}


def convert_pickle(path: Path, target: Path) -> None:
    """Write the tensors of a pickle as a safetensors file.

    Args:
        path: The pickle.
        target: The file to write; replaced if there is one.

    Raises:
        LoRAFormatError: The pickle cannot be used.
        OSError: The file cannot be written.
    """
    from safetensors.torch import save_file

    name = path.name.encode("utf-8", "backslashreplace").decode()
    save_file(read_pickle(path), target, metadata={"converted_from": name})


def _check_archive(path: Path, size: int) -> None:
    """Refuse archives that grow when read: ``torch.save`` neither packs nor shares members."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise _refused(path, "is damaged; download it again") from error
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise _refused(path, "is packed, as no training program writes it; do not use it")
    if sum(member.file_size for member in members) > size:
        raise _refused(path, "claims more data than it holds; do not use it")


def _entries(path: Path, loaded: object) -> Mapping[str, Any]:
    """Find the table of tensors, which may be wrapped in others."""
    for _ in range(3):
        if not isinstance(loaded, dict):
            break
        inner = [loaded[key] for key in WRAPPERS if isinstance(loaded.get(key), dict)]
        if not inner:
            break
        loaded = inner[0]
    if not isinstance(loaded, dict) or not loaded:
        raise _refused(path, "holds no table of named tensors; use a LoRA made for FLUX.1")
    for key in loaded:
        if not isinstance(key, str) or key == "__metadata__":
            raise _refused(path, f"names a tensor {shown(key, 60)!r}; use a LoRA made for FLUX.1")
    return loaded


def _tensor(path: Path, key: str, value: object) -> Tensor:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**63:
        return torch.tensor(value)
    plain = type(value) in (Tensor, torch.nn.Parameter)
    if not plain or value.layout != torch.strided or value.dtype not in _DTYPES:  # type: ignore
        raise _refused(
            path, f"holds something else than a plain tensor at {shown(key)!r}; convert it yourself"
        )
    assert isinstance(value, Tensor)
    if value.device.type != "cpu":
        raise _refused(path, f"keeps no data of {shown(key)!r}; ask its author for the weights")
    return value.detach()


def _refused(path: Path, problem: str) -> LoRAFormatError:
    return LoRAFormatError(f"{shown(path)} is a pickle that {problem}.")
