"""Adapters' outputs added to a base output: the plain sum, and the gated one.

Shapes: ``N`` adapters, ``R`` packed ranks, ``in`` and ``out`` channels. All adapters of a layer
share one down-projection; `autolora.fusion.plans` says how they are packed,
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


def fuse_sum(y: Tensor, x: Tensor, plan: SumPlan, inplace: bool = False) -> Tensor:
    """Add all adapters to the base output.

    Args:
        y: Base output, ``[..., out]``.
        x: The layer's input, ``[..., in]``.
        plan: The adapters.
        inplace: Whether ``y`` may be overwritten; not together with gradients.

    Returns:
        ``[..., out]`` in the dtype of ``y``.
    """
    hidden = F.linear(_rows(x, y.device, plan.down.dtype), plan.down)
    base = y.reshape(-1, y.shape[-1]).to(hidden.dtype)
    # A copy of ``y`` would cost as much as the product; it is spared where it may be.
    fused = base.addmm_(hidden, plan.up) if inplace else torch.addmm(base, hidden, plan.up)
    return fused.to(y.dtype).view(y.shape)


def fuse_gated(
    y: Tensor,
    x: Tensor,
    plan: GatedPlan,
    terms: GateTerms,
    record: bool = False,
    inplace: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Add all adapters through the gate to the base output.

    Args:
        y: Base output, ``[..., out]``.
        x: The layer's input, ``[..., in]``.
        plan: The adapters.
        terms: The gate, at least float32.
        record: Whether to return the mean gates.
        inplace: Whether ``y`` may be overwritten; ignored where gradients are wanted.

    Returns:
        ``[..., out]`` in the dtype of ``y``, and the mean of ``w_out * g_i`` over tokens and
        channels, ``[N]``, or None.
    """
    hidden = F.linear(_rows(x, y.device, plan.down.dtype), plan.down)
    base = y.reshape(-1, y.shape[-1])
    fused, means = gated.fuse(base, hidden, plan.ups, terms, record, inplace)
    return fused.view(y.shape), means


def _rows(x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return x.reshape(-1, x.shape[-1]).to(device=device, dtype=dtype)
