"""A card that is not there, and files of true size that take no room.

Tensors on the card are torch's fake ones: every operation checks shapes, types and that all its
inputs are on one device, and nothing is computed. What they would take is counted, and can be asked
for as ``torch.cuda`` tells it of a real card. Only what is below torch's functions is replaced.
"""

from __future__ import annotations

import json
import struct
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autolora.safetensors_io import read_headers

GIB = 1 << 30
CONTEXT = GIB // 2
"""What a card's driver takes for itself."""


class Count(TorchDispatchMode):
    """Bytes of the tensors that live on each kind of device: now, and at most so far."""

    def __init__(self) -> None:
        super().__init__()
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        output = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return output

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak = Counter(self.now)

    def _note(self, tensor: Tensor) -> None:
        storage, device = tensor.untyped_storage(), tensor.device.type
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now[device] += size
        self.peak[device] = max(self.peak[device], self.now[device])
        weakref.finalize(storage, self._gone, key, device, size)

    def _gone(self, key: int, device: str, size: int) -> None:
        self._known.discard(key)
        self.now[device] -= size


def answer(
    monkeypatch: pytest.MonkeyPatch,
    total: int,
    count: Count | None = None,
    capability: tuple[int, int] = (8, 9),
) -> None:
    """Let ``torch.cuda`` tell of a card of ``total`` bytes, of which those counted are in use.

    The machine has 64 GiB beside it.
    """
    from autolora import doctor
    from autolora.families import loading
    from autolora.runtime import hardware

    def memory(device: Any = None) -> tuple[int, int]:
        used = 0 if count is None else count.now["cuda"]
        return total - CONTEXT - used, total

    for module in (doctor, loading):
        monkeypatch.setattr(module, "machine_memory", lambda: (64 * GIB, 60 * GIB))
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "mem_get_info": memory,
        "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: "Pretended card",
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(hardware, "_keeps_float8", lambda device: True)


@contextmanager
def card(
    monkeypatch: pytest.MonkeyPatch, total: int, capability: tuple[int, int] = (8, 9)
) -> Iterator[Count]:
    """Pretend a card of ``total`` bytes; models load onto it and run, and give fake tensors."""
    from autolora.runtime import storage as build

    count = Count()
    answer(monkeypatch, total, count, capability)
    # Torch's fake mode would set up a card that is there.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(build, "DiskMap", FakeFiles)
    # Fake parameters can be neither swapped in place nor copied through their memory.
    monkeypatch.setattr(torch.nn.Module, "_apply", _apply)
    monkeypatch.setattr(FakeTensor, "__deepcopy__", _deepcopy, raising=False)
    # The general form would be taken, which keeps the whole table of attention; a card's does not.
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v, attn_mask=None, **options: torch.empty_like(q),
    )
    with FakeTensorMode(allow_non_fake_inputs=True), count:
        yield count


class FakeFiles:
    """Tensors of the shapes and types that the files say."""

    def __init__(self, files: Sequence[str], device: str) -> None:
        self._tensors = read_headers([Path(file) for file in files])

    def __getitem__(self, name: str) -> Tensor:
        types = {"BF16": torch.bfloat16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}
        info = self._tensors[name]
        return torch.empty(info.shape, dtype=types[info.dtype])


def _apply(self: torch.nn.Module, function: Any, recurse: bool = True) -> torch.nn.Module:
    for child in self.children():
        child._apply(function)
    for name, parameter in self._parameters.items():
        if parameter is not None:
            self._parameters[name] = torch.nn.Parameter(function(parameter), requires_grad=False)
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = function(buffer)
    return self


def _deepcopy(self: Tensor, memo: dict[int, Any]) -> Tensor:
    copy = self.detach().clone()
    if isinstance(self, torch.nn.Parameter):
        copy = torch.nn.Parameter(copy, requires_grad=False)
    return memo.setdefault(id(self), copy)


def write_hollow(path: Path, shapes: Mapping[str, Sequence[int]]) -> Path:
    """Write a bfloat16 checkpoint whose data is one hole: of full length, and no bytes on disk."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(entries).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)
    return path
