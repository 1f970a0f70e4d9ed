"""Gated fusion on a GPU: checks, buffers and launches of the Triton kernels.

The functions have the signatures of `autolora.fusion.kernels.plain`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import triton
from torch import Tensor

from autolora.fusion.gate import GateTerms
from autolora.fusion.kernels import triton_backward as bw
from autolora.fusion.kernels import triton_forward as fw
from autolora.fusion.kernels.plain import Gradients
from autolora.fusion.plans import BLOCKS, UpProjections

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
    on_gpu = y.is_cuda or (fw.INTERPRETED.value and y.device.type == "cpu")
    return (
        on_gpu
        and y.dtype in _DTYPES
        and h.dtype == ups.centred.dtype == y.dtype
        and ups.block in BLOCKS
        and ups.covariance.shape[1] <= fw.MAX_RANK
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
        fw.fuse_kernel[grid](
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
        fw.statistics_kernel[(_cdiv(tokens, tile.tokens),)](
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
        bw.adapter_kernel[(_cdiv(tokens, tile.tokens), ups.count)](
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
        bw.channel_kernel[(_cdiv(channels, tile.channels), groups)](
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
        bw.base_kernel[(_cdiv(tokens, tile.tokens),)](
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
        bw.factor_kernel[(_cdiv(channels, tile.channels), ups.count)](
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
