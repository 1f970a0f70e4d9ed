"""What the gate needs of an adapter's factors, kept for as long as the factors themselves live.

An adapter that is detached and attached again, by way of `autolora.adapters.cache` for instance,
brings the same tensors along; what was computed of them then need not be computed again. Only what
lives on the device of the factors is kept: copies on an accelerator of factors in the machine's
memory would fill it up unseen.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from autolora.fusion.gate import tensor_versions
from autolora.fusion.plans import PreparedFactors, prepare_factors

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
