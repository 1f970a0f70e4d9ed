"""Gated fusion on a GPU, forward and backward, by Triton kernels.

The functions have the signatures of `autolora.fusion.kernels.plain`. Arithmetic is in float32;
products take operands of the storage type and are accumulated in float32.

Shapes: ``T`` tokens, ``N`` adapters, ``R`` packed ranks, ``W`` packed rank of the widest adapter
rounded up to a power of two, ``C`` output channels.

Forward: `statistics_kernel` reads the base output ``y`` once for its layer norm, and scales the
down-projected input ``h`` of every adapter so that the centred up-projection has unit variance.
`fuse_kernel` reads ``y`` again, forms each adapter's output tile by tile on the matrix units, and
writes the result; the adapters' outputs never exist in memory. Adapters, ranks and strengths come
from tensors, so that exchanging adapters compiles nothing.

Backward, with ``G`` the gradient of the fused output: gates are computed again, tile by tile, and
the only full-size temporary is one gradient ``[T, C]``. Every sum has a fixed order (no atomics),
so that training is repeatable to the bit.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from autolora.fusion.gate import GateTerms
from autolora.fusion.kernels.plain import Gradients
from autolora.fusion.packed import BLOCKS, UpProjections

# mypy: ignore-errors
# Triton compiles the bodies; its types are not Python's.


MAX_RANK = 128
"""The highest packed rank of one adapter that the kernels are made for."""

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
"""Whether the kernels run as Python on a CPU, to be tested there."""


@triton.jit
def product(left, right, total):
    """Return ``left @ right + total``, accumulated in float32."""
    if INTERPRETED:
        # The interpreter keeps bfloat16 as integers and would multiply those.
        return tl.dot(left.to(tl.float32), right.to(tl.float32), total)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def sigmoid(x, APPROXIMATE: tl.constexpr):
    """Return the logistic function; `APPROXIMATE` uses one instruction, good to 11 bits."""
    if APPROXIMATE:
        half = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [0.5 * x], dtype=tl.float32, is_pure=True, pack=1
        )
        return 0.5 * half + 0.5
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def load_tile(pointer, rows, columns, row_stride, row_mask, column_mask):
    """Return ``[rows, columns]`` in float32, zero outside the masks."""
    address = pointer + rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    return tl.load(address, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(pointer, tile, rows, columns, row_stride, row_mask, column_mask):
    """Write ``[rows, columns]`` in the pointer's type."""
    address = pointer + rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    tl.store(address, tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_channels(pointer, columns, mask):
    """Return a vector over the channels in float32, zero outside the mask."""
    return tl.load(pointer + columns, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def row_statistics(y, y_stride, tokens, token_mask, C, eps, BT: tl.constexpr, BC: tl.constexpr):
    """Return mean and reciprocal deviation of each row of ``y``, in one pass.

    Blocks are merged by the update of Chan, Golub and LeVeque (1979), which loses nothing where
    the mean is large against the deviation.
    """
    mean = tl.zeros([BT], tl.float32)
    square = tl.zeros([BT], tl.float32)
    for start in range(0, C, BC):
        columns = start + tl.arange(0, BC)
        mask = columns < C
        tile = load_tile(y, tokens, columns, y_stride, token_mask, mask)
        size = tl.minimum(C - start, BC).to(tl.float32)
        tile_mean = tl.sum(tile, 1) / size
        centred = tl.where(mask[None, :], tile - tile_mean[:, None], 0.0)
        tile_square = tl.sum(centred * centred, 1)
        step = tile_mean - mean
        seen = start + size
        mean += step * (size / seen)
        square += tile_square + step * step * (start * size / seen)
    return mean, 1.0 / tl.sqrt(square / C + eps)


@triton.jit
def quadratic_form(
    h, covariance, mean, weighted, tokens, token_mask, start, end, h_stride, c_stride,
    KEEP: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Return ``hᵀ C h`` and ``mean(B) h`` of one adapter, ``[BT]`` each; `KEEP` writes ``C h``."""
    variance = tl.zeros([BT], tl.float32)
    output_mean = tl.zeros([BT], tl.float32)
    for k in range(start, end, BK):
        ranks = k + tl.arange(0, BK)
        hidden = load_tile(h, tokens, ranks, h_stride, token_mask, ranks < end)
        weights = tl.load(mean + ranks).to(tl.float32)
        output_mean += tl.sum(hidden * weights[None, :], 1)
        turned = tl.zeros([BT, BK], tl.float32)
        for j in range(start, end, BK):
            others = j + tl.arange(0, BK)
            other = load_tile(h, tokens, others, h_stride, token_mask, others < end)
            tile = load_tile(covariance, others, ranks - start, c_stride, others < end, ranks < end)
            turned = product(other, tile, turned)
        variance += tl.sum(turned * hidden, 1)
        if KEEP:
            store_tile(weighted, turned, tokens, ranks, h_stride, token_mask, ranks < end)
    return variance, output_mean


@triton.jit(do_not_specialize=["T", "count"])
def statistics_kernel(
    y, h, mean, covariance, offsets, strengths,
    y_mean, y_scale, scaled, weighted, deviations, output_means,
    T, C, count, y_stride, h_stride, c_stride, eps_base, eps_lora,
    KEEP: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write the layer-norm statistics of a block of tokens.

    Outputs: mean and reciprocal deviation of ``y`` (``[T]``); ``s h / d`` (``[T, R]``), and per
    adapter ``d = sqrt(var + eps)`` and the mean of its output (``[T, N]``). With `KEEP`, for the
    backward pass, also ``C h`` (``[T, R]``). ``scaled`` and ``weighted`` have the rows of ``h``.
    """
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)
    token_mask = tokens < T
    base_mean, base_scale = row_statistics(y, y_stride, tokens, token_mask, C, eps_base, BT, BC)
    tl.store(y_mean + tokens, base_mean, mask=token_mask)
    tl.store(y_scale + tokens, base_scale, mask=token_mask)
    for i in range(0, count):
        start = tl.load(offsets + i)
        end = tl.load(offsets + i + 1)
        strength = tl.load(strengths + i).to(tl.float32)
        variance, output_mean = quadratic_form(
            h, covariance, mean, weighted, tokens, token_mask, start, end, h_stride, c_stride,
            KEEP, BT, BK,
        )  # fmt: skip
        # Rounding can leave a variance of about zero below it.
        deviation = tl.sqrt(tl.maximum(variance * strength * strength, 0.0) + eps_lora)
        places = tokens.to(tl.int64) * count + i
        tl.store(deviations + places, deviation, mask=token_mask)
        tl.store(output_means + places, output_mean * strength, mask=token_mask)
        factor = strength / deviation
        for k in range(start, end, BK):
            ranks = k + tl.arange(0, BK)
            normal = load_tile(h, tokens, ranks, h_stride, token_mask, ranks < end)
            normal *= factor[:, None]
            if scaled.dtype.element_ty == tl.float16:
                # An output that is equal in all channels has a tiny deviation: infinity in half
                # precision, and NaN times the zeros of its centred up-projection.
                normal = tl.clamp(normal, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL)
            store_tile(scaled, normal, tokens, ranks, h_stride, token_mask, ranks < end)


@triton.jit
def base_and_coef(
    y, y_mean, y_scale, base_weight, base_bias, coef_weight, coef_bias,
    tokens, columns, y_stride, token_mask, column_mask,
):  # fmt: skip
    """Return the normalised ``y`` and the two layer norms that all adapters share."""
    tile = load_tile(y, tokens, columns, y_stride, token_mask, column_mask)
    centre = tl.load(y_mean + tokens, mask=token_mask, other=0.0)
    scale = tl.load(y_scale + tokens, mask=token_mask, other=0.0)
    z = (tile - centre[:, None]) * scale[:, None]
    base = z * load_channels(base_weight, columns, column_mask)[None, :]
    base += load_channels(base_bias, columns, column_mask)[None, :]
    coef = z * load_channels(coef_weight, columns, column_mask)[None, :]
    coef += load_channels(coef_bias, columns, column_mask)[None, :]
    return z, base, coef


@triton.jit
def up_projection(
    scaled, centred, tokens, columns, scaled_stride, up_stride, token_mask, column_mask,
    start, end, BT: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Return one adapter's normalised output for a tile, ``[BT, BC]``."""
    normalised = tl.zeros([BT, BC], tl.float32)
    for k in range(start, end, BK):
        ranks = k + tl.arange(0, BK)
        left = tl.load(
            scaled + tokens.to(tl.int64)[:, None] * scaled_stride + ranks[None, :],
            mask=token_mask[:, None] & (ranks < end)[None, :],
            other=0.0,
        )
        right = tl.load(
            centred + ranks.to(tl.int64)[:, None] * up_stride + columns[None, :],
            mask=(ranks < end)[:, None] & column_mask[None, :],
            other=0.0,
        )
        normalised = product(left, right, normalised)
    return normalised


@triton.jit(do_not_specialize=["T", "count"])
def fuse_kernel(
    y, fused, scaled, centred, offsets, y_mean, y_scale, deviations, output_means,
    base_weight, base_bias, coef_weight, coef_bias, out_weight, gate_sums,
    T, C, count, y_stride, fused_stride, scaled_stride, up_stride,
    RECORD: tl.constexpr, APPROXIMATE: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write one tile of the fused output; ``fused`` may be ``y`` itself.

    With `RECORD` also write the sum of ``w_out * g_i`` over the tile, ``[programs, N]``.
    """
    tokens = tl.program_id(1) * BT + tl.arange(0, BT)
    columns = tl.program_id(0) * BC + tl.arange(0, BC)
    token_mask, column_mask = tokens < T, columns < C
    _z, base, coef = base_and_coef(
        y, y_mean, y_scale, base_weight, base_bias, coef_weight, coef_bias,
        tokens, columns, y_stride, token_mask, column_mask,
    )  # fmt: skip
    weight = load_channels(out_weight, columns, column_mask)
    total = tl.zeros([BT, BC], tl.float32)
    for i in range(0, count):
        start = tl.load(offsets + i)
        end = tl.load(offsets + i + 1)
        if end > start:
            normalised = up_projection(
                scaled, centred, tokens, columns, scaled_stride, up_stride, token_mask,
                column_mask, start, end, BT, BC, BK,
            )  # fmt: skip
            gate = sigmoid(base + normalised * coef, APPROXIMATE)
            places = tokens.to(tl.int64) * count + i
            deviation = tl.load(deviations + places, mask=token_mask, other=0.0)
            output_mean = tl.load(output_means + places, mask=token_mask, other=0.0)
            total += gate * (normalised * deviation[:, None] + output_mean[:, None])
            if RECORD:
                mask = token_mask[:, None] & column_mask[None, :]
                said = tl.sum(tl.sum(tl.where(mask, gate * weight[None, :], 0.0), 1), 0)
                program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
                tl.store(gate_sums + program * count + i, said)
    # Read again from the cache: kept in registers through the loop it would halve the occupancy.
    tile = load_tile(y, tokens, columns, y_stride, token_mask, column_mask)
    result = tile + total * weight[None, :]
    store_tile(fused, result, tokens, columns, fused_stride, token_mask, column_mask)


# mypy: ignore-errors
# Triton compiles the bodies; its types are not Python's.


@triton.jit
def adapter_tile(
    base, coef, grad_sum, scaled, centred, deviations, output_means, tokens, columns,
    scaled_stride, up_stride, token_mask, column_mask, start, end, i, count,
    APPROXIMATE: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Compute one adapter's tile again.

    Returns its normalised output, its gate, its output, the gradient of the gate's argument, and
    the deviations ``[BT]``.
    """
    normalised = up_projection(
        scaled, centred, tokens, columns, scaled_stride, up_stride, token_mask, column_mask,
        start, end, BT, BC, W,
    )  # fmt: skip
    gate = sigmoid(base + normalised * coef, APPROXIMATE)
    places = tokens.to(tl.int64) * count + i
    deviation = tl.load(deviations + places, mask=token_mask, other=1.0)
    output_mean = tl.load(output_means + places, mask=token_mask, other=0.0)
    output = normalised * deviation[:, None] + output_mean[:, None]
    grad_argument = grad_sum * output * gate * (1.0 - gate)
    return normalised, gate, output, grad_argument, deviation


@triton.jit(do_not_specialize=["T", "count"])
def adapter_kernel(
    grad, y, scaled, weighted, centred, mean, offsets, strengths,
    y_mean, y_scale, deviations, output_means,
    base_weight, base_bias, coef_weight, coef_bias, out_weight,
    grad_h, output_sums, grad_squares,
    T, C, count, grad_stride, y_stride, scaled_stride, up_stride,
    APPROXIMATE: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Write the gradient of ``h`` for a block of tokens and one adapter; its rows are ``scaled``'s.

    Also writes two sums per token for the gradients of the factors, ``[T, N]``: of the output's
    gradient over the channels, and the gradient of the squared deviation.
    """
    i = tl.program_id(1)
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)
    token_mask = tokens < T
    start = tl.load(offsets + i)
    end = tl.load(offsets + i + 1)
    ranks = start + tl.arange(0, W)
    rank_mask = ranks < end
    down = tl.zeros([BT, W], tl.float32)
    sums = tl.zeros([BT], tl.float32)
    through_scale = tl.zeros([BT], tl.float32)
    places = tokens.to(tl.int64) * count + i
    deviation = tl.load(deviations + places, mask=token_mask, other=1.0)
    for c in range(0, C, BC):
        columns = c + tl.arange(0, BC)
        column_mask = columns < C
        _z, base, coef = base_and_coef(
            y, y_mean, y_scale, base_weight, base_bias, coef_weight, coef_bias,
            tokens, columns, y_stride, token_mask, column_mask,
        )  # fmt: skip
        grad_sum = load_tile(grad, tokens, columns, grad_stride, token_mask, column_mask)
        grad_sum *= load_channels(out_weight, columns, column_mask)[None, :]
        normalised, gate, _output, grad_argument, _d = adapter_tile(
            base, coef, grad_sum, scaled, centred, deviations, output_means, tokens, columns,
            scaled_stride, up_stride, token_mask, column_mask, start, end, i, count,
            APPROXIMATE, BT, BC, W,
        )  # fmt: skip
        grad_output = grad_sum * gate
        grad_normalised = grad_argument * coef
        sums += tl.sum(grad_output, 1)
        through_scale += tl.sum(grad_normalised * normalised, 1)
        both = grad_output + grad_normalised / deviation[:, None]
        up = tl.load(
            centred + ranks.to(tl.int64)[:, None] * up_stride + columns[None, :],
            mask=rank_mask[:, None] & column_mask[None, :],
            other=0.0,
        )
        down = product(both.to(up.dtype), tl.trans(up), down)
    strength = tl.load(strengths + i).to(tl.float32)
    grad_square = through_scale / (-2.0 * deviation * deviation)
    turned = load_tile(weighted, tokens, ranks, scaled_stride, token_mask, rank_mask)
    down += (2.0 * strength * grad_square)[:, None] * turned
    means = tl.load(mean + ranks, mask=rank_mask, other=0.0).to(tl.float32)
    down += sums[:, None] * means[None, :]
    store_tile(grad_h, down * strength, tokens, ranks, scaled_stride, token_mask, rank_mask)
    tl.store(output_sums + places, sums, mask=token_mask)
    tl.store(grad_squares + places, grad_square, mask=token_mask)


@triton.jit(do_not_specialize=["T", "count", "tiles"])
def channel_kernel(
    grad, y, scaled, centred, offsets, y_mean, y_scale, deviations, output_means,
    base_weight, base_bias, coef_weight, coef_bias, out_weight,
    grad_z, partial_terms,
    T, C, count, tiles, grad_stride, y_stride, grad_z_stride, scaled_stride, up_stride,
    APPROXIMATE: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the normalised ``y``, and partial sums of the gate's own gradients.

    A program takes ``tiles`` blocks of tokens; the partial sums are ``[programs, 5, C]``.
    """
    columns = tl.program_id(0) * BC + tl.arange(0, BC)
    column_mask = columns < C
    weight = load_channels(out_weight, columns, column_mask)[None, :]
    base_scale = load_channels(base_weight, columns, column_mask)[None, :]
    coef_scale = load_channels(coef_weight, columns, column_mask)[None, :]
    sum_base = tl.zeros([BC], tl.float32)
    sum_base_z = tl.zeros([BC], tl.float32)
    sum_coef = tl.zeros([BC], tl.float32)
    sum_coef_z = tl.zeros([BC], tl.float32)
    sum_out = tl.zeros([BC], tl.float32)
    for block in range(0, tiles):
        tokens = (tl.program_id(1) * tiles + block) * BT + tl.arange(0, BT)
        token_mask = tokens < T
        z, base, coef = base_and_coef(
            y, y_mean, y_scale, base_weight, base_bias, coef_weight, coef_bias,
            tokens, columns, y_stride, token_mask, column_mask,
        )  # fmt: skip
        upstream = load_tile(grad, tokens, columns, grad_stride, token_mask, column_mask)
        total = tl.zeros([BT, BC], tl.float32)
        grad_base = tl.zeros([BT, BC], tl.float32)
        grad_coef = tl.zeros([BT, BC], tl.float32)
        for i in range(0, count):
            start = tl.load(offsets + i)
            end = tl.load(offsets + i + 1)
            if end > start:
                normalised, gate, output, grad_argument, _d = adapter_tile(
                    base, coef, upstream * weight, scaled, centred, deviations, output_means,
                    tokens, columns, scaled_stride, up_stride, token_mask, column_mask,
                    start, end, i, count, APPROXIMATE, BT, BC, BK,
                )  # fmt: skip
                total += gate * output
                grad_base += grad_argument
                grad_coef += grad_argument * normalised
        sum_base += tl.sum(grad_base, 0)
        sum_base_z += tl.sum(grad_base * z, 0)
        sum_coef += tl.sum(grad_coef, 0)
        sum_coef_z += tl.sum(grad_coef * z, 0)
        sum_out += tl.sum(upstream * total, 0)
        whole = grad_base * base_scale + grad_coef * coef_scale
        store_tile(grad_z, whole, tokens, columns, grad_z_stride, token_mask, column_mask)
    place = partial_terms + tl.program_id(1).to(tl.int64) * 5 * C + columns
    tl.store(place, sum_base_z, mask=column_mask)
    tl.store(place + C, sum_base, mask=column_mask)
    tl.store(place + 2 * C, sum_coef_z, mask=column_mask)
    tl.store(place + 3 * C, sum_coef, mask=column_mask)
    tl.store(place + 4 * C, sum_out, mask=column_mask)


@triton.jit(do_not_specialize=["T"])
def base_kernel(
    grad, y, grad_z, y_mean, y_scale, grad_y,
    T, C, grad_stride, y_stride, grad_z_stride, grad_y_stride,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write the gradient of ``y``: the upstream one plus that through its layer norm."""
    tokens = tl.program_id(0) * BT + tl.arange(0, BT)
    token_mask = tokens < T
    centre = tl.load(y_mean + tokens, mask=token_mask, other=0.0)[:, None]
    scale = tl.load(y_scale + tokens, mask=token_mask, other=0.0)[:, None]
    mean = tl.zeros([BT], tl.float32)
    mean_z = tl.zeros([BT], tl.float32)
    for c in range(0, C, BC):
        columns = c + tl.arange(0, BC)
        mask = columns < C
        z = (load_tile(y, tokens, columns, y_stride, token_mask, mask) - centre) * scale
        part = load_tile(grad_z, tokens, columns, grad_z_stride, token_mask, mask)
        mean += tl.sum(part, 1) / C
        mean_z += tl.sum(part * z, 1) / C
    for c in range(0, C, BC):
        columns = c + tl.arange(0, BC)
        mask = columns < C
        z = (load_tile(y, tokens, columns, y_stride, token_mask, mask) - centre) * scale
        part = load_tile(grad_z, tokens, columns, grad_z_stride, token_mask, mask)
        upstream = load_tile(grad, tokens, columns, grad_stride, token_mask, mask)
        whole = upstream + scale * (part - mean[:, None] - z * mean_z[:, None])
        store_tile(grad_y, whole, tokens, columns, grad_y_stride, token_mask, mask)


@triton.jit(do_not_specialize=["T", "count"])
def factor_kernel(
    grad, y, h, scaled, centred, offsets, strengths, y_mean, y_scale, deviations, output_means,
    base_weight, base_bias, coef_weight, coef_bias, out_weight,
    grad_centred,
    T, C, count, grad_stride, y_stride, h_stride, scaled_stride, up_stride,
    APPROXIMATE: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one adapter's centred up-projection for a block of channels."""
    i = tl.program_id(1)
    columns = tl.program_id(0) * BC + tl.arange(0, BC)
    column_mask = columns < C
    start = tl.load(offsets + i)
    end = tl.load(offsets + i + 1)
    ranks = start + tl.arange(0, W)
    rank_mask = ranks < end
    strength = tl.load(strengths + i).to(tl.float32)
    weight = load_channels(out_weight, columns, column_mask)[None, :]
    result = tl.zeros([W, BC], tl.float32)
    for t in range(0, T, BT):
        tokens = t + tl.arange(0, BT)
        token_mask = tokens < T
        _z, base, coef = base_and_coef(
            y, y_mean, y_scale, base_weight, base_bias, coef_weight, coef_bias,
            tokens, columns, y_stride, token_mask, column_mask,
        )  # fmt: skip
        grad_sum = load_tile(grad, tokens, columns, grad_stride, token_mask, column_mask) * weight
        _n, gate, _output, grad_argument, deviation = adapter_tile(
            base, coef, grad_sum, scaled, centred, deviations, output_means, tokens, columns,
            scaled_stride, up_stride, token_mask, column_mask, start, end, i, count,
            APPROXIMATE, BT, BC, W,
        )  # fmt: skip
        both = grad_sum * gate + grad_argument * coef / deviation[:, None]
        hidden = load_tile(h, tokens, ranks, h_stride, token_mask, rank_mask) * strength
        left = tl.trans(hidden).to(h.dtype.element_ty)
        result = product(left, both.to(h.dtype.element_ty), result)
    store_tile(grad_centred, result, ranks, columns, C, rank_mask, column_mask)


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Tile:
    """Sizes of one program's work: tokens, channels, and warps."""

    tokens: int
    channels: int
    warps: int


STATISTICS_TILE = Tile(16, 512, 8)
FUSE_TILE = Tile(32, 64, 8)
FUSE_TILE_FEW_TOKENS = Tile(16, 64, 4)
ADAPTER_TILE = Tile(32, 64, 8)
CHANNEL_TILE = Tile(32, 64, 8)
BASE_TILE = Tile(4, 512, 4)
FACTOR_TILE = Tile(32, 64, 8)

_CHANNEL_GROUPS = 32  # programs over the tokens that each keep partial sums for the gate


@dataclass(frozen=True, slots=True)
class _Statistics:
    """What the first kernel leaves for the others."""

    y_mean: Tensor
    y_scale: Tensor
    scaled: Tensor
    weighted: Tensor
    deviations: Tensor
    output_means: Tensor


def supports(y: Tensor, h: Tensor, ups: UpProjections) -> bool:
    """Whether the kernels can compute this; `plain` serves everything else."""
    on_gpu = y.is_cuda or (INTERPRETED.value and y.device.type == "cpu")
    return (
        on_gpu
        and y.dtype in _DTYPES
        and h.dtype == ups.centred.dtype == y.dtype
        and ups.block in BLOCKS
        and ups.covariance.shape[1] <= MAX_RANK
        and y.numel() > 0
    )


def forward(
    y: Tensor,
    h: Tensor,
    ups: UpProjections,
    terms: GateTerms,
    record: bool = False,
    inplace: bool = False,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Add all adapters through the gate to the base output; see `plain.forward`.

    Args:
        y: Base output, ``[T, C]``.
        h: Down-projected input, ``[T, R]``.
        ups: The adapters.
        terms: The gate.
        record: Whether to return the mean gates.
        inplace: Whether ``y`` may be overwritten with the result.
        tile: Sizes of the second kernel's programs; chosen by the number of tokens where None.
    """
    y, h = _rows(y), h.contiguous()
    tokens, channels = y.shape
    statistics = _statistics(y, h, ups, terms, False)
    fused = y if inplace else torch.empty_like(y)
    tile = tile or (FUSE_TILE if tokens > FUSE_TILE_FEW_TOKENS.tokens else FUSE_TILE_FEW_TOKENS)
    grid = (_cdiv(channels, tile.channels), _cdiv(tokens, tile.tokens))
    shape = (grid[0] * grid[1], ups.count) if record else (1, 1)
    # Zeros where there is something to sum: places without an adapter are not written.
    sums = (torch.zeros if record else torch.empty)(shape, dtype=torch.float32, device=y.device)
    with _on(y):
        fuse_kernel[grid](
            y, fused, statistics.scaled, ups.centred, ups.offsets,
            statistics.y_mean, statistics.y_scale, statistics.deviations, statistics.output_means,
            terms.base_weight, terms.base_bias, terms.coef_weight, terms.coef_bias, terms.out, sums,
            tokens, channels, ups.count,
            y.stride(0), fused.stride(0), statistics.scaled.stride(0), ups.centred.stride(0),
            RECORD=record, APPROXIMATE=_approximate(y),
            BT=tile.tokens, BC=tile.channels, BK=ups.block, num_warps=tile.warps,
        )  # fmt: skip
    return fused, sums.sum(0) / (tokens * channels) if record else None


def backward(
    grad: Tensor, y: Tensor, h: Tensor, ups: UpProjections, terms: GateTerms, factors: bool
) -> Gradients:
    """Return the gradients of `forward`'s first result; see `plain.backward`."""
    grad, y, h = _rows(grad), _rows(y), h.contiguous()
    statistics = _statistics(y, h, ups, terms, True)
    grad_h, sums, squares = _hidden_gradient(grad, y, ups, terms, statistics)
    grad_y, grad_terms = _base_gradient(grad, y, ups, terms, statistics)
    if not factors:
        return Gradients(grad_y, grad_h, grad_terms, None, None, None)
    centred = _factor_gradient(grad, y, h, ups, terms, statistics)
    mean, covariance = _moment_gradients(h, ups, sums, squares)
    return Gradients(grad_y, grad_h, grad_terms, centred, mean, covariance)


def _statistics(
    y: Tensor, h: Tensor, ups: UpProjections, terms: GateTerms, keep: bool
) -> _Statistics:
    tokens, channels = y.shape
    y_mean, y_scale = (torch.empty(tokens, dtype=torch.float32, device=y.device) for _ in range(2))
    deviations, output_means = (
        torch.empty(tokens, ups.count, dtype=torch.float32, device=y.device) for _ in range(2)
    )
    scaled = torch.empty_like(h)
    weighted = torch.empty_like(scaled, dtype=torch.float32) if keep else scaled
    result = _Statistics(y_mean, y_scale, scaled, weighted, deviations, output_means)
    tile = STATISTICS_TILE
    with _on(y):
        statistics_kernel[(_cdiv(tokens, tile.tokens),)](
            y, h, ups.mean, ups.covariance, ups.offsets, ups.strengths,
            result.y_mean, result.y_scale, scaled, weighted,
            result.deviations, result.output_means,
            tokens, channels, ups.count,
            y.stride(0), h.stride(0), ups.covariance.stride(0), terms.eps_base, terms.eps_lora,
            # The smallest block here: the larger ones take registers that the reading needs.
            KEEP=keep, BT=tile.tokens, BC=tile.channels, BK=BLOCKS[-1], num_warps=tile.warps,
        )  # fmt: skip
    return result


def _hidden_gradient(
    grad: Tensor, y: Tensor, ups: UpProjections, terms: GateTerms, s: _Statistics
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, channels = y.shape
    grad_h = torch.zeros_like(s.scaled)
    shape = (tokens, ups.count)
    sums, squares = (torch.empty(shape, dtype=torch.float32, device=y.device) for _ in range(2))
    tile = ADAPTER_TILE
    with _on(y):
        adapter_kernel[(_cdiv(tokens, tile.tokens), ups.count)](
            grad, y, s.scaled, s.weighted, ups.centred, ups.mean, ups.offsets, ups.strengths,
            s.y_mean, s.y_scale, s.deviations, s.output_means,
            terms.base_weight, terms.base_bias, terms.coef_weight, terms.coef_bias, terms.out,
            grad_h, sums, squares,
            tokens, channels, ups.count, grad.stride(0), y.stride(0),
            s.scaled.stride(0), ups.centred.stride(0),
            APPROXIMATE=_approximate(y), BT=tile.tokens, BC=tile.channels,
            W=_width(ups), num_warps=tile.warps,
        )  # fmt: skip
    return grad_h, sums, squares


def _base_gradient(
    grad: Tensor, y: Tensor, ups: UpProjections, terms: GateTerms, s: _Statistics
) -> tuple[Tensor, Tensor]:
    tokens, channels = y.shape
    tile = CHANNEL_TILE
    blocks = _cdiv(tokens, tile.tokens)
    tiles = _cdiv(blocks, _CHANNEL_GROUPS)
    groups = _cdiv(blocks, tiles)
    grad_z, grad_y = torch.empty_like(y), torch.empty_like(y)
    partial = torch.empty(groups, 5, channels, dtype=torch.float32, device=y.device)
    with _on(y):
        channel_kernel[(_cdiv(channels, tile.channels), groups)](
            grad, y, s.scaled, ups.centred, ups.offsets,
            s.y_mean, s.y_scale, s.deviations, s.output_means,
            terms.base_weight, terms.base_bias, terms.coef_weight, terms.coef_bias, terms.out,
            grad_z, partial,
            tokens, channels, ups.count, tiles, grad.stride(0), y.stride(0), grad_z.stride(0),
            s.scaled.stride(0), ups.centred.stride(0),
            APPROXIMATE=_approximate(y), BT=tile.tokens, BC=tile.channels, BK=ups.block,
            num_warps=tile.warps,
        )  # fmt: skip
        tile = BASE_TILE
        base_kernel[(_cdiv(tokens, tile.tokens),)](
            grad, y, grad_z, s.y_mean, s.y_scale, grad_y,
            tokens, channels, grad.stride(0), y.stride(0), grad_z.stride(0), grad_y.stride(0),
            BT=tile.tokens, BC=tile.channels, num_warps=tile.warps,
        )  # fmt: skip
    return grad_y, partial.sum(0)


def _factor_gradient(
    grad: Tensor, y: Tensor, h: Tensor, ups: UpProjections, terms: GateTerms, s: _Statistics
) -> Tensor:
    tokens, channels = y.shape
    result = torch.zeros(ups.centred.shape, dtype=torch.float32, device=y.device)
    tile = FACTOR_TILE
    with _on(y):
        factor_kernel[(_cdiv(channels, tile.channels), ups.count)](
            grad, y, h, s.scaled, ups.centred, ups.offsets, ups.strengths,
            s.y_mean, s.y_scale, s.deviations, s.output_means,
            terms.base_weight, terms.base_bias, terms.coef_weight, terms.coef_bias, terms.out,
            result,
            tokens, channels, ups.count, grad.stride(0), y.stride(0), h.stride(0),
            s.scaled.stride(0), ups.centred.stride(0),
            APPROXIMATE=_approximate(y), BT=tile.tokens, BC=tile.channels,
            W=_width(ups), num_warps=tile.warps,
        )  # fmt: skip
    return result


def _moment_gradients(
    h: Tensor, ups: UpProjections, sums: Tensor, squares: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the means and covariances: small products over the tokens."""
    mean, covariance = torch.zeros_like(ups.mean), torch.zeros_like(ups.covariance)
    offsets = ups.offsets.tolist()
    for i, (start, end) in enumerate(pairwise(offsets)):
        if end > start:
            hidden = h[:, start:end].float() * ups.strengths[i]
            mean[start:end] = sums[:, i] @ hidden
            covariance[start:end, : end - start] = hidden.T @ (hidden * squares[:, i : i + 1])
    return mean, covariance


def _rows(tensor: Tensor) -> Tensor:
    """Return the tensor with adjacent channels; rows may be apart."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _width(ups: UpProjections) -> int:
    return max(BLOCKS[-1], triton.next_power_of_2(ups.covariance.shape[1]))


def _approximate(y: Tensor) -> bool:
    """Whether an 11-bit sigmoid is as good as the output's own rounding, and there is one."""
    return y.is_cuda and y.dtype != torch.float32 and torch.version.cuda is not None


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _on(tensor: Tensor) -> Any:
    """Make the tensor's device the current one; Triton launches there."""
    return torch.cuda.device_of(tensor)
