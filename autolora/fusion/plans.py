"""Adapters of one layer, packed for the arithmetic of fusion.

Shapes: ``N`` adapters, ``r_i`` rank of one, ``R`` rows of all packed ranks, ``W`` widest rank,
``in`` and ``out`` channels.

The gate needs the layer norm of an adapter's output ``l = s B h``, ``h = A x``. With ``B_c`` the
columns of ``B`` less their mean over the channels, it takes no pass over the channels::

    mean(l) = s mean(B) h
    var(l)  = s^2 hT C h           with C = B_cT B_c / out
    (l - mean) / sqrt(var + eps) = B_c h * s / sqrt(var + eps)

which is exact. `PreparedFactors` holds ``A``, ``B_c``, ``mean(B)`` and ``C`` of one adapter,
whatever its strength; `UpProjections` pack those of a layer's adapters one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Factors = tuple[Tensor, Tensor]
"""``A [r, in]`` and ``B [out, r]``; the delta of the weight is ``B @ A``."""

BLOCKS = (64, 32, 16)
"""Rows that a GPU kernel multiplies at once; packed ranks are multiples of one of them."""

_MOST_PADDING = 1.25  # a larger block must not cost more rows than this many times the smallest's


@dataclass(frozen=True, slots=True)
class SumPlan:
    """All adapters of one layer as a single low-rank map: ``down [R, in]``, ``up [R, out]``."""

    down: Tensor
    up: Tensor


@dataclass(frozen=True, slots=True)
class PreparedFactors:
    """One adapter in one layer, ready for the gate; independent of its strength.

    Attributes:
        down: ``A``, ``[r, in]``.
        centred: The rows of ``Bᵀ`` less their mean over the channels, ``[r, out]``.
        mean: Those means, ``[r]``, at least float32.
        covariance: Of the rows of ``Bᵀ``, ``[r, r]``, at least float32.
    """

    down: Tensor
    centred: Tensor
    mean: Tensor
    covariance: Tensor

    @property
    def rank(self) -> int:
        """The adapter's rank, without padding."""
        return self.down.shape[0]


@dataclass(frozen=True, slots=True)
class UpProjections:
    """The part of a `GatedPlan` that the gate's arithmetic needs.

    Adapter ``i`` has the rows ``offsets[i]`` to ``offsets[i + 1]``; rows of padding are zero.
    Everything that an exchange of adapters changes is in tensors, so that code compiled for one
    set of adapters serves every other of the same packed size.

    Attributes:
        centred: The centred up-projections, ``[R, out]``.
        mean: Their means over the channels, ``[R]``.
        covariance: ``covariance[j, k]`` belongs to rows ``j`` and ``start + k`` of an adapter that
            begins at ``start``; ``[R, W]``. Nothing reads beyond the adapter's own columns.
        offsets: ``[N + 1]``, int32. Adapters without rows (unused places) come last.
        strengths: ``[N]``, at least float32.
        block: All offsets are multiples of it.
    """

    centred: Tensor
    mean: Tensor
    covariance: Tensor
    offsets: Tensor
    strengths: Tensor
    block: int

    @property
    def count(self) -> int:
        """Number of places for adapters, ``N``."""
        return self.strengths.shape[0]


@dataclass(frozen=True, slots=True)
class GatedPlan:
    """All adapters of one layer: the down-projections ``[R, in]`` in one, and the rest."""

    down: Tensor
    ups: UpProjections


@dataclass(frozen=True, slots=True)
class Capacity:
    """The most that a layer's adapters may need, for code that is compiled or captured once.

    Attributes:
        adapters: Most adapters at a time.
        rank: Highest rank of one adapter.
        rank_sum: Most rows over all adapters, each rank rounded up to a multiple of 16; enough for
            ``adapters`` of the highest rank where None.

    Raises:
        ValueError: A number is not positive.
    """

    adapters: int = 4
    rank: int = 32
    rank_sum: int | None = None

    def __post_init__(self) -> None:
        if min(self.adapters, self.rank, self.rows) < 1:
            raise ValueError(f"a capacity must be positive: {self}")

    @property
    def rows(self) -> int:
        """Rows of the buffers, ``R``."""
        most = self.adapters * padded(self.rank, self.block)
        return most if self.rank_sum is None else padded(self.rank_sum, self.block)

    @property
    def block(self) -> int:
        """Rows that ranks are rounded up to."""
        return BLOCKS[-1]

    def holds(self, ranks: Sequence[int]) -> bool:
        """Whether adapters of these ranks fit."""
        rows = sum(padded(rank, self.block) for rank in ranks)
        most = padded(self.rank, self.block)
        return len(ranks) <= self.adapters and rows <= self.rows and max(ranks, default=0) <= most


