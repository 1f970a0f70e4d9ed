"""Gated fusion of one layer by the fastest means at hand, with gradients and for `torch.compile`.

Outside of autograd and compilation the kernels are called directly. Otherwise they are called
through operators of `torch.library`, which a compiler takes as they are (no graph break, nothing
that depends on which adapters are attached) and which autograd knows the gradient of. Forward and
backward pass keep only the arguments: the gates are computed again.
"""

# No `from __future__ import annotations` here: torch.library reads the operators' annotations.

from typing import Any

import torch
from torch import Tensor

from autolora.fusion.gate import GateTerms
from autolora.fusion.kernels import native, plain
from autolora.fusion.packed import UpProjections


def fuse(
    y: Tensor,
    h: Tensor,
    ups: UpProjections,
    terms: GateTerms,
    record: bool = False,
    inplace: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Add all adapters through the gate to the base output.

    Args:
        y: Base output, ``[T, out]``.
        h: Down-projected input, ``[T, R]``.
        ups: The adapters.
        terms: The gate, at least float32.
        record: Whether to return the mean gates.
        inplace: Whether ``y`` may be overwritten; not together with gradients.

    Returns:
        ``[T, out]`` in the dtype of ``y``, and the mean of ``w_out * g_i`` over tokens and
        channels, ``[N]``, or None.
    """
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and _wants_grad(y, h, ups, terms)):
        fused, means = _fuse_op(y, h, *_flat(ups, terms), record)
        return fused, means if record else None
    return _forward(y, h, ups, terms, record, inplace)


def kernel_name(device: torch.device) -> str:
    """Return what computes gated fusion on a device: ``triton``, ``native`` or ``plain``."""
    if device.type == "cuda" and _triton() is not None:
        return "triton"
    if device.type == "cpu" and native.available():
        return "native"
    return "plain"


def _forward(
    y: Tensor, h: Tensor, ups: UpProjections, terms: GateTerms, record: bool, inplace: bool
) -> tuple[Tensor, Tensor | None]:
    if y.is_cuda:
        triton = _triton()
        if triton is not None and triton.supports(y, h, ups):
            return triton.forward(y, h, ups, terms, record, inplace)
    elif native.supports(y, h, ups, terms):
        return native.forward(y, h, ups, terms, record, inplace)
    return plain.forward(y, h, ups, terms, record)


def _backward(
    grad: Tensor, y: Tensor, h: Tensor, ups: UpProjections, terms: GateTerms, factors: bool
) -> plain.Gradients:
    if y.is_cuda:
        triton = _triton()
        if triton is not None and triton.supports(y, h, ups):
            return triton.backward(grad, y, h, ups, terms, factors)
    return plain.backward(grad, y, h, ups, terms, factors)


def _triton() -> Any:
    """Return the module of the Triton kernels, or None where Triton is not installed."""
    global _TRITON
    if _TRITON is _UNKNOWN:
        try:
            from autolora.fusion.kernels import triton

            _TRITON = triton
        except ImportError:
            _TRITON = None
    return _TRITON


_UNKNOWN = object()
_TRITON: Any = _UNKNOWN


def _vectors(terms: GateTerms) -> tuple[Tensor, ...]:
    """Return the gate's tensors in the order of `plain.Gradients.terms`."""
    return terms.base_weight, terms.base_bias, terms.coef_weight, terms.coef_bias, terms.out


def _wants_grad(y: Tensor, h: Tensor, ups: UpProjections, terms: GateTerms) -> bool:
    tensors = (y, h, ups.centred, ups.mean, ups.covariance, *_vectors(terms))
    return any(tensor.requires_grad for tensor in tensors)


def _flat(ups: UpProjections, terms: GateTerms) -> tuple[Any, ...]:
    packed = (ups.centred, ups.mean, ups.covariance, ups.offsets, ups.strengths)
    return (*packed, *_vectors(terms), ups.block, terms.eps_base, terms.eps_lora)


def _nested(
    centred: Tensor,
    mean: Tensor,
    covariance: Tensor,
    offsets: Tensor,
    strengths: Tensor,
    base_weight: Tensor,
    base_bias: Tensor,
    coef_weight: Tensor,
    coef_bias: Tensor,
    out: Tensor,
    block: int,
    eps_base: float,
    eps_lora: float,
) -> tuple[UpProjections, GateTerms]:
    ups = UpProjections(centred, mean, covariance, offsets, strengths, block)
    vectors = (base_weight, base_bias, coef_weight, coef_bias, out)
    return ups, GateTerms(*vectors, eps_base=eps_base, eps_lora=eps_lora)


@torch.library.custom_op("autolora::fuse_gated", mutates_args=())
def _fuse_op(
    y: Tensor,
    h: Tensor,
    centred: Tensor,
    mean: Tensor,
    covariance: Tensor,
    offsets: Tensor,
    strengths: Tensor,
    base_weight: Tensor,
    base_bias: Tensor,
    coef_weight: Tensor,
    coef_bias: Tensor,
    out: Tensor,
    block: int,
    eps_base: float,
    eps_lora: float,
    record: bool,
) -> tuple[Tensor, Tensor]:
    vectors = (base_weight, base_bias, coef_weight, coef_bias, out)
    packed = (centred, mean, covariance, offsets, strengths)
    ups, terms = _nested(*packed, *vectors, block, eps_base, eps_lora)
    fused, means = _forward(y, h, ups, terms, record, inplace=False)
    # An operator's results must be of fixed number and must not be its arguments.
    return fused, y.new_empty(0, dtype=torch.float32) if means is None else means


@_fuse_op.register_fake
def _(y: Tensor, h: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    strengths, record = args[4], args[-1]
    fused = torch.empty_like(y, memory_format=torch.contiguous_format)
    count = strengths.shape[0] if record else 0
    return fused, y.new_empty(count, dtype=torch.float32)


@torch.library.custom_op("autolora::fuse_gated_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    y: Tensor,
    h: Tensor,
    centred: Tensor,
    mean: Tensor,
    covariance: Tensor,
    offsets: Tensor,
    strengths: Tensor,
    base_weight: Tensor,
    base_bias: Tensor,
    coef_weight: Tensor,
    coef_bias: Tensor,
    out: Tensor,
    block: int,
    eps_base: float,
    eps_lora: float,
    factors: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    vectors = (base_weight, base_bias, coef_weight, coef_bias, out)
    packed = (centred, mean, covariance, offsets, strengths)
    ups, terms = _nested(*packed, *vectors, block, eps_base, eps_lora)
    result = _backward(grad, y, h, ups, terms, factors)
    three = (result.centred, result.mean, result.covariance)
    rest = tuple(y.new_empty(0) if gradient is None else gradient for gradient in three)
    return result.y, result.h, result.terms, rest[0], rest[1], rest[2]


@_backward_op.register_fake
def _(grad: Tensor, y: Tensor, h: Tensor, *args: Any) -> tuple[Tensor, ...]:
    centred, mean, covariance, factors = args[0], args[1], args[2], args[-1]
    wide = torch.promote_types(y.dtype, torch.float32)
    contiguous = torch.contiguous_format
    result = [torch.empty_like(t, memory_format=contiguous) for t in (y, h)]
    result.append(y.new_empty(5, y.shape[-1], dtype=wide))
    if not factors:
        return (*result, y.new_empty(0), y.new_empty(0), y.new_empty(0))
    wide_centred = torch.empty_like(centred, dtype=wide)
    return (*result, wide_centred, torch.empty_like(mean), torch.empty_like(covariance))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:12])
    ctx.constants = inputs[12:15]


def _differentiate(ctx: Any, grad: Tensor, _means: Tensor | None) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    factors = any(needed[2:5])
    saved = ctx.saved_tensors
    y, h, terms, *rest = _backward_op(grad, *saved, *ctx.constants, factors)
    ups: list[Tensor | None] = [None, None, None]
    if factors:
        ups = [g.to(t.dtype) for g, t in zip(rest, saved[2:5], strict=True)]
    vectors = [g.to(t.dtype) for g, t in zip(terms, saved[7:12], strict=True)]
    return (y, h, *ups, None, None, *vectors, None, None, None, None)


_fuse_op.register_autograd(_differentiate, setup_context=_setup_context)
