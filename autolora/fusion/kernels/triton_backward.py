"""Gated fusion as Triton kernels: the backward pass.

Shapes and names as in `triton_forward`; ``G`` is the gradient of the fused output, and ``W`` the
packed rank of the widest adapter rounded up to a power of two. The gates are computed again, tile
by tile; the only full-size temporary is one gradient ``[T, C]``. Every sum has a fixed order: no
atomics, so that training is repeatable to the bit.
"""

# mypy: ignore-errors
# Triton compiles the bodies; its types are not Python's.

from __future__ import annotations

import triton
import triton.language as tl

from autolora.fusion.kernels.triton_forward import (
    base_and_coef,
    load_channels,
    load_tile,
    product,
    sigmoid,
    store_tile,
    up_projection,
)


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
