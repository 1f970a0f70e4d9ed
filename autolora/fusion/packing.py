"""What one layer keeps of its adapters between calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from autolora.errors import FusionError
from autolora.fusion.derived import derived_factors, derives
from autolora.fusion.gate import tensor_versions
from autolora.fusion.plans import (
    Capacity,
    Factors,
    GatedPlan,
    PreparedFactors,
    SumPlan,
    empty_gated_plan,
    empty_sum_plan,
    fill_gated_plan,
    fill_sum_plan,
    make_gated_plan,
    make_sum_plan,
    prepare_factors,
    split_gated_plan,
)


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
