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

What is derived of an adapter's factors is kept for as long as the factors themselves live: an
adapter that is detached and attached again, by way of `autolora.lora.pool` for instance, brings the
same tensors along. Only what lives on the device of the factors is kept, as copies on an
accelerator of factors in the machine's memory would fill it up unseen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from autolora.errors import FusionError
from autolora.fusion.gate import tensor_versions

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


_Entry = tuple[tuple[object, ...], "weakref.ref[Tensor]", PreparedFactors]

# By the up-projection. Nothing in an entry holds it, so that it can go.
_KEPT = WeakIdKeyDictionary()


def derives(a: Tensor, b: Tensor, device: torch.device) -> bool:
    """Whether `derived_factors` keeps what it computes of these."""
    return b.device == device and not a.requires_grad and not b.requires_grad


def derived_factors(
    a: Tensor, b: Tensor, dtype: torch.dtype, device: torch.device
) -> PreparedFactors:
    """Return `prepare_factors` of the arguments, computed once while the factors live.

    Args:
        a: ``[r, in]``.
        b: ``[out, r]``; no gradients flow to either.
        dtype: Of the products.
        device: Where they are computed.
    """
    if not derives(a, b, device):
        return prepare_factors(a, b, dtype, device)
    stamp = (dtype, *tensor_versions((a, b)))
    entry: _Entry | None = _KEPT.get(b)
    if entry is not None and entry[0] == stamp and entry[1]() is a:
        return entry[2]
    prepared = prepare_factors(a, b, dtype, device)
    _KEPT[b] = (stamp, weakref.ref(a), prepared)
    return prepared


