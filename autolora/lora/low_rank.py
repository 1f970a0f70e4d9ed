"""Low-rank forms of changes that are none: truncated singular value decompositions.

The best approximation of a matrix at a rank is its truncated SVD (Eckart and Young, 1936). Where
the structure of a change gives that without its dense matrix, it is used; the rest goes through
randomized subspace iteration (Halko, Martinsson and Tropp, https://arxiv.org/abs/0909.4061,
algorithm 4.4) with an error that is measured, not estimated.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from autolora.lora.deltas import ROW_BLOCK, Hadamard, Kronecker, LayerDelta, LowRank, Matrix, Piece

# Below this a full decomposition takes well under a second.
_SMALL = 512
_OVERSAMPLING = 16
_MAX_ITERATIONS = 12
# Subspace iteration stops when another pass captures less than this share of the energy more.
_GAIN = 1e-4


def low_rank_delta(delta: LayerDelta, rank: int, base: Tensor | None) -> LayerDelta:
    """Replace every piece that is not low-rank by its best approximation.

    Args:
        delta: The change of one layer.
        rank: Rank of each approximated piece; those that are low-rank are kept as they are.
        base: Weight of the layer ``[out, in]``, needed where `LayerDelta.needs_base`.

    Returns:
        A change of low-rank pieces on the same rows, whose ``error`` is the relative Frobenius
        norm of the difference.
    """
    pieces: list[Piece] = []
    lost = total = 0.0
    for piece in delta.pieces:
        if piece.magnitude is None and isinstance(piece.change, LowRank):
            pieces.append(piece)
            total += piece.change.square_norm()
            continue
        change, missing, energy = _approximate(piece, delta, rank, base)
        pieces.append(Piece(change, piece.rows))
        lost, total = lost + missing, total + energy
    error = math.sqrt(lost / total) if total > 0 else 0.0
    return replace(delta, pieces=tuple(pieces), error=error)


def _approximate(
    piece: Piece, delta: LayerDelta, rank: int, base: Tensor | None
) -> tuple[LowRank, float, float]:
    """A piece as factors, the squared norm of what they lack, and that of the piece."""
    change = piece.change
    if piece.magnitude is None and isinstance(change, Kronecker):
        return _kronecker(change, rank)
    if (
        piece.magnitude is None
        and isinstance(change, Hadamard)
        and change.joined_rank <= min(change.shape) // 2
    ):
        A, B = change.factors()
        return _truncate(_decompose_product(B, A), rank)
    return _dense(_dense_rows(piece, delta, base), rank)


def _dense_rows(piece: Piece, delta: LayerDelta, base: Tensor | None) -> Tensor:
    """A piece's own rows in float32 ``[m, in]``, in its own order."""
    alone = LayerDelta(delta.out_features, delta.in_features, (piece,)).dense(base)
    return torch.cat([alone[rows] for rows in piece.rows])


@dataclass(frozen=True)
class _Triples:
    """The leading singular triples ``u s v`` of a matrix, and the squared norm of the rest."""

    u: Tensor
    s: Tensor
    v: Tensor
    rest: float = 0.0

    @property
    def energy(self) -> float:
        """Squared Frobenius norm of the whole matrix."""
        return float(self.s.square().sum()) + self.rest


def _decompose(matrix: Tensor, rank: int) -> _Triples:
    """All triples of a small matrix, the leading `rank` of a large one."""
    if min(matrix.shape) > max(_SMALL, 2 * rank):
        return _randomized(matrix.to(torch.float32), rank)
    return _Triples(*torch.linalg.svd(matrix.to(torch.float64), full_matrices=False))


def _decompose_product(left: Tensor, right: Tensor) -> _Triples:
    """SVD of ``left @ right`` without the product: QR of both, then a small SVD."""
    q_left, r_left = torch.linalg.qr(left.to(torch.float64))
    q_right, r_right = torch.linalg.qr(right.to(torch.float64).T)
    u, s, v = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return _Triples(q_left @ u, s, v @ q_right.T)


def _decompose_side(side: Matrix, rank: int) -> _Triples:
    if side.whole is None:
        return _decompose_product(side.left(), side.right())
    return _decompose(side.whole, rank)


def _truncate(parts: _Triples, rank: int) -> tuple[LowRank, float, float]:
    """The leading triples as factors, the squared norm of the others, and that of all."""
    root = parts.s[:rank].sqrt()
    kept = LowRank(
        (root[:, None] * parts.v[:rank]).to(torch.float32),
        (parts.u[:, :rank] * root).to(torch.float32),
    )
    return kept, float(parts.s[rank:].square().sum()) + parts.rest, parts.energy


def _kronecker(change: Kronecker, rank: int) -> tuple[LowRank, float, float]:
    """Singular triples of a Kronecker product are the products of its sides' triples."""
    first, second = _decompose_side(change.w1, rank), _decompose_side(change.w2, rank)
    products = torch.outer(first.s.double(), second.s.double()).flatten() * abs(change.scale)
    order = torch.argsort(products, descending=True)
    kept = order[:rank]
    i, j = kept // len(second.s), kept % len(second.s)
    root = products[kept].sqrt()
    u = torch.einsum("ak,bk->abk", first.u[:, i].double(), second.u[:, j].double()).flatten(0, 1)
    v = torch.einsum("kc,kd->kcd", first.v[i].double(), second.v[j].double()).flatten(1)
    sign = -1.0 if change.scale < 0 else 1.0
    factors = LowRank((root[:, None] * v).to(torch.float32), (u * root * sign).to(torch.float32))
    beyond = first.rest * second.energy + (first.energy - first.rest) * second.rest
    missing = float(products[order[rank:]].square().sum()) + beyond * change.scale**2
    return factors, missing, first.energy * second.energy * change.scale**2


def _dense(matrix: Tensor, rank: int) -> tuple[LowRank, float, float]:
    """Truncated SVD of a dense float32 matrix; the error is that of the factors returned."""
    kept, _, energy = _truncate(_decompose(matrix, rank), rank)
    return kept, _residual(matrix, kept.B, kept.A), energy


def _residual(matrix: Tensor, left: Tensor, right: Tensor) -> float:
    """Squared Frobenius norm of ``matrix - left @ right``."""
    pairs = zip(matrix.split(ROW_BLOCK), left.split(ROW_BLOCK), strict=True)
    return math.fsum(
        float((rows - up @ right).to(torch.float64).square().sum()) for rows, up in pairs
    )


def _randomized(matrix: Tensor, rank: int) -> _Triples:
    """Subspace iteration until a pass captures nothing more; deterministic."""
    size = min(rank + _OVERSAMPLING, *matrix.shape)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], size, generator=generator).to(matrix)
    q = torch.linalg.qr(matrix @ start).Q
    projected = q.T @ matrix
    captured = float(projected.square().sum())
    energy = float(torch.linalg.matrix_norm(matrix)) ** 2
    for _ in range(_MAX_ITERATIONS):
        q = torch.linalg.qr(matrix @ torch.linalg.qr(projected.T).Q).Q
        projected = q.T @ matrix
        before, captured = captured, float(projected.square().sum())
        if captured - before <= _GAIN * energy:
            break
    u, s, v = torch.linalg.svd(projected, full_matrices=False)
    u, s, v = q @ u[:, :rank], s[:rank], v[:rank]
    return _Triples(u, s, v, _residual(matrix, u * s, v))
