"""Gated fusion in plain PyTorch, for any device, and its gradients.

Shapes: ``T`` tokens, ``N`` adapters, ``R`` packed ranks, ``out`` channels.

Tokens are taken in chunks and adapters one after the other, so that no temporary is larger than a
chunk of one output: nothing of ``N x T x out`` exists, forward or backward, and the backward pass
computes the gates again instead of keeping them. Everything is computed in float32 at least.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from autolora.fusion.gate import GateTerms
from autolora.fusion.packed import UpProjections

# Elements of one temporary, chunk x out. On a CPU the handful that is alive at a time should stay
# in the cache, but short chunks cost calls; on a GPU memory is the only reason to cut.
CHUNK_ELEMENTS_CPU = 2**18
CHUNK_ELEMENTS_GPU = 2**26


@dataclass(frozen=True, slots=True)
class Gradients:
    """What `backward` returns.

    Attributes:
        y: ``[T, out]``.
        h: ``[T, R]``.
        terms: Of ``base_weight``, ``base_bias``, ``coef_weight``, ``coef_bias`` and ``out``,
            ``[5, out]``.
        centred: ``[R, out]``, None where the factors' gradients are not wanted.
        mean: ``[R]``, likewise.
        covariance: ``[R, W]``, likewise.
    """

    y: Tensor
    h: Tensor
    terms: Tensor
    centred: Tensor | None
    mean: Tensor | None
    covariance: Tensor | None


@dataclass(frozen=True, slots=True)
class _Adapter:
    """One adapter's rows and its numbers per token of a chunk, ``[t, 1]`` each."""

    rows: slice
    hidden: Tensor  # s h, [t, r]
    scaled: Tensor  # s h / deviation, [t, r]
    deviation: Tensor  # sqrt(var + eps)
    mean: Tensor


