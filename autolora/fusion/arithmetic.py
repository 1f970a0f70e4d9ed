"""The arithmetic of fusion in one linear layer, in plain PyTorch.

Shapes: ``T`` tokens, ``N`` adapters, ``r`` rank, ``R`` sum of the ranks, ``in`` and ``out``
channels. Strengths are folded into the up-projections before any function here sees them.

No function builds an ``N x T x out`` tensor for a large layer when no gradient is wanted, and the
layer norm of an adapter's output needs no pass over its channels. With ``h = A x`` the output is
``B h``, and with ``B_c`` the rows of ``B`` less their mean over the channels::

    mean(B h) = mean(B) h
    var(B h) = hT C h           with C = B_cT B_c / out
    normalised = B_c h / sqrt(var + eps)

which is exact: the ``r x r`` covariance ``C`` is computed once per adapter and layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from autolora.fusion.gate import GateTerms

Factors = tuple[Tensor, Tensor]
"""``A [r, in]`` and ``B [out, r]``; the delta of the weight is ``B @ A``."""

Recorder = Callable[[Tensor], None]
"""Takes the mean of ``w_out * g_i`` over tokens and channels, ``[N]``."""

# Elements of the largest temporary of `fuse_gated`, N x chunk x out. On a CPU the temporaries then
# stay within a few MB: at 3072 -> 9216 channels a whole-layer temporary made the gate three times
# slower (page faults and cache misses), while for layers of at most this size cutting the tokens
# into chunks only adds calls (84 tokens, 192 -> 1344: 0.30 ms whole, 0.35 ms in two chunks). On a
# GPU launches are what small chunks cost, and memory is the only reason to cut.
CHUNK_ELEMENTS_CPU = 2**20
CHUNK_ELEMENTS_GPU = 2**26


@dataclass(frozen=True, slots=True)
class SumPlan:
    """All adapters of one layer as a single low-rank map: ``down [R, in]``, ``up [R, out]``."""

    down: Tensor
    up: Tensor


@dataclass(frozen=True, slots=True)
class RankGroup:
    """Consecutive adapters of one rank, which share batched products.

    Attributes:
        first: Index of the group's first adapter in the plan's order.
        count: Number of adapters, ``n``.
        start: Row of the plan's ``down`` at which the group begins.
        rank: The common rank.
        up: ``[n, r, out]``.
        centred: ``up`` less its mean over the channels, ``[n, r, out]``.
        covariance: Of the rows of ``B``, ``[n, r, r]``, at least float32.
    """

    first: int
    count: int
    start: int
    rank: int
    up: Tensor
    centred: Tensor
    covariance: Tensor


@dataclass(frozen=True, slots=True)
class GatedPlan:
    """All adapters of one layer, sorted by rank.

    Attributes:
        down: The stacked down-projections, ``[R, in]``.
        groups: One per distinct rank.
        order: ``order[k]`` is the caller's index of the plan's ``k``-th adapter.
    """

    down: Tensor
    groups: tuple[RankGroup, ...]
    order: tuple[int, ...]


def working_dtype(output: Tensor) -> torch.dtype:
    """Return the dtype in which adapters are computed beside a base output.

    On a CPU elementwise work in float32 is both faster than in half precision (no conversion per
    operation) and more exact; on a GPU it is bound by memory, so half precision is kept.
    """
    half = output.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if half and output.device.type == "cpu" else output.dtype


def make_sum_plan(
    factors: Sequence[Factors], strengths: Sequence[float], dtype: torch.dtype, device: torch.device
) -> SumPlan:
    """Join factors and strengths for `fuse_sum`."""
    down = torch.cat([a.to(device=device, dtype=dtype) for a, _ in factors])
    ups = [_scaled_up(b, s, device) for (_, b), s in zip(factors, strengths, strict=True)]
    return SumPlan(down, torch.cat(ups).to(dtype))


def make_gated_plan(
    factors: Sequence[Factors], strengths: Sequence[float], dtype: torch.dtype, device: torch.device
) -> GatedPlan:
    """Group factors by rank and take the covariances for `fuse_gated`."""
    order = tuple(sorted(range(len(factors)), key=lambda i: factors[i][0].shape[0]))
    downs, groups, start = [], [], 0
    for rank in dict.fromkeys(factors[i][0].shape[0] for i in order):
        members = [i for i in order if factors[i][0].shape[0] == rank]
        downs += [factors[i][0].to(device=device, dtype=dtype) for i in members]
        up = torch.stack([_scaled_up(factors[i][1], strengths[i], device) for i in members])
        centred = up - up.mean(-1, keepdim=True)
        groups.append(
            RankGroup(
                first=order.index(members[0]),
                count=len(members),
                start=start,
                rank=rank,
                up=up.to(dtype),
                centred=centred.to(dtype),
                covariance=centred @ centred.transpose(1, 2) / up.shape[-1],
            )
        )
        start += rank * len(members)
    return GatedPlan(torch.cat(downs), tuple(groups), order)


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
    differentiable: bool,
    record: Recorder | None = None,
    chunk_elements: int | None = None,
) -> Tensor:
    """Add all adapters through the gate to the base output.

    Args:
        y: Base output, ``[T, out]``.
        x: The layer's input in the plan's dtype, ``[T, in]``.
        plan: The adapters.
        terms: The gate.
        differentiable: Whether the result must carry gradients.
        record: Called with the mean gates ``[N]`` in the caller's order.
        chunk_elements: Size of the largest temporary, in elements; by device where None.

    Returns:
        ``[T, out]`` in the dtype of ``y``.
    """
    tokens, out_features = y.shape
    count = len(plan.order)
    h = F.linear(x, plan.down)
    means = None if record is None else torch.zeros(count, device=y.device)
    if differentiable:
        fused = _fuse_differentiable(y.to(h.dtype), h, plan, terms, means).to(y.dtype)
    else:
        default = CHUNK_ELEMENTS_CPU if y.device.type == "cpu" else CHUNK_ELEMENTS_GPU
        chunk = max(1, (chunk_elements or default) // (count * out_features))
        if tokens <= chunk:
            fused = _fuse_inplace(y.to(h.dtype), h, plan, terms, means).to(y.dtype)
        else:
            fused = torch.empty_like(y)
            for at in range(0, tokens, chunk):
                rows = slice(at, at + chunk)
                fused[rows] = _fuse_inplace(y[rows].to(h.dtype), h[rows], plan, terms, means)
    if record is not None and means is not None:
        record(_in_callers_order(means / max(tokens, 1), plan))
    return fused


def _fuse_inplace(
    y: Tensor, h: Tensor, plan: GatedPlan, terms: GateTerms, means: Tensor | None
) -> Tensor:
    """Fuse one chunk with as few operations and as little new memory as possible."""
    tokens, out_features = y.shape
    count = len(plan.order)
    # The first half holds the adapters' outputs, the second first their normalised outputs and
    # then the gates' arguments: the layout that `glu` fuses to output * sigmoid(argument).
    halves = y.new_empty(2 * count, tokens, out_features)
    outputs, arguments = halves.chunk(2)
    for group in plan.groups:
        hidden = _hidden(h, group)
        torch.bmm(hidden, group.up, out=_members(outputs, group))
        normalised = _normalised(hidden, group, terms)
        torch.bmm(normalised, group.centred, out=_members(arguments, group))
    base, coef = _base_and_coef(y, terms)
    torch.addcmul(base, arguments, coef, out=arguments)
    if means is not None:
        means += _sum_of_mean_gates(torch.sigmoid(arguments), terms)
    torch.ops.aten.glu.out(halves, 0, out=outputs)
    return torch.addcmul(y, _sum_adapters(outputs), terms.out)


def _fuse_differentiable(
    y: Tensor, h: Tensor, plan: GatedPlan, terms: GateTerms, means: Tensor | None
) -> Tensor:
    """Fuse all tokens out of place, for autograd."""
    base, coef = _base_and_coef(y, terms)
    total = None
    for group in plan.groups:
        hidden = _hidden(h, group)
        normalised = torch.bmm(_normalised(hidden, group, terms), group.centred)
        gates = torch.sigmoid(torch.addcmul(base, normalised, coef))
        if means is not None:
            _members(means, group).add_(_sum_of_mean_gates(gates.detach(), terms))
        part = (gates * torch.bmm(hidden, group.up)).sum(0)
        total = part if total is None else total + part
    assert total is not None, "a plan has at least one adapter"
    return torch.addcmul(y, total, terms.out)


def _hidden(h: Tensor, group: RankGroup) -> Tensor:
    """Return the group's columns of ``h [T, R]`` as a view ``[n, T, r]``."""
    width = group.count * group.rank
    if h.shape[1] != width:
        h = h[:, group.start : group.start + width]
    return h.unflatten(1, (group.count, group.rank)).transpose(0, 1)


