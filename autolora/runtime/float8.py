"""Linear layers that keep their weights in float8, fast on a CPU, too.

PyTorch widens float8 one number at a time, 0.15 G numbers a second, which takes longer than the
products of a small step. Here a C kernel does it (`float8.c`). A large weight is widened a block of
rows at a time, into a buffer that stays in the cache, and multiplied there by PyTorch: no widened
weight is kept, and no large one ever exists whole. Where there is no compiler, on a GPU, under
`torch.compile` and where gradients are wanted, DiffSynth's own way serves.
"""

from __future__ import annotations

import copy
import ctypes
import math
import threading
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffsynth.core import AutoWrappedLinear, AutoWrappedModule
from torch import Tensor, nn

from autolora.c_library import CLibrary

FLOAT8 = torch.float8_e4m3fn
FLOAT8_TYPES = (torch.float8_e4m3fn, torch.float8_e5m2)

BLOCK_BYTES = 2**21
"""Widened bytes per thread that are multiplied at once: what caches hold, and products like."""

_ROWS = 64  # of a block at least, and a block's rows are a multiple: what products like
_WIDE = (torch.float32, torch.bfloat16)


def _bind(library: ctypes.CDLL) -> None:
    pointer, number = ctypes.c_void_p, ctypes.c_int
    library.autolora_widen.argtypes = [pointer, pointer, ctypes.c_int64, number, number, number]
    library.autolora_widen.restype = None


def _agrees(library: ctypes.CDLL) -> bool:
    """Whether every number of both formats becomes what PyTorch makes of it, wherever it stands."""
    numbers = torch.arange(3 * 256 + 3, device="cpu").to(torch.uint8)
    for stored in map(numbers.view, FLOAT8_TYPES):
        for dtype in _WIDE:
            widened = torch.empty(stored.shape, dtype=dtype, device="cpu")
            convert(library, stored, widened, 1)
            if not torch.allclose(widened, stored.to(dtype), 0.0, 0.0, equal_nan=True):
                return False
    return True


def convert(library: ctypes.CDLL, stored: Tensor, widened: Tensor, threads: int) -> None:
    """Widen into memory that is there; both contiguous, of one size, on the CPU."""
    library.autolora_widen(
        stored.data_ptr(), widened.data_ptr(), stored.numel(),
        stored.dtype is torch.float8_e5m2, widened.dtype is torch.bfloat16, threads,
    )  # fmt: skip


KERNEL = CLibrary(Path(__file__).with_name("float8.c"), _bind, _agrees)


def widen(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float8 numbers in a wider type; exact.

    Args:
        stored: Of any shape; anything but float8 on a CPU goes PyTorch's way.
        dtype: The wider type.
    """
    widened = torch.empty_like(stored, dtype=dtype, memory_format=torch.contiguous_format)
    library = KERNEL.get() if _served(stored, dtype) else None
    if library is None:
        return widened.copy_(stored)
    convert(library, stored.contiguous(), widened, torch.get_num_threads())
    return widened


def _served(stored: Tensor, dtype: torch.dtype) -> bool:
    return stored.is_cpu and stored.dtype in FLOAT8_TYPES and dtype in _WIDE


class Float8Linear(AutoWrappedLinear):  # type: ignore[misc]
    """DiffSynth's ``AutoWrappedLinear`` with a way of its own for float8 on a CPU."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Return ``x @ widened weight.T + bias``, ``[..., in] -> [..., out]``."""
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        if (
            torch.compiler.is_compiling()
            or weight is None
            or not weight.is_cpu
            or not x.is_cpu
            or weight.dtype not in FLOAT8_TYPES
            or x.dtype not in _WIDE
            or x.dtype is not self.computation_dtype
            or not weight.is_contiguous()
            or self.lora_A_weights
            or torch.is_autocast_enabled("cpu")
            or (x.requires_grad and torch.is_grad_enabled())
        ):
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        library = KERNEL.get()
        if library is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        with torch.no_grad():  # the buffers are written again by the next layer
            return multiply(library, x, weight, bias)

    def cast_to(self, weight: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the weight in another type and place."""
        if torch.compiler.is_compiling() or str(device) != "cpu" or not _served(weight, dtype):
            return super().cast_to(weight, dtype, device)  # type: ignore[no-any-return]
        return widen(weight, dtype)


class Float8Module(AutoWrappedModule):  # type: ignore[misc]
    """DiffSynth's ``AutoWrappedModule``, whose copy for computing is widened by the kernel."""

    def cast_to(self, module: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """Return a copy of the module in another type and place."""
        if str(device) != "cpu":
            return super().cast_to(module, dtype, device)  # type: ignore[no-any-return]
        widened: dict[int, Any] = {
            id(p): nn.Parameter(widen(p.detach(), dtype), requires_grad=False)
            for p in module.parameters()
            if _served(p, dtype)
        }
        return copy.deepcopy(module, widened).to(dtype=dtype, device=device)


def multiply(library: ctypes.CDLL, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x @ weight.T + bias``, widening at most `BLOCK_BYTES` a thread at a time.

    Args:
        library: The kernel.
        x: ``[..., in]``, float32 or bfloat16, on a CPU.
        weight: ``[out, in]``, float8, contiguous.
        bias: ``[out]``, float8 or the type of ``x``.
    """
    threads = torch.get_num_threads()
    out, inner = weight.shape
    dtype = x.dtype
    if bias is not None and bias.dtype is not dtype:
        stored, bias = bias, _buffer("bias", (out,), dtype)
        _widen_into(library, stored, bias)
    rows = BLOCK_BYTES * threads // (inner * dtype.itemsize)
    if rows >= out:
        wide = _buffer("weight", (out, inner), dtype)
        convert(library, weight, wide, threads)
        return F.linear(x, wide, bias)
    rows = max(rows // _ROWS, 1) * _ROWS
    flat = x.reshape(-1, inner)
    y = torch.empty(flat.shape[0], out, dtype=dtype)
    for start in range(0, out, rows):
        end = min(start + rows, out)
        wide = _buffer("weight", (end - start, inner), dtype)
        convert(library, weight[start:end], wide, threads)
        if bias is None:
            torch.mm(flat, wide.T, out=y[:, start:end])
        else:
            torch.addmm(bias[start:end], flat, wide.T, out=y[:, start:end])
    return y.view(*x.shape[:-1], out)


def _widen_into(library: ctypes.CDLL, stored: Tensor, widened: Tensor) -> None:
    if stored.dtype in FLOAT8_TYPES:
        convert(library, stored.contiguous(), widened, 1)
    else:
        widened.copy_(stored)


class _Buffers(threading.local):
    """What a thread widens into: one piece of memory per use and type, seen in many shapes."""

    def __init__(self) -> None:
        self.memory: dict[tuple[str, torch.dtype], Tensor] = {}
        self.views: dict[tuple[str, tuple[int, ...], torch.dtype], Tensor] = {}


_buffers = _Buffers()


def _buffer(use: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    key = (use, shape, dtype)
    found = _buffers.views.get(key)
    if found is not None:
        return found
    with torch.inference_mode(False):
        return _new_buffer(key)


def _new_buffer(key: tuple[str, tuple[int, ...], torch.dtype]) -> Tensor:
    use, shape, dtype = key
    size = math.prod(shape)
    memory = _buffers.memory.get((use, dtype))
    if memory is None or memory.numel() < size:
        memory = torch.empty(size, dtype=dtype)
        _buffers.memory[use, dtype] = memory
        _buffers.views = {k: v for k, v in _buffers.views.items() if k[::2] != (use, dtype)}
    view = _buffers.views[key] = memory[:size].view(shape)
    return view
