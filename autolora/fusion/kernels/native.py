"""Gated fusion on a CPU through a small C kernel, compiled once on the machine that runs it.

PyTorch's elementwise operations take several passes over temporaries, and its sigmoid alone costs
about as much as the layer; one pass with everything in registers takes a fraction. The kernel
(`gated.c`, no dependency) is compiled by the system's C compiler in about a second, checked
against `plain`, and kept in the user's cache folder. Where there is no compiler, or with
``AUTOLORA_NATIVE=0`` in the environment, `plain` serves instead.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from autolora.fusion.gate import GateTerms
from autolora.fusion.kernels import plain
from autolora.fusion.plans import UpProjections

MAX_ROWS = 256
"""Most packed ranks of a layer that the kernel takes."""

_SOURCE = Path(__file__).with_name("gated.c")
_OPTIMIZE = ("-O3", "-fno-math-errno", "-shared", "-fPIC")
# The first set that compiles is taken; clang on some systems has no OpenMP, gcc on some no native.
_FLAGS = (
    ("-march=native", "-fopenmp", "-fschedule-insns"),
    ("-march=native", "-fopenmp"),
    ("-march=native",),
    ("-mcpu=native",),
    (),
)
_TIMEOUT = 60  # seconds for one compilation
_CHUNK = 128  # CHUNK of gated.c
_GROUP = 64  # GROUP of gated.c

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_library: ctypes.CDLL | None = None
_tried = False

_VECTORS = ("base_weight", "base_bias", "coef_weight", "coef_bias", "out_weight")
_PACKED = ("y", "h", "centred", "mean", "covariance", "strengths", "offsets")
_POINTERS = (*_PACKED, *_VECTORS, "fused", "scratch", "gate_sums")
_SIZES = ("tokens", "channels", "adapters", "ranks", "covariance_width")
_INTEGERS = (*_SIZES, "y_stride", "fused_stride", "h_stride", "half", "threads")


class _Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _INTEGERS),
        ("eps_base", ctypes.c_float),
        ("eps_lora", ctypes.c_float),
    ]


def available() -> bool:
    """Whether the kernel is, or now gets, compiled and loaded."""
    global _library, _tried
    if not _tried:
        with _lock:
            if not _tried:
                _library = _load()
                _tried = True
    return _library is not None


def supports(y: Tensor, h: Tensor, ups: UpProjections, terms: GateTerms) -> bool:
    """Whether the kernel can compute this; `plain` serves everything else."""
    return (
        y.device.type == "cpu"
        and y.dtype in (torch.float32, torch.bfloat16)
        and h.dtype == ups.centred.dtype == terms.out.dtype == torch.float32
        and 0 < ups.centred.shape[0] <= MAX_ROWS
        and y.numel() > 0
        and available()
    )


def forward(
    y: Tensor,
    h: Tensor,
    ups: UpProjections,
    terms: GateTerms,
    record: bool = False,
    inplace: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Add all adapters through the gate to the base output; see `plain.forward`.

    Args:
        y: Base output, ``[T, out]``, float32 or bfloat16.
        h: Down-projected input, ``[T, R]``, float32.
        ups: The adapters.
        terms: The gate.
        record: Whether to return the mean gates.
        inplace: Whether ``y`` may be overwritten with the result.
    """
    assert _library is not None, "available() loads it"
    return _call(_library, y, h, ups, terms, record, inplace)


