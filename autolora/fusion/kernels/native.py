"""Fusion on a CPU through a small C kernel, compiled once on the machine that runs it.

PyTorch's elementwise operations take several passes over temporaries, and its sigmoid alone costs
about as much as the layer; one pass with everything in registers takes a fraction. The kernel
(`gated.c`, no dependency) is compiled by the system's C compiler in about a second, checked
against `plain`, and kept in the user's cache folder. Where there is no compiler, or with
``AUTOLORA_NATIVE=0`` in the environment, `plain` serves instead.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from autolora.c_library import CLibrary
from autolora.fusion.gate import GateTerms
from autolora.fusion.kernels import plain
from autolora.fusion.packed import (
    Factors,
    GatedPlan,
    SumPlan,
    UpProjections,
    make_gated_plan,
    output_statistics,
    prepare_factors,
)

MAX_ROWS = 4096
"""Most ranks of a layer's adapters together that the kernel takes."""

SMALL_WEIGHT = 2**19
"""Numbers of a weight beside which factors are kept in the order of the products as well."""
ROOM_BYTES = 2**20
"""Most bytes that they may take per layer."""

_DTYPES = (torch.float32, torch.bfloat16)
_PAD, _WIDTH = 16, 32  # of gated.c, at most
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# ``adapter`` and ``layer`` of gated.c. Packed by hand: ctypes' structures cost more than a switch.
_ADAPTER = struct.Struct("@PPPPqqiiif0q")
_LAYER = struct.Struct("@PPPPPPPPqqqff0q")


def available() -> bool:
    """Whether the kernel is, or now gets, compiled and loaded."""
    return KERNEL.get() is not None