def _members(per_adapter: Tensor, group: RankGroup) -> Tensor:
    """Return the group's part of a tensor whose first dimension is the adapters."""
    if per_adapter.shape[0] == group.count:
        return per_adapter
    return per_adapter[group.first : group.first + group.count]


def _normalised(hidden: Tensor, group: RankGroup, terms: GateTerms) -> Tensor:
    """Scale ``hidden [n, T, r]`` so that the centred up-projection gives unit variance."""
    wide = hidden.to(group.covariance.dtype)
    variance = (torch.bmm(wide, group.covariance) * wide).sum(-1, keepdim=True)
    # Rounding can leave a variance of about zero below it.
    scale = variance.clamp(min=0).add_(terms.eps_lora).rsqrt_()
    return (wide * scale).to(hidden.dtype)


def _base_and_coef(y: Tensor, terms: GateTerms) -> tuple[Tensor, Tensor]:
    shape = y.shape[-1:]
    base = F.layer_norm(y, shape, terms.base_weight, terms.base_bias, terms.eps_base)
    coef = F.layer_norm(y, shape, terms.coef_weight, terms.coef_bias, terms.eps_base)
    return base, coef


def _sum_adapters(outputs: Tensor) -> Tensor:
    """Sum ``[N, T, out]`` over the adapters, overwriting it."""
    if outputs.device.type != "cpu":
        return outputs.sum(0)  # one launch, accumulated in float32
    # The CPU's reduction over a short leading dimension takes twice as long as these additions.
    total, *others = outputs.unbind()
    for output in others:
        total += output
    return total


def _sum_of_mean_gates(gates: Tensor, terms: GateTerms) -> Tensor:
    """Return ``w_out * g [n, T, out]`` averaged over channels and summed over tokens, ``[n]``."""
    return (gates.float().sum(1) * terms.out.detach().float()).mean(-1)


def _in_callers_order(means: Tensor, plan: GatedPlan) -> Tensor:
    restored = torch.empty_like(means)
    restored[list(plan.order)] = means
    return restored


def _scaled_up(b: Tensor, strength: float, device: torch.device) -> Tensor:
    """Return ``strength * Bᵀ [r, out]``, at least float32 so that little is lost in the plan."""
    up = b.to(device=device).T
    return (up if up.dtype == torch.float64 else up.float()) * strength