def _call(
    library: ctypes.CDLL,
    y: Tensor,
    h: Tensor,
    ups: UpProjections,
    terms: GateTerms,
    record: bool,
    inplace: bool,
) -> tuple[Tensor, Tensor | None]:
    y = y if y.stride(1) == 1 else y.contiguous()
    h = h if h.stride(1) == 1 else h.contiguous()
    tokens, channels = y.shape
    count, rows = ups.count, ups.centred.shape[0]
    fused = y if inplace else torch.empty_like(y, memory_format=torch.contiguous_format)
    items = -(-tokens // _GROUP) * -(-channels // _CHUNK)
    scratch = torch.empty(tokens * (2 + rows + 2 * count) + (items * count if record else 0))
    sums = torch.zeros(count, dtype=torch.float64) if record else None
    # Kept alive until the call returns.
    tensors = (
        y, h, ups.centred.contiguous(), ups.mean.contiguous(), ups.covariance.contiguous(),
        ups.strengths, ups.offsets, terms.base_weight, terms.base_bias, terms.coef_weight,
        terms.coef_bias, terms.out, fused, scratch,
    )  # fmt: skip
    pointers = [tensor.data_ptr() for tensor in tensors]
    library.autolora_fuse_gated(
        _Arguments(
            *pointers, 0 if sums is None else sums.data_ptr(),
            tokens, channels, count, rows, ups.covariance.shape[1],
            y.stride(0), fused.stride(0), h.stride(0), y.dtype == torch.bfloat16,
            torch.get_num_threads(), terms.eps_base, terms.eps_lora,
        )
    )  # fmt: skip
    means = None if sums is None else (sums / (tokens * channels)).float()
    return fused, means


def _load() -> ctypes.CDLL | None:
    if os.environ.get("AUTOLORA_NATIVE", "1") == "0":
        return None
    try:
        path = _compiled()
        if path is None:
            return None
        library = ctypes.CDLL(str(path))
        library.autolora_fuse_gated.argtypes = [ctypes.POINTER(_Arguments)]
        library.autolora_fuse_gated.restype = None
        agrees = _agrees(library)
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        _log.info("no native kernel: %s", error)
        return None
    if not agrees:
        _log.warning("the compiled kernel %s gives wrong results and is not used", path)
    return library if agrees else None


def _compiled() -> Path | None:
    """Return the library, compiled now if it was not before; None without a compiler."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if not compiler or shutil.which(compiler) is None:
        _log.info("no native kernel: no C compiler found")
        return None
    identity = (_SOURCE.read_text(encoding="utf-8"), compiler, _OPTIMIZE, _FLAGS, _processor())
    name = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
    folder = _cache_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / f"gated-{name}.so"
    if path.is_file():
        return path
    for flags in _FLAGS:
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{path.stem}.", suffix=".so")
        os.close(handle)
        command = [compiler, *_OPTIMIZE, *flags, str(_SOURCE), "-o", temporary, "-lm"]
        try:
            done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT, check=False)
            if done.returncode == 0:
                os.replace(temporary, path)
                return path
        finally:
            Path(temporary).unlink(missing_ok=True)
    _log.info("no native kernel: %s can't compile it", compiler)
    return None


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "autolora"


def _processor() -> str:
    """Return what ``-march=native`` depends on, for homes that several machines share."""
    flags = ""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags}"


def _agrees(library: ctypes.CDLL) -> bool:
    """Whether the library gives what `plain` gives on a small layer with ragged sizes."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tokens, channels, offsets = 7, 83, (0, 3, 8)
    up = random(8, channels)
    mean = up.mean(-1)
    centred = up - mean[:, None]
    covariance = torch.zeros(8, 5)
    for start, end in pairwise(offsets):
        part = centred[start:end]
        covariance[start:end, : end - start] = part @ part.T / channels
    starts = torch.tensor(offsets, dtype=torch.int32)
    ups = UpProjections(centred, mean, covariance, starts, torch.tensor([1.0, -0.5]), 1)
    a, b, c, d, e = random(5, channels)
    terms = GateTerms(a, b, c, d, e, 1e-5, 1e-5)
    y, h = random(tokens, channels), random(tokens, 8)
    fused, means = _call(library, y, h, ups, terms, True, False)
    truth, true_means = plain.forward(y, h, ups, terms, True)
    assert means is not None and true_means is not None
    close = torch.allclose(fused, truth, rtol=1e-4, atol=1e-4)
    return close and torch.allclose(means, true_means, rtol=1e-4, atol=1e-4)