def supports(y: Tensor, h: Tensor, ups: UpProjections, terms: GateTerms) -> bool:
    """Whether the kernel can compute this; `plain` serves everything else."""
    return (
        serves(y.dtype, y.device)
        and h.dtype == terms.out.dtype == torch.float32
        and y.numel() > 0
        and _fits(ups.centred)
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
    library = KERNEL.get()
    assert library is not None, "available() loads it"
    return PreparedLayer(library, None, ups, terms)(y, h, record, inplace)


def serves(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel is for base outputs of this type, there."""
    return device.type == "cpu" and dtype in _DTYPES and available()


def takes(y: Tensor, x: Tensor) -> bool:
    """Whether a `PreparedLayer` can be called with these: ``y [..., out]`` and ``x [..., in]``."""
    return (
        type(y) is Tensor  # subclasses may keep their numbers elsewhere
        and type(x) is Tensor
        and y.is_cpu
        and x.is_cpu
        and y.dtype in _DTYPES
        and x.dtype is y.dtype
        and y.numel() > 0
        and available()
    )


def prepare_gated(plan: GatedPlan, terms: GateTerms) -> PreparedLayer | None:
    """Lay out one layer with a gate; None where the kernel does not serve it."""
    library = KERNEL.get()
    if library is None or not _fits(plan.ups.centred) or terms.out.dtype != torch.float32:
        return None
    return PreparedLayer(library, plan.down, plan.ups, terms)


def prepare_sum(plan: SumPlan) -> PreparedLayer | None:
    """Lay out one layer whose adapters are summed; None where the kernel does not serve it."""
    library = KERNEL.get()
    if library is None or not _fits(plan.up):
        return None
    return PreparedLayer(library, plan.down, plan.up, None)


def prepare_adapters(
    factors: Sequence[Factors], strengths: Sequence[float], terms: GateTerms | None
) -> PreparedLayer | None:
    """Lay out one layer whose adapters stay where they are, in their own types.

    Args:
        factors: ``(A [r, in], B [out, r])`` per adapter, at least one.
        strengths: One per adapter.
        terms: The gate in float32, None for the plain sum.

    Returns:
        The layer, or None where the kernel does not serve it.
    """
    library = KERNEL.get()
    if library is None or sum(a.shape[0] for a, _ in factors) > MAX_ROWS:
        return None
    adapters = []
    for (a, b), strength in zip(factors, strengths, strict=True):
        mean, covariance = (None, None) if terms is None else output_statistics(b)
        adapters.append(_Adapter(_readable(a), _readable(b), mean, covariance, strength))
    layer = PreparedLayer.__new__(PreparedLayer)
    (a, b), *_ = factors
    layer._lay_out(library, adapters, terms, a.shape[1], b.shape[0], keep=True)
    return layer


class _Adapter(NamedTuple):
    """One adapter for the kernel: addresses follow from the tensors."""

    down: Tensor | None  # [r, in]
    up: Tensor  # [out, r], or centred [r, out]
    mean: Tensor | None
    covariance: Tensor | None
    strength: float
    centred: bool = False

    def packed(self) -> bytes:
        down, up, mean, covariance = self[:4]
        return _ADAPTER.pack(
            0 if down is None else down.data_ptr(),
            up.data_ptr(),
            0 if mean is None else mean.data_ptr(),
            0 if covariance is None else covariance.data_ptr(),
            up.shape[0 if self.centred else 1],
            0 if covariance is None else covariance.stride(0),
            0 if down is None else _KINDS[down.dtype],
            _KINDS[up.dtype],
            self.centred,
            self.strength,
        )


def _readable(factor: Tensor) -> Tensor:
    """Return a factor as the kernel can read it, itself where it can."""
    if factor.is_cpu and factor.dtype in _KINDS and factor.is_contiguous():
        return factor
    return factor.detach().to("cpu", torch.float32).contiguous()


def _unpacked(down: Tensor | None, ups: UpProjections | Tensor) -> Iterator[_Adapter]:
    """Yield the adapters of a plan, which stay parts of it."""
    if isinstance(ups, Tensor):
        yield _Adapter(down, ups, None, None, 1.0, centred=True)
        return
    for (start, end), strength in zip(
        pairwise(ups.offsets.tolist()), ups.strengths.tolist(), strict=True
    ):
        rows = slice(start, end)
        own = None if down is None else down[rows]
        statistics = (ups.mean[rows], ups.covariance[rows])
        yield _Adapter(own, ups.centred[rows], *statistics, strength, centred=True)


def _room(adapters: Sequence[_Adapter], inputs: int, channels: int) -> Tensor | None:
    """Return memory for a small layer's factors, their ranks and channels in whole vectors."""
    ranks = sum(-(-one.up.shape[1] // _PAD) * _PAD for one in adapters)
    floats = ranks * (inputs + 1 + -(-channels // _WIDTH) * _WIDTH) + _PAD
    if inputs * channels > SMALL_WEIGHT or 4 * floats > ROOM_BYTES:
        return None
    return torch.empty(floats, dtype=torch.float32, device="cpu")


class PreparedLayer:
    """One layer laid out for the kernel, which then takes only the input and the base output.

    In a small layer the dozen addresses and the separate product for ``h`` that this spares cost
    more than the arithmetic. Holds the tensors that it knows the addresses of; they may be written
    in place but not move. Strengths are taken as they are now.

    Args:
        library: The kernel.
        down: The down-projections, ``[R, in]``; None where calls bring ``h`` for the input.
        ups: The adapters, or for the plain sum their up-projections alone, ``[R, out]``.
        terms: The gate, None for the plain sum.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        down: Tensor | None,
        ups: UpProjections | Tensor,
        terms: GateTerms | None,
    ) -> None:
        rows, channels = (ups if isinstance(ups, Tensor) else ups.centred).shape
        inputs = rows if down is None else down.shape[1]
        wide = None if down is None else down.contiguous()
        self._lay_out(library, list(_unpacked(wide, ups)), terms, inputs, channels)

    def _lay_out(
        self,
        library: ctypes.CDLL,
        adapters: Sequence[_Adapter],
        terms: GateTerms | None,
        inputs: int,
        channels: int,
        keep: bool = False,
    ) -> None:
        self._count = 0 if terms is None else len(adapters)
        self._inputs, self._channels = inputs, channels
        gate: tuple[Tensor, ...] = ()
        if terms is not None:
            gate = (terms.base_weight, terms.base_bias, terms.coef_weight, terms.coef_bias)
            gate = tuple(vector.contiguous() for vector in (*gate, terms.out))
        own = ctypes.create_string_buffer(b"".join([one.packed() for one in adapters]))
        room = _room(adapters, inputs, channels) if keep else None
        state = ctypes.c_int64(0)
        constants = ctypes.create_string_buffer(
            _LAYER.pack(
                ctypes.addressof(own),
                *([vector.data_ptr() for vector in gate] or [0] * 5),
                0 if room is None else room.data_ptr(),
                ctypes.addressof(state),
                inputs,
                channels,
                len(adapters),
                0.0 if terms is None else terms.eps_base,
                0.0 if terms is None else terms.eps_lora,
            )
        )
        self._held = (own, constants, adapters, gate, room, state)
        self._address = ctypes.addressof(constants)
        self._function = library.autolora_fuse

    def __call__(
        self, y: Tensor, x: Tensor, record: bool = False, inplace: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Add all adapters to the base output.

        Args:
            y: Base output, ``[..., out]``, float32 or bfloat16.
            x: The input, ``[..., in]``, in the dtype of ``y``; or ``h [..., R]`` in float32.
            record: Whether to return the mean gates; a plain sum has none.
            inplace: Whether ``y`` may be overwritten with the result.

        Returns:
            ``[..., out]`` in the dtype of ``y``, and the mean of ``w_out * g_i`` over tokens and
            channels, ``[N]``, or None.

        Raises:
            ValueError: The sizes do not go together.
            MemoryError: There is no room for the statistics of so many tokens.
        """
        y, x = y.contiguous(), x.contiguous()
        fused = y if inplace else torch.empty_like(y)
        tokens, ragged = divmod(y.numel(), self._channels)
        if ragged or x.numel() != tokens * self._inputs:  # or the kernel would read what is beyond
            raise ValueError(f"an input {list(x.shape)} does not go with an output {list(y.shape)}")
        sums = torch.empty(self._count, dtype=torch.float64) if record and self._count else None
        failed = self._function(
            self._address, y.data_ptr(), x.data_ptr(), fused.data_ptr(),
            None if sums is None else sums.data_ptr(),
            tokens, y.dtype is torch.bfloat16, torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError(f"no memory for the statistics of {tokens} tokens")
        return fused, None if sums is None else (sums / (tokens * self._channels)).float()


def _fits(up: Tensor) -> bool:
    return up.is_cpu and up.dtype == torch.float32 and 0 < up.shape[0] <= MAX_ROWS


def _bind(library: ctypes.CDLL) -> None:
    pointers, number = [ctypes.c_void_p] * 5, ctypes.c_int
    library.autolora_fuse.argtypes = [*pointers, ctypes.c_int64, number, number]
    library.autolora_fuse.restype = number


def _agrees(library: ctypes.CDLL) -> bool:
    """Whether the library gives what `plain` gives on a small layer with ragged sizes."""
    generator = torch.Generator("cpu").manual_seed(0)
    cpu, wide = torch.device("cpu"), torch.float32

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=wide, device=cpu)

    tokens, inputs, channels = 7, 21, 83
    factors = [prepare_factors(random(r, inputs), random(channels, r), wide, cpu) for r in (3, 5)]
    plan = make_gated_plan(factors, [0.2, -0.1])
    a, b, c, d, e = random(5, channels)
    terms = GateTerms(a, b, c, d, e, eps_base=1e-5, eps_lora=1e-5)
    y, x = random(tokens, channels), random(tokens, inputs)
    fused, means = PreparedLayer(library, plan.down, plan.ups, terms)(y, x, record=True)
    truth, true_means = plain.forward(y, x @ plan.down.T, plan.ups, terms, record=True)
    assert means is not None and true_means is not None
    summed, _ = PreparedLayer(library, plan.down, plan.ups.centred, None)(y, x)
    pairs = (fused, truth), (means, true_means), (summed, y + x @ plan.down.T @ plan.ups.centred)
    return all(torch.allclose(one, other, rtol=1e-4, atol=1e-4) for one, other in pairs)


KERNEL = CLibrary(Path(__file__).with_name("gated.c"), _bind, _agrees)
