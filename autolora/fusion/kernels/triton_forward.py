"""Gated fusion as Triton kernels: the forward pass.

Shapes: ``T`` tokens, ``N`` adapters, ``R`` packed ranks, ``C`` output channels.

Two kernels. `statistics_kernel` reads the base output ``y`` once for its layer norm, and brings
the down-projected input ``h`` of every adapter to the scale at which the centred up-projection has
unit variance. `fuse_kernel` reads ``y`` a second time, forms each adapter's output tile by tile on
the matrix units, and writes the result; the adapters' outputs never exist in memory. Adapters,
ranks and strengths come from tensors, so that an exchange of adapters compiles nothing.

All arithmetic is in float32; products take operands of the storage type, accumulated in float32.
"""

# mypy: ignore-errors
# Triton compiles the bodies; its types are not Python's.

from __future__ import annotations

import os

import triton
import triton.language as tl

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