def forward(
    y: Tensor,
    h: Tensor,
    ups: UpProjections,
    terms: GateTerms,
    record: bool = False,
    chunk_elements: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Add all adapters through the gate to the base output.

    Args:
        y: Base output, ``[T, out]``.
        h: Down-projected input, ``[T, R]``.
        ups: The adapters.
        terms: The gate, at least float32.
        record: Whether to return the mean gates.
        chunk_elements: Size of the largest temporary, in elements; by device where None.

    Returns:
        ``[T, out]`` in the dtype of ``y``, and the mean of ``w_out * g_i`` over tokens and
        channels, ``[N]``, or None.
    """
    fused = torch.empty_like(y, memory_format=torch.contiguous_format)
    sums = y.new_zeros(ups.count, dtype=torch.float32) if record else None
    spans = _spans(ups)
    for rows in _chunks(y, chunk_elements):
        part, wide_h = _widened(y[rows]), _widened(h[rows])
        base, coef = _base_and_coef(part, terms)
        total = gate = None
        for i, rank_rows in enumerate(spans):
            adapter = _adapter(wide_h, ups, i, rank_rows, terms.eps_lora)
            normalised = adapter.scaled @ _widened(ups.centred[adapter.rows])
            gate = torch.addcmul(base, normalised, coef, out=gate).sigmoid_()
            if sums is not None:
                sums[i] += (gate @ terms.out).sum() / y.shape[-1]
            output = normalised.mul_(adapter.deviation).add_(adapter.mean)
            total = output.mul_(gate) if total is None else total.addcmul_(gate, output)
        fused[rows] = part if total is None else torch.addcmul(part, total, terms.out)
    return fused, None if sums is None else sums / max(y.shape[0], 1)


def backward(
    grad: Tensor,
    y: Tensor,
    h: Tensor,
    ups: UpProjections,
    terms: GateTerms,
    factors: bool,
    chunk_elements: int | None = None,
) -> Gradients:
    """Return the gradients of `forward`'s first result.

    Args:
        grad: Of the output, ``[T, out]``.
        y: As given to `forward`.
        h: As given to `forward`.
        ups: As given to `forward`.
        terms: As given to `forward`.
        factors: Whether the gradients of the up-projections are wanted too.
        chunk_elements: As for `forward`.
    """
    wide = torch.promote_types(y.dtype, torch.float32)
    result = Gradients(
        y=torch.empty_like(y, memory_format=torch.contiguous_format),
        h=torch.zeros_like(h, memory_format=torch.contiguous_format),
        terms=y.new_zeros(5, y.shape[-1], dtype=wide),
        centred=torch.zeros_like(ups.centred, dtype=wide) if factors else None,
        mean=torch.zeros_like(ups.mean) if factors else None,
        covariance=torch.zeros_like(ups.covariance) if factors else None,
    )
    for rows in _chunks(y, chunk_elements):
        result.y[rows] = _backward_chunk(
            _widened(grad[rows]), _widened(y[rows]), _widened(h[rows]), rows, ups, terms, result
        )
    return result


def _backward_chunk(
    grad: Tensor,
    y: Tensor,
    h: Tensor,
    rows: slice,
    ups: UpProjections,
    terms: GateTerms,
    result: Gradients,
) -> Tensor:
    """Add one chunk to the gradients; return that of ``y``."""
    z, _, rstd = torch.native_layer_norm(y, y.shape[-1:], None, None, terms.eps_base)
    base, coef = _base_and_coef(y, terms)
    grad_sum = grad * terms.out
    total, grad_base, grad_coef = torch.zeros_like(y), torch.zeros_like(y), torch.zeros_like(y)
    for i, rank_rows in enumerate(_spans(ups)):
        adapter = _adapter(h, ups, i, rank_rows, terms.eps_lora)
        normalised = adapter.scaled @ _widened(ups.centred[adapter.rows])
        gate = torch.addcmul(base, normalised, coef).sigmoid_()
        output = torch.addcmul(adapter.mean, normalised, adapter.deviation)
        total.addcmul_(gate, output)
        grad_argument = output.mul_(grad_sum).mul_(gate).mul_(1 - gate)
        grad_base += grad_argument
        grad_coef.addcmul_(grad_argument, normalised)
        grad_output = gate.mul_(grad_sum)
        grad_normalised = grad_argument.mul_(coef)
        _to_ranks(grad_output, grad_normalised, normalised, adapter, i, rows, ups, result)
    result.terms[0] += (grad_base * z).sum(0)
    result.terms[1] += grad_base.sum(0)
    result.terms[2] += (grad_coef * z).sum(0)
    result.terms[3] += grad_coef.sum(0)
    result.terms[4] += (grad * total).sum(0)
    grad_z = grad_base.mul_(terms.base_weight).addcmul_(grad_coef, terms.coef_weight)
    centred = grad_z - grad_z.mean(-1, keepdim=True)
    return grad + rstd * (centred - z * (grad_z * z).mean(-1, keepdim=True))


def _to_ranks(
    grad_output: Tensor,
    grad_normalised: Tensor,
    normalised: Tensor,
    adapter: _Adapter,
    index: int,
    rows: slice,
    ups: UpProjections,
    result: Gradients,
) -> None:
    """Add one adapter's gradients in the space of its ranks.

    The output is ``s h B`` and the normalised one ``s h B_c / d`` with ``d² = s² hT C h + eps``.
    """
    deviation, strength = adapter.deviation, ups.strengths[index]
    width = adapter.rows.stop - adapter.rows.start
    covariance = ups.covariance[adapter.rows, :width]
    mean = ups.mean[adapter.rows]
    sums = grad_output.sum(-1, keepdim=True)
    # Of the squared deviation, through the normalisation.
    grad_square = (grad_normalised * normalised).sum(-1, keepdim=True) / (-2 * deviation**2)
    both = grad_output.add_(grad_normalised / deviation)
    down = both @ _widened(ups.centred[adapter.rows]).T
    down += sums * mean + 2 * grad_square * (adapter.hidden @ covariance)
    result.h[rows, adapter.rows] = (down * strength).to(result.h.dtype)
    if result.centred is not None and result.mean is not None and result.covariance is not None:
        result.centred[adapter.rows] += adapter.hidden.T @ both
        result.mean[adapter.rows] += (adapter.hidden * sums).sum(0)
        result.covariance[adapter.rows, :width] += adapter.hidden.T @ (adapter.hidden * grad_square)


def _adapter(h: Tensor, ups: UpProjections, index: int, rows: slice, eps: float) -> _Adapter:
    hidden = h[:, rows] * ups.strengths[index]
    covariance = ups.covariance[rows, : rows.stop - rows.start]
    variance = ((hidden @ covariance) * hidden).sum(-1, keepdim=True)
    # Rounding can leave a variance of about zero below it.
    deviation = variance.clamp_(min=0).add_(eps).sqrt_()
    mean = (hidden @ ups.mean[rows])[:, None]
    return _Adapter(rows, hidden, hidden / deviation, deviation, mean)


def _base_and_coef(y: Tensor, terms: GateTerms) -> tuple[Tensor, Tensor]:
    shape = y.shape[-1:]
    base = F.layer_norm(y, shape, terms.base_weight, terms.base_bias, terms.eps_base)
    coef = F.layer_norm(y, shape, terms.coef_weight, terms.coef_bias, terms.eps_base)
    return base, coef


def _spans(ups: UpProjections) -> list[slice]:
    """Return the rows of each place that holds an adapter."""
    offsets = ups.offsets.tolist()
    return [slice(a, b) for a, b in pairwise(offsets) if b > a]


def _chunks(y: Tensor, elements: int | None) -> Iterator[slice]:
    default = CHUNK_ELEMENTS_CPU if y.device.type == "cpu" else CHUNK_ELEMENTS_GPU
    size = max(1, (elements or default) // y.shape[-1])
    return (slice(at, at + size) for at in range(0, y.shape[0], size))


def _widened(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
