"""Adapters' outputs added to a base output: the plain sum, and the gated one.

Shapes: ``T`` tokens, ``N`` adapters, ``R`` packed ranks, ``in`` and ``out`` channels. All
adapters of a layer share one down-projection; `autolora.fusion.plans` says how they are packed,
and `autolora.fusion.kernels` holds the arithmetic behind the gate, once per kind of device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from autolora.fusion.gate import GateTerms
from autolora.fusion.kernels import gated
from autolora.fusion.plans import Factors, GatedPlan, SumPlan

__all__ = ["Factors", "Recorder", "fuse_gated", "fuse_sum", "working_dtype"]

Recorder = Callable[[Tensor], None]
"""Takes the mean of ``w_out * g_i`` over tokens and channels, ``[N]``."""


def working_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of the adapters' products beside a base output of this dtype.

    On a CPU products in float32 are both faster than in half precision and more exact; on a GPU
    half precision is kept.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if half and device.type == "cpu" else dtype


def fuse_sum(y: Tensor, x: Tensor, plan: SumPlan) -> Tensor:
    """Add all adapters to the base output.

    Args:
        y: Base output, ``[T, out]``.
        x: The layer's input in the plan's dtype, ``[T, in]``.
        plan: The adapters.

    Returns:
        ``[T, out]`` in the dtype of ``y``.
    """
    return torch.addmm(y.to(x.dtype), F.linear(x, plan.down), plan.up).to(y.dtype)


def fuse_gated(
    y: Tensor,
    x: Tensor,
    plan: GatedPlan,
    terms: GateTerms,
    record: Recorder | None = None,
    inplace: bool = False,
) -> Tensor:
    """Add all adapters through the gate to the base output.

    Args:
        y: Base output, ``[T, out]``.
        x: The layer's input in the plan's dtype, ``[T, in]``.
        plan: The adapters.
        terms: The gate, at least float32.
        record: Called with the mean gates, ``[N]``.
        inplace: Whether ``y`` may be overwritten; ignored where gradients are wanted.

    Returns:
        ``[T, out]`` in the dtype of ``y``.
    """
    h = F.linear(x, plan.down)
    fused, means = gated.fuse(y, h, plan.ups, terms, record is not None, inplace)
    if record is not None and means is not None:
        record(means)
    return fused
