"""Dense changes of a layer, for strategies that look at single entries.

Shape legend: r rank, ``in`` and ``out`` channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autolora.fusion.packed import Factors


def dense(pair: Factors, strength: float = 1.0) -> Tensor:
    """Return ``s B A [out, in]``, float32 at least."""
    A, B = (tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in pair)
    return strength * (B @ A)


def as_factors(delta: Tensor) -> Factors:
    """Return factors of a dense change ``[out, in]`` that give it exactly, of rank min(out, in)."""
    out, inner = delta.shape
    if out <= inner:
        return delta, torch.eye(out, dtype=delta.dtype, device=delta.device)
    return torch.eye(inner, dtype=delta.dtype, device=delta.device), delta


def delta_norm(pair: Factors) -> float:
    """Return the Frobenius norm of ``B A`` without forming it: ``|BA|^2 = tr(B^T B A A^T)``."""
    A, B = (tensor.detach().double() for tensor in pair)
    return float(((B.T @ B) * (A @ A.T)).sum().clamp_min(0).sqrt())