def output_statistics(b: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the gate needs of an up-projection, computed once while it lives.

    Args:
        b: ``[out, r]``; no gradients flow to it.

    Returns:
        The mean of each column, ``[r]``, and their covariance, ``[r, r]``, float32 on the CPU.
    """
    stamp = tensor_versions((b,))
    entry = _STATISTICS.get(b)
    if entry is not None and entry[0] == stamp:
        return entry[1]
    with torch.inference_mode(False), torch.no_grad():
        up = b.detach().to("cpu", torch.float32)
        mean = up.mean(0)
        centred = up - mean
        statistics = (mean, centred.T @ centred / up.shape[0])
    _STATISTICS[b] = (stamp, statistics)
    return statistics


# By the up-projection.
_STATISTICS = WeakIdKeyDictionary()


@dataclass(frozen=True, slots=True)
class _Kept:
    """A prepared adapter and what it was made of; they stay alive, so that `is` can be trusted."""

    factors: Factors
    stamp: tuple[object, ...]
    prepared: PreparedFactors


class PackedAdapters:
    """The live adapters of one layer as plans, made when first needed and kept until they change.

    A change of strengths keeps what was prepared of the factors; an exchange of adapters prepares
    only the new ones. With a capacity the plans live in buffers of fixed size that are written in
    place, so that compiled code and captured graphs stay valid.

    Under `torch.compile` the plans that are ready are used as they are; without one, the compiler
    gets to see how it is made, which is right but repeated in every call.

    Args:
        in_features: Of the layer.
        out_features: Of the layer.
        capacity: Size of the buffers; None makes plans of the size that is needed.
    """

    def __init__(
        self, in_features: int, out_features: int, capacity: Capacity | None = None
    ) -> None:
        self.capacity = capacity
        self.ready_sum: SumPlan | None = None
        self.ready_gated: GatedPlan | None = None
        self._shape = (in_features, out_features)
        self._factors: tuple[Factors, ...] = ()
        self.tensors: tuple[Tensor, ...] = ()
        self._strengths: tuple[float, ...] = ()
        self._sum_key: tuple[object, ...] = ()
        self._gated_key: tuple[object, ...] = ()
        self._kept: tuple[_Kept, ...] = ()

    def set(self, factors: Sequence[Factors], strengths: Sequence[float]) -> None:
        """Take other adapters or strengths; buffers that exist are written at once.

        Raises:
            FusionError: The adapters do not fit the capacity.
        """
        ranks = [a.shape[0] for a, _ in factors]
        if self.capacity is not None and not self.capacity.holds(ranks):
            raise FusionError(
                f"adapters of ranks {ranks} do not fit into {self.capacity}; declare a larger one"
            )
        self._factors, self._strengths = tuple(factors), tuple(strengths)
        self.tensors = tuple(tensor for pair in self._factors for tensor in pair)
        self._sum_key = self._gated_key = ()
        if self.capacity is None:
            return
        if self.ready_sum is not None:
            self.sum(self.ready_sum.down.dtype, self.ready_sum.down.device)
        if self.ready_gated is not None:
            self.gated(self.ready_gated.down.dtype, self.ready_gated.down.device)

    @property
    def factors(self) -> tuple[Factors, ...]:
        """The adapters' factors."""
        return self._factors

    @property
    def strengths(self) -> tuple[float, ...]:
        """The adapters' strengths, in the same order."""
        return self._strengths

    @property
    def trains(self) -> bool:
        """Whether a gradient for any factor is wanted right now."""
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in self.tensors)

    def sum(self, dtype: torch.dtype, device: torch.device) -> SumPlan:
        """Return the plan of the plain sum."""
        ready = self.ready_sum
        if torch.compiler.is_compiling():
            if ready is not None and ready.down.dtype == dtype and ready.down.device == device:
                return ready
            return make_sum_plan(self._factors, self._strengths, dtype, device)
        if self.trains:
            return make_sum_plan(self._factors, self._strengths, dtype, device)
        key = (dtype, device, tensor_versions(self.tensors))
        if ready is None or self._sum_key != key:
            # A plan made under inference_mode must still serve a later training step.
            with torch.inference_mode(False), torch.no_grad():
                ready = self.ready_sum = self._make_sum(dtype, device)
            self._sum_key = key
        return ready

    def gated(self, dtype: torch.dtype, device: torch.device) -> GatedPlan:
        """Return the plan of the gated sum."""
        ready = self.ready_gated
        if torch.compiler.is_compiling():
            if ready is not None and ready.down.dtype == dtype and ready.down.device == device:
                return ready
            return self._unkept(dtype, device)
        if self.trains:
            return self._unkept(dtype, device)
        key = (dtype, device, tensor_versions(self.tensors))
        if ready is None or self._gated_key != key:
            with torch.inference_mode(False), torch.no_grad():
                ready = self.ready_gated = self._make_gated(dtype, device)
            self._gated_key = key
        return ready

    def _unkept(self, dtype: torch.dtype, device: torch.device) -> GatedPlan:
        prepared = [prepare_factors(a, b, dtype, device) for a, b in self._factors]
        return make_gated_plan(prepared, self._strengths)

    def _make_sum(self, dtype: torch.dtype, device: torch.device) -> SumPlan:
        filled = None
        if self._factors:
            filled = make_sum_plan(self._factors, self._strengths, dtype, device)
        if self.capacity is None:
            assert filled is not None, "a layer without adapters needs no plan"
            return filled
        plan = self.ready_sum
        if plan is None or (plan.down.dtype, plan.down.device) != (dtype, device):
            plan = empty_sum_plan(self.capacity, *self._shape, dtype, device)
        fill_sum_plan(plan, filled)
        return plan

    def _make_gated(self, dtype: torch.dtype, device: torch.device) -> GatedPlan:
        before, plan = self._kept, self.ready_gated
        kept = tuple(self._prepare(pair, dtype, device, before) for pair in self._factors)
        same = len(before) == len(kept) > 0 and all(map(_is, before, kept))
        if plan is not None and same:
            return self._with_strengths(plan)
        prepared = [one.prepared for one in kept]
        made = make_gated_plan(prepared, self._strengths, self._block) if prepared else None
        if self.capacity is not None:
            if plan is None or (plan.down.dtype, plan.down.device) != (dtype, device):
                plan = empty_gated_plan(self.capacity, *self._shape, dtype, device)
            fill_gated_plan(plan, made)
            made = plan
        assert made is not None, "a layer without adapters needs no plan"
        if not all(derives(a, b, device) for a, b in self._factors):
            # Parts of the plan, so that nothing is held twice.
            parts = split_gated_plan(made, [one.rank for one in prepared])
            kept = tuple(replace(one, prepared=p) for one, p in zip(kept, parts, strict=True))
        self._kept = kept
        return made

    @property
    def _block(self) -> int | None:
        return None if self.capacity is None else self.capacity.block

    def _with_strengths(self, plan: GatedPlan) -> GatedPlan:
        """Exchange the strengths alone, in place where others hold the buffers."""
        strengths = plan.ups.strengths
        if self.capacity is not None:
            strengths[: len(self._strengths)] = strengths.new_tensor(self._strengths)
            return plan
        return replace(plan, ups=replace(plan.ups, strengths=strengths.new_tensor(self._strengths)))

    def _prepare(
        self,
        factors: Factors,
        dtype: torch.dtype,
        device: torch.device,
        before: Sequence[_Kept],
    ) -> _Kept:
        a, b = factors
        stamp = (dtype, device, *tensor_versions((a, b)))
        for kept in before:
            if kept.factors[0] is a and kept.factors[1] is b and kept.stamp == stamp:
                return kept
        return _Kept(factors, stamp, derived_factors(a, b, dtype, device))


def _is(a: object, b: object) -> bool:
    return a is b