def padded(rank: int, block: int) -> int:
    """Round a rank up to a multiple of the block."""
    return -(-rank // block) * block


def block_for(ranks: Sequence[int], device: torch.device) -> int:
    """Return the block that suits adapters of these ranks: 1 where no matrix unit asks for more."""
    if device.type != "cuda":
        return 1
    rows = {block: sum(padded(rank, block) for rank in ranks) for block in BLOCKS}
    return next(block for block in BLOCKS if rows[block] <= _MOST_PADDING * rows[BLOCKS[-1]])


def prepare_factors(
    a: Tensor, b: Tensor, dtype: torch.dtype, device: torch.device
) -> PreparedFactors:
    """Bring one adapter's factors into the form that the gate works with.

    Differentiable. Factors that are on the device already are used from there.

    Args:
        a: ``[r, in]``.
        b: ``[out, r]``.
        dtype: Of the products.
        device: Where they are computed.
    """
    up = b.to(device=device, dtype=_wide(dtype), non_blocking=True).T
    mean = up.mean(-1)
    centred = up - mean[:, None]
    return PreparedFactors(
        down=a.to(device=device, dtype=dtype, non_blocking=True),
        centred=centred.to(dtype).contiguous(),
        mean=mean,
        covariance=centred @ centred.T / up.shape[-1],
    )


def make_gated_plan(
    adapters: Sequence[PreparedFactors], strengths: Sequence[float], block: int | None = None
) -> GatedPlan:
    """Pack the adapters of one layer; differentiable.

    Args:
        adapters: At least one, all of one dtype and on one device.
        strengths: One per adapter.
        block: What ranks are padded to; by device where None.
    """
    device, dtype = adapters[0].down.device, adapters[0].mean.dtype
    ranks = [adapter.rank for adapter in adapters]
    block = block_for(ranks, device) if block is None else block
    rows = [padded(rank, block) for rank in ranks]
    width = max(rows)
    starts = [sum(rows[:i]) for i in range(len(rows) + 1)]

    def packed(tensors: Sequence[Tensor], columns: int | None = None) -> Tensor:
        parts = []
        for tensor, rank, size in zip(tensors, ranks, rows, strict=True):
            pads = [0, 0] * (tensor.dim() - 1) + [0, size - rank]
            if columns is not None:
                pads[1] = columns - tensor.shape[1]
            parts.append(F.pad(tensor, pads) if any(pads) else tensor)
        return torch.cat(parts)  # a copy also of one, which may be part of another plan

    ups = UpProjections(
        centred=packed([adapter.centred for adapter in adapters]),
        mean=packed([adapter.mean for adapter in adapters]),
        covariance=packed([adapter.covariance for adapter in adapters], width),
        offsets=torch.tensor(starts, dtype=torch.int32, device=device),
        strengths=torch.tensor(list(strengths), dtype=dtype, device=device),
        block=block,
    )
    return GatedPlan(packed([adapter.down for adapter in adapters]), ups)


def empty_gated_plan(
    capacity: Capacity,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    device: torch.device,
) -> GatedPlan:
    """Return buffers of the capacity's size, for `fill_gated_plan`."""
    wide = _wide(dtype)
    rows, width = capacity.rows, padded(capacity.rank, capacity.block)
    ups = UpProjections(
        centred=torch.zeros(rows, out_features, dtype=dtype, device=device),
        mean=torch.zeros(rows, dtype=wide, device=device),
        covariance=torch.zeros(rows, width, dtype=wide, device=device),
        offsets=torch.zeros(capacity.adapters + 1, dtype=torch.int32, device=device),
        strengths=torch.zeros(capacity.adapters, dtype=wide, device=device),
        block=capacity.block,
    )
    return GatedPlan(torch.zeros(rows, in_features, dtype=dtype, device=device), ups)


def fill_gated_plan(plan: GatedPlan, filled: GatedPlan | None) -> None:
    """Copy a plan into the buffers of a larger one, in place; None empties them.

    The tensors stay the same objects, so that compiled code and captured graphs see the change.
    Both have the same block, and the adapters fit (`Capacity.holds`).
    """
    rows = 0 if filled is None else filled.down.shape[0]
    count = 0 if filled is None else filled.ups.count
    if filled is not None:
        width = filled.ups.covariance.shape[1]
        plan.down[:rows] = filled.down
        plan.ups.centred[:rows] = filled.ups.centred
        plan.ups.mean[:rows] = filled.ups.mean
        plan.ups.covariance[:rows, :width] = filled.ups.covariance
        plan.ups.offsets[: count + 1] = filled.ups.offsets
        plan.ups.strengths[:count] = filled.ups.strengths
    for buffer in (plan.down, plan.ups.centred, plan.ups.mean, plan.ups.covariance):
        buffer[rows:] = 0
    plan.ups.offsets[count + 1 :] = rows
    plan.ups.strengths[count:] = 0
    if filled is None:
        plan.ups.offsets.zero_()


def split_gated_plan(plan: GatedPlan, ranks: Sequence[int]) -> Iterator[PreparedFactors]:
    """Yield each adapter's part of a plan, without copying."""
    start, ups = 0, plan.ups
    for rank in ranks:
        rows = slice(start, start + rank)
        yield PreparedFactors(
            plan.down[rows], ups.centred[rows], ups.mean[rows], ups.covariance[rows, :rank]
        )
        start += padded(rank, ups.block)


def make_sum_plan(
    factors: Sequence[Factors],
    strengths: Sequence[float],
    dtype: torch.dtype,
    device: torch.device,
) -> SumPlan:
    """Join factors and strengths into one low-rank map; differentiable."""
    down = torch.cat([a.to(device=device, dtype=dtype, non_blocking=True) for a, _ in factors])
    ups = [
        b.to(device=device, dtype=_wide(dtype), non_blocking=True).T * strength
        for (_, b), strength in zip(factors, strengths, strict=True)
    ]
    return SumPlan(down, torch.cat(ups).to(dtype))


def empty_sum_plan(
    capacity: Capacity,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    device: torch.device,
) -> SumPlan:
    """Return buffers of the capacity's size, for `fill_sum_plan`."""
    rows = capacity.rows
    down = torch.zeros(rows, in_features, dtype=dtype, device=device)
    return SumPlan(down, torch.zeros(rows, out_features, dtype=dtype, device=device))


def fill_sum_plan(plan: SumPlan, filled: SumPlan | None) -> None:
    """Copy a plan into the buffers of a larger one, in place; None empties them."""
    rows = 0 if filled is None else filled.up.shape[0]
    if filled is not None:
        plan.down[:rows] = filled.down
        plan.up[:rows] = filled.up
    plan.down[rows:] = 0
    plan.up[rows:] = 0


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that plans are made in, so that little is lost on the way."""
    return torch.promote_types(dtype, torch.float32)
