"""Weight changes: the kinds that adapters are made of, and how those of one layer are joined.

Shapes: ``r`` is the rank of a factor, ``R`` the joined rank of a layer, ``m`` the output rows that
a module of the file stands for, ``n`` its inputs, ``out`` and ``in`` the layer's features.

- `LowRank`: ``scale * B @ A`` (LoRA, https://arxiv.org/abs/2106.09685, section 4.1).
- `Kronecker`: ``scale * kron(w1, w2)`` (LoKr, https://arxiv.org/abs/2212.10650 and LyCORIS,
  https://arxiv.org/abs/2309.14859), each of the two a matrix or a product.
- `Hadamard`: ``scale * (a1 @ b1) * (a2 @ b2)`` (FedPara, https://arxiv.org/abs/2108.06098,
  proposition 2; LyCORIS calls it LoHa).
- `Full`: the difference itself.

Every kind gives any of its rows in float64, so that a dense result is rounded once.

A `Piece` is a change of some output rows, and with DoRA (https://arxiv.org/abs/2402.09353, equation
5) also their length: ``W' = magnitude * (W + change) / norm(W + change)``, of which the delta is
``W' - W``. Programs disagree on what the norm is taken over, and the shape of the magnitudes tells:

- PEFT and ai-toolkit store ``[m]`` and LyCORIS' and OneTrainer's "output axis" ``[m, 1]``: one
  length per output row, over the inputs.
- LyCORIS and OneTrainer by default store ``[1, n]``: one length per input column, over the outputs.

All of them take the norm of the changed weight. (ComfyUI, for ``[m, 1]``, takes that of the base
weight, which is not what was trained.)
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor

from autolora.errors import LoRAFormatError, shown

# Rows of a change that are computed at once in float64: bounds the extra memory, not the result.
ROW_BLOCK = 2048


class Change(Protocol):
    """The interface of a weight change."""

    @property
    def algorithm(self) -> str:
        """Its name among users: LoRA, LoKr, LoHa or full."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(m, n)``."""
        ...

    @property
    def rank(self) -> int | None:
        """Rank of its factors; None where it has none."""
        ...

    @property
    def scale(self) -> float:
        """Factor on the product of its tensors."""
        ...

    @property
    def tensors(self) -> Sequence[Tensor]:
        """Every stored tensor, in the dtype of its file."""
        ...

    def block(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of the change in float64 ``[stop - start, n]``."""
        ...

    def bilinear(self, left: Tensor, right: Tensor) -> Tensor:
        """``uᵀ change v`` for ``k`` pairs of vectors, without the change itself.

        Args:
            left: The ``u``, float32 ``[m, k]``.
            right: The ``v``, float32 ``[n, k]``.

        Returns:
            Float64 ``[k]``.
        """
        ...

    def square_norm(self) -> float:
        """Square of the Frobenius norm."""
        ...


@dataclass(frozen=True)
class LowRank:
    """A product of two factors.

    Attributes:
        A: Down projection ``[r, n]``, in the dtype of its file.
        B: Up projection ``[m, r]``, in the dtype of its file.
        scale: Factor on ``B @ A``, ``alpha / r``.
    """

    A: Tensor
    B: Tensor
    scale: float = 1.0

    algorithm = "LoRA"

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(m, n)``."""
        return int(self.B.shape[0]), int(self.A.shape[1])

    @property
    def rank(self) -> int:
        """Rank ``r``."""
        return int(self.A.shape[0])

    @property
    def tensors(self) -> Sequence[Tensor]:
        """Every stored tensor, in the dtype of its file."""
        return (self.A, self.B)

    def block(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` in float64."""
        return self.B[start:stop].to(torch.float64) * self.scale @ self.A.to(torch.float64)

    def bilinear(self, left: Tensor, right: Tensor) -> Tensor:
        """``scale * (uᵀ B) (A v)``."""
        return _dots(left.T @ self.B.to(left), right.T @ self.A.to(right).T) * self.scale

    def square_norm(self) -> float:
        """``trace(BᵀB AAᵀ)``, without the product of the two."""
        A, B = self.A.to(torch.float32), self.B.to(torch.float32)
        inner = ((B.T @ B).to(torch.float64) * (A @ A.T).to(torch.float64)).sum()
        return max(float(inner), 0.0) * self.scale**2


@dataclass(frozen=True)
class Matrix:
    """A matrix that is stored whole, as a product ``a @ b``, or as a Tucker form ``aᵀ t b``.

    Attributes:
        whole: ``[p, q]``, or None when it is a product.
        a: ``[p, r]``; ``[r, p]`` beside a core.
        b: ``[r, q]``.
        core: ``[r, r]`` or, for convolutions, ``[r, r, height, width]`` (LyCORIS' ``t1``,
            ``t2``); the kernel then belongs to the columns.
    """

    whole: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    core: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those that are stored."""
        return tuple(t for t in (self.whole, self.a, self.b, self.core) if t is not None)

    @property
    def rank(self) -> int | None:
        """Rank of the product, None when stored whole."""
        return None if self.b is None else int(self.b.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(p, q)``."""
        if self.whole is not None:
            return int(self.whole.shape[0]), int(self.whole.shape[1])
        assert self.a is not None and self.b is not None
        if self.core is None:
            return int(self.a.shape[0]), int(self.b.shape[1])
        return int(self.a.shape[1]), int(self.b.shape[1]) * math.prod(self.core.shape[2:])

    def left(self) -> Tensor:
        """The left factor ``[p, r]`` in float64."""
        assert self.a is not None
        return (self.a if self.core is None else self.a.T).to(torch.float64)

    def right(self) -> Tensor:
        """The right factor ``[r, q]`` in float64, with the core folded in."""
        assert self.b is not None
        if self.core is None:
            return self.b.to(torch.float64)
        core = (
            self.core.to(torch.float64).flatten(2) if self.core.ndim > 2 else self.core[..., None]
        )
        return torch.einsum("rsk,sq->rqk", core.to(torch.float64), self.b.double()).flatten(1)

    def rows(self, start: int, stop: int) -> "Matrix":
        """The matrix of some of the rows."""
        if self.whole is not None:
            return Matrix(self.whole[start:stop])
        assert self.a is not None
        a = self.a[start:stop] if self.core is None else self.a[:, start:stop]
        return Matrix(None, a, self.b, self.core)

    def dense(self) -> Tensor:
        """The matrix in float64."""
        if self.whole is not None:
            return self.whole.to(torch.float64)
        return self.left() @ self.right()


@dataclass(frozen=True)
class Kronecker:
    """A Kronecker product (LoKr).

    Attributes:
        w1: The outer matrix ``[a, c]``.
        w2: The inner matrix ``[b, d]``; ``m`` is ``a * b`` and ``n`` is ``c * d``.
        scale: ``alpha / r`` of the side that is a product, 1 where both are stored whole.
    """

    w1: Matrix
    w2: Matrix
    scale: float = 1.0

    algorithm = "LoKr"

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(m, n)``."""
        (a, c), (b, d) = self.w1.shape, self.w2.shape
        return a * b, c * d

    @property
    def rank(self) -> int | None:
        """Rank of the side that is a product, None where both are stored whole."""
        return self.w1.rank if self.w2.rank is None else self.w2.rank

    @property
    def tensors(self) -> Sequence[Tensor]:
        """Every stored tensor, in the dtype of its file."""
        return (*self.w1.tensors, *self.w2.tensors)

    def _sides(self) -> tuple[Tensor, Tensor]:
        return self.w1.dense() * self.scale, self.w2.dense()

    def block(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` in float64: row ``i`` is ``kron(w1[i // b], w2[i % b])``."""
        w1, w2 = self._sides()
        row = torch.arange(start, stop, device=w1.device)
        b = w2.shape[0]
        return torch.einsum("ic,id->icd", w1[row // b], w2[row % b]).flatten(1)

    def bilinear(self, left: Tensor, right: Tensor) -> Tensor:
        """With ``u`` and ``v`` as matrices ``U``, ``V``: ``sum(U * (w1 V w2ᵀ))``."""
        w1, w2 = self._sides()
        u = left.to(torch.float64).unflatten(0, (w1.shape[0], w2.shape[0]))
        v = right.to(torch.float64).unflatten(0, (w1.shape[1], w2.shape[1]))
        return torch.einsum("abk,ac,cbk->k", u, w1, torch.einsum("bd,cdk->cbk", w2, v))

    def square_norm(self) -> float:
        """The product of the sides' norms."""
        w1, w2 = self._sides()
        return float(w1.square().sum() * w2.square().sum())


@dataclass(frozen=True)
class Hadamard:
    """An elementwise product of two low-rank matrices (LoHa).

    Attributes:
        w1: First matrix ``[m, n]``, a product.
        w2: Second matrix ``[m, n]``, a product.
        scale: ``alpha / r``.
    """

    w1: Matrix
    w2: Matrix
    scale: float = 1.0

    algorithm = "LoHa"

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(m, n)``."""
        return self.w1.shape

    @property
    def rank(self) -> int | None:
        """Rank of the first matrix."""
        return self.w1.rank

    @property
    def tensors(self) -> Sequence[Tensor]:
        """Every stored tensor, in the dtype of its file."""
        return (*self.w1.tensors, *self.w2.tensors)

    def block(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` in float64."""
        first, second = (w.left()[start:stop] @ w.right() for w in (self.w1, self.w2))
        return first * second * self.scale

    def factors(self) -> tuple[Tensor, Tensor]:
        """The same matrix as one product of rank ``r1 * r2``.

        Returns:
            ``A [r1 * r2, n]`` and ``B [m, r1 * r2]`` in float64, by the row-wise Khatri-Rao
            product of the factors, with the scale in B.
        """
        B = torch.einsum("mi,mj->mij", self.w1.left(), self.w2.left()).flatten(1) * self.scale
        A = torch.einsum("in,jn->ijn", self.w1.right(), self.w2.right()).flatten(0, 1)
        return A, B

    @property
    def joined_rank(self) -> int:
        """Rank of `factors`."""
        return (self.w1.rank or 0) * (self.w2.rank or 0)

    def bilinear(self, left: Tensor, right: Tensor) -> Tensor:
        """``sum_i (u * up_i)ᵀ w2 (v * down_i)`` over the rank of the first matrix."""
        u, v = left.to(torch.float64), right.to(torch.float64)
        up, down = self.w2.left(), self.w2.right()
        total = torch.zeros(u.shape[1], dtype=torch.float64, device=u.device)
        for a, b in zip(self.w1.left().T, self.w1.right(), strict=True):
            total += _dots((u * a[:, None]).T @ up, (v * b[:, None]).T @ down.T)
        return total * self.scale

    def square_norm(self) -> float:
        """By rows, or by the joined factors where these are few."""
        m, n = self.shape
        if self.joined_rank**2 * (m + n) < 2 * m * n * (self.rank or 0):
            A, B = self.factors()
            return max(float(((B.T @ B) * (A @ A.T)).sum()), 0.0)
        return sum_of_squares(self)


@dataclass(frozen=True)
class Full:
    """The difference of a whole weight.

    Attributes:
        diff: ``[m, n]``, in the dtype of its file.
    """

    diff: Tensor

    algorithm = "full"
    rank = None
    scale = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(m, n)``."""
        return int(self.diff.shape[0]), int(self.diff.shape[1])

    @property
    def tensors(self) -> Sequence[Tensor]:
        """Every stored tensor, in the dtype of its file."""
        return (self.diff,)

    def block(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` in float64."""
        return self.diff[start:stop].to(torch.float64)

    def bilinear(self, left: Tensor, right: Tensor) -> Tensor:
        """``(uᵀ diff) v``."""
        return _dots(left.T @ self.diff.to(left), right.T)

    def square_norm(self) -> float:
        """The sum of squares."""
        return sum_of_squares(self)


def _dots(left: Tensor, right: Tensor) -> Tensor:
    """Row by row dot products in float64."""
    return (left.to(torch.float64) * right.to(torch.float64)).sum(dim=1)


@dataclass(frozen=True)
class Rows:
    """Some of the rows of another change, where its structure gives them no form of their own.

    Attributes:
        whole: The other change.
        start: The first row.
        stop: The row after the last.
    """

    whole: Change
    start: int
    stop: int

    @property
    def algorithm(self) -> str:
        """That of the other change."""
        return self.whole.algorithm

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(m, n)``."""
        return self.stop - self.start, self.whole.shape[1]

    @property
    def rank(self) -> int | None:
        """That of the other change."""
        return self.whole.rank

    @property
    def scale(self) -> float:
        """That of the other change."""
        return self.whole.scale

    @property
    def tensors(self) -> Sequence[Tensor]:
        """Those of the other change."""
        return self.whole.tensors

    def block(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` in float64."""
        return self.whole.block(self.start + start, self.start + stop)

    def bilinear(self, left: Tensor, right: Tensor) -> Tensor:
        """That of the other change with zeros for the other rows."""
        wide = left.new_zeros(self.whole.shape[0], left.shape[1])
        wide[self.start : self.stop] = left
        return self.whole.bilinear(wide, right)

    def square_norm(self) -> float:
        """The sum of squares."""
        return sum_of_squares(self)


def rows_of(change: Change, start: int, stop: int) -> Change:
    """Take some of a change's rows.

    Args:
        change: A change of several layers' rows, one after the other.
        start: The first row.
        stop: The row after the last.

    Returns:
        A change of shape ``(stop - start, n)`` that shares its tensors.
    """
    if isinstance(change, LowRank):
        return LowRank(change.A, change.B[start:stop], change.scale)
    if isinstance(change, Full):
        return Full(change.diff[start:stop])
    if isinstance(change, Hadamard):
        return Hadamard(change.w1.rows(start, stop), change.w2.rows(start, stop), change.scale)
    if isinstance(change, Kronecker):
        inner = change.w2.shape[0]
        if start % inner == 0 and stop % inner == 0:
            return Kronecker(change.w1.rows(start // inner, stop // inner), change.w2, change.scale)
    return Rows(change, start, stop)


def sum_of_squares(change: Change) -> float:
    """Square of the Frobenius norm of a change, a block of rows at a time.

    Args:
        change: Any kind.

    Returns:
        The sum of its squared values.
    """
    rows = change.shape[0]
    return math.fsum(
        float(change.block(start, min(start + ROW_BLOCK, rows)).square().sum())
        for start in range(0, rows, ROW_BLOCK)
    )


# A relative error up to which joined factors count as exact: that of rounding to float32.
EXACT = 1e-6


@dataclass(frozen=True)
class Magnitude:
    """Lengths of the rows, or columns, of a changed weight (DoRA).

    Attributes:
        values: ``[m]`` or ``[n]``, in the dtype of the file.
        axis: Whether there is one per output row or per input column.
        kernel: Neighbouring columns that share one length: those of a convolution's kernel.
    """

    values: Tensor
    axis: Literal["rows", "columns"]
    kernel: int = 1


@dataclass(frozen=True)
class Piece:
    """A change of all or some of a layer's output rows.

    Attributes:
        change: The change, of shape ``(m, in)``.
        rows: The layer's output rows that the change's rows stand for, in the change's order;
            they hold ``m`` in all.
        magnitude: DoRA's lengths of the changed weight, if any.
    """

    change: Change
    rows: tuple[slice, ...]
    magnitude: Magnitude | None = None

    @property
    def algorithm(self) -> str:
        """Its name among users: LoRA, LoKr, LoHa, full, or DoRA on top of one."""
        return self.change.algorithm if self.magnitude is None else "DoRA"

    @property
    def tensors(self) -> Sequence[Tensor]:
        """Every stored tensor, in the dtype of its file."""
        extra = () if self.magnitude is None else (self.magnitude.values,)
        return (*self.change.tensors, *extra)

    def blocks(self) -> Iterator[tuple[int, int, slice]]:
        """Divide the rows so that a block is contiguous in the layer and not large.

        Yields:
            First and last row in the change, and the layer's rows.
        """
        start = 0
        for rows in self.rows:
            for first in range(rows.start, rows.stop, ROW_BLOCK):
                count = min(ROW_BLOCK, rows.stop - first)
                yield start, start + count, slice(first, first + count)
                start += count

    def add_to(self, dense: Tensor, base: Tensor | None = None) -> None:
        """Add this piece to a dense weight change.

        Args:
            dense: Float32 ``[out, in]``, changed in place.
            base: Weight of the layer ``[out, in]``, needed for a piece with magnitudes.
        """
        if self.magnitude is None:
            for start, stop, where in self.blocks():
                dense[where] += self.change.block(start, stop).to(dense.dtype)
            return
        assert base is not None
        factor = self._column_factor(base) if self.magnitude.axis == "columns" else None
        for start, stop, where in self.blocks():
            before = base[where].to(dense.device, torch.float64)
            after = before + self.change.block(start, stop)
            if factor is None:
                length = self.magnitude.values[start:stop].to(torch.float64)[:, None]
                scaled = after * (length / _nonzero(after.norm(dim=1, keepdim=True)))
            else:
                scaled = after * factor
            dense[where] += (scaled - before).to(dense.dtype)

    def _column_factor(self, base: Tensor) -> Tensor:
        """``magnitude / norm`` of each input column ``[in]``, over this piece's rows."""
        assert self.magnitude is not None
        values = self.magnitude.values.to(torch.float64)
        squares = torch.zeros_like(values)
        for start, stop, where in self.blocks():
            before = base[where].to(values.device, torch.float64)
            squares += (before + self.change.block(start, stop)).square().sum(dim=0)
        kernel = self.magnitude.kernel
        squares = squares.unflatten(0, (-1, kernel)).sum(dim=1).repeat_interleave(kernel)
        return values / _nonzero(squares.sqrt())


def _nonzero(norm: Tensor) -> Tensor:
    """Keep a row of zeros zero instead of dividing by its norm."""
    return norm.clamp_min(torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class LayerDelta:
    """All that one adapter adds to one layer's weight.

    Attributes:
        out_features: The layer's output channels.
        in_features: The layer's input channels, for a convolution times the kernel's size.
        pieces: Pieces on rows that do not overlap.
        error: Relative Frobenius error of what these pieces stand in for; 0 when exact.
        kernel: Height and width of a convolution's kernel; empty for a linear layer.
    """

    out_features: int
    in_features: int
    pieces: tuple[Piece, ...]
    error: float = 0.0
    kernel: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight: ``(out, in)``, or ``(out, in, height, width)``."""
        channels = self.in_features // math.prod(self.kernel)
        return self.out_features, channels, *self.kernel

    @property
    def is_low_rank(self) -> bool:
        """Whether `factors` can join the pieces."""
        return all(
            isinstance(piece.change, LowRank) and piece.magnitude is None for piece in self.pieces
        )

    @property
    def needs_base(self) -> bool:
        """Whether the change depends on the base weight (DoRA)."""
        return any(piece.magnitude is not None for piece in self.pieces)

    def without_magnitudes(self) -> "LayerDelta":
        """The same change as if it had no DoRA magnitudes; itself where it has none."""
        if not self.needs_base:
            return self
        return replace(self, pieces=tuple(replace(p, magnitude=None) for p in self.pieces))

    @cached_property
    def _groups(self) -> tuple[tuple[tuple[LowRank, Piece], ...], ...]:
        """Pieces with equal A together: a fused layer that was split shares one A again."""
        groups: list[list[tuple[LowRank, Piece]]] = []
        for piece in self.pieces:
            change = piece.change
            assert isinstance(change, LowRank) and piece.magnitude is None
            for group in groups:
                if _same(group[0][0].A, change.A):
                    group.append((change, piece))
                    break
            else:
                groups.append([(change, piece)])
        return tuple(map(tuple, groups))

    @property
    def rank(self) -> int:
        """Joined rank ``R`` of all pieces, which must be low-rank."""
        return sum(group[0][0].rank for group in self._groups)

    @property
    def tensors(self) -> Sequence[Tensor]:
        """Every stored tensor, in the dtype of its file."""
        return [tensor for piece in self.pieces for tensor in piece.tensors]

    def dense(self, base: Tensor | None = None) -> Tensor:
        """Weight change at strength 1.

        Products are accumulated in float64 and rounded once.

        Args:
            base: Weight of the layer in its own shape, of any float dtype; only used where
                `needs_base`.

        Returns:
            Float32 ``[out, in]``, the kernel of a convolution flattened.
        """
        device = self.tensors[0].device
        size = (self.out_features, self.in_features)
        dense = torch.zeros(*size, dtype=torch.float32, device=device)
        flat = None if base is None else base.reshape(size)
        for piece in self.pieces:
            piece.add_to(dense, flat)
        return dense

    def factors(self) -> tuple[Tensor, Tensor]:
        """Joined factors: rows that a piece does not cover are zero in its columns of B.

        Returns:
            ``A [R, in]`` and ``B [out, R]`` in float32, with the scale folded into B. The pieces
            must be low-rank.
        """
        if len(self.pieces) == 1 and self.pieces[0].rows == (slice(0, self.out_features),):
            # The usual file: nothing to join, so nothing is copied twice.
            change = self._groups[0][0][0]
            return change.A.to(torch.float32, copy=True), _scaled(change.B, change.scale)
        A = torch.cat([group[0][0].A.to(torch.float32) for group in self._groups])
        B = torch.zeros(self.out_features, A.shape[0], dtype=torch.float32, device=A.device)
        first = 0
        for group in self._groups:
            last = first + group[0][0].rank
            for change, piece in group:
                for start, stop, where in piece.blocks():
                    B[where, first:last] = _scaled(change.B[start:stop], change.scale)
            first = last
        return A, B

    def folded(self) -> "LayerDelta":
        """The same change with scale 1 in each low-rank piece whose type holds ``scale * B``."""
        return replace(self, pieces=tuple(map(_folded, self.pieces)))

    def compact_factors(self) -> tuple[Tensor, Tensor]:
        """`factors` in the type of the file where that holds them exactly.

        Returns:
            ``A [R, in]`` and ``B [out, R]`` in float32, bfloat16 or float16; the tensors of the
            file itself where there is nothing to join and nothing to scale.
        """
        if len(self.pieces) == 1 and self.pieces[0].rows == (slice(0, self.out_features),):
            change = self.pieces[0].change
            assert isinstance(change, LowRank)
            if change.A.dtype in _COMPACT and change.B.dtype in _COMPACT:
                B = _narrowed(_scaled(change.B, change.scale), change.B.dtype)
                return change.A, change.B if change.scale == 1 else B
        stored = self.tensors[0].dtype
        A, B = self.factors()
        return _narrowed(A, stored), _narrowed(B, stored)

    def square_norm(self) -> float | None:
        """Square of the Frobenius norm; None where it depends on the base weight."""
        if self.needs_base:
            return None
        return math.fsum(piece.change.square_norm() for piece in self.pieces)


_COMPACT = (torch.float32, torch.bfloat16, torch.float16)
"""Types that fusion reads factors in."""


def _folded(piece: Piece) -> Piece:
    change = piece.change
    if not isinstance(change, LowRank) or change.scale == 1:
        return piece
    exact = change.B.to(torch.float64) * change.scale
    B = exact.to(change.B.dtype)
    same = torch.equal(B.to(torch.float64), exact)
    return replace(piece, change=LowRank(change.A, B)) if same else piece


def _narrowed(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a float32 tensor in another type of `_COMPACT`, or itself where that would round."""
    if dtype is wide.dtype or dtype not in _COMPACT:
        return wide
    narrow = wide.to(dtype)
    return narrow if torch.equal(narrow.to(wide.dtype), wide) else wide


def _scaled(B: Tensor, scale: float) -> Tensor:
    """Return ``scale * B`` in float32, rounded once."""
    if math.frexp(abs(scale))[0] == 0.5:
        # A power of two, as most alphas give, only moves the exponent.
        return B.to(torch.float32, copy=True) if scale == 1 else B.to(torch.float32) * scale
    return (B.to(torch.float64) * scale).to(torch.float32)


def check_pair(name: str, layer: str, A: Tensor, B: Tensor) -> None:
    """Make sure that two tensors are the factors of a layer.

    Args:
        name: The adapter or file they are for.
        layer: The layer they are for.
        A: Should be ``[r, in]``, or ``[r, in, height, width]`` for a convolution.
        B: Should be ``[out, r]``.

    Raises:
        LoRAFormatError: They do not fit together, or hold anything but finite numbers.
    """
    where = f"Factors of layer {shown(layer)} in LoRA {shown(name)!r}"
    if A.ndim not in (2, 4) or B.ndim != 2 or A.shape[0] != B.shape[1] or 0 in (*A.shape, *B.shape):
        raise LoRAFormatError(
            f"{where} have shapes A {list(A.shape)} and B {list(B.shape)}; "
            "give A [rank, in] and B [out, rank]."
        )
    if not (A.is_floating_point() and B.is_floating_point()):
        raise LoRAFormatError(f"{where} are {A.dtype} and {B.dtype}; give floating-point tensors.")
    if not (is_finite(A) and is_finite(B)):
        raise LoRAFormatError(f"{where} hold NaN or infinite values; train or merge again.")


def layer_from_pair(name: str, layer: str, A: Tensor, B: Tensor) -> LayerDelta:
    """Make a layer's change of one pair of factors.

    Args:
        name: The adapter they are for.
        layer: The layer they are for.
        A: ``[r, in]``, or ``[r, in, height, width]`` for a convolution.
        B: ``[out, r]``, the scale folded in.

    Returns:
        A change of the whole layer; the tensors are used as they are.

    Raises:
        LoRAFormatError: As for `check_pair`.
    """
    check_pair(name, layer, A, B)
    kernel, A = tuple(A.shape[2:]), A.detach().flatten(1)
    out_features, in_features = int(B.shape[0]), int(A.shape[1])
    piece = Piece(LowRank(A, B.detach()), (slice(0, out_features),))
    return LayerDelta(out_features, in_features, (piece,), kernel=kernel)


def check_base(name: str, layer: str, delta: LayerDelta, base: Tensor | None) -> None:
    """Make sure that a change that depends on the base weight gets one.

    Args:
        name: The adapter, for errors.
        layer: The layer, for errors.
        delta: Its change.
        base: Should be the layer's dense weight ``[out, in]``.

    Raises:
        LoRAFormatError: It is missing, of another shape, or not floating-point.
    """
    if base is None:
        raise LoRAFormatError(
            f"Layer {shown(layer)} of LoRA {shown(name)!r} has DoRA magnitudes, whose effect "
            "depends on the base weight; give that weight as base."
        )
    if tuple(base.shape) != delta.shape or not base.is_floating_point():
        raise LoRAFormatError(
            f"Base weight of layer {shown(layer)} is {base.dtype} {list(base.shape)}, and LoRA "
            f"{shown(name)!r} needs a floating-point one of shape {list(delta.shape)}; "
            "give the dense weight."
        )


def check_shapes(
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    module_shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Make sure that an adapter is for a model with these layers.

    Args:
        name: The adapter, for errors.
        shapes: Weight shape of each of its changes by layer.
        module_shapes: Weight shape of every layer of the model.

    Raises:
        LoRAFormatError: A layer is missing in the model or has another shape.
    """
    for layer, own in shapes.items():
        shape = module_shapes.get(layer)
        if shape is None:
            problem = f"changes layer {layer}, which the model does not have"
        elif tuple(shape) != own:
            problem = f"has shape {list(own)} at layer {layer}, where the model has {list(shape)}"
        else:
            continue
        raise LoRAFormatError(
            f"LoRA {shown(name)!r} {problem}: it was made for another base model or size; "
            "use one made for this model."
        )


def is_finite(tensor: Tensor, limit: float = math.inf) -> bool:
    """Tell whether every value of a tensor is a finite number.

    Args:
        tensor: Any real tensor, of any dtype that files hold.
        limit: Largest magnitude allowed.

    Returns:
        False when it holds NaN, an infinity, or a value beyond the limit.
    """
    if tensor.dtype == torch.bool:
        return True
    if tensor.dtype in _FLOAT8:
        low, high = 0.0, _largest_float8(tensor)
    else:
        # Extremes carry NaN along, and need no array of flags the size of the tensor.
        low, high = (extreme.item() for extreme in torch.aminmax(tensor.detach()))
    return math.isfinite(low) and math.isfinite(high) and max(-low, high) <= limit


_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def _largest_float8(tensor: Tensor) -> float:
    """Largest magnitude, NaN where there is a NaN.

    Torch has no extremes of these types, and converts them at a hundredth of the speed at which
    bytes are compared. Without the sign, their bits are ordered like their values, NaN last.
    """
    positive = int(tensor.view(torch.int8).amax())
    negative = int(tensor.view(torch.uint8).amax()) - 128
    bits = torch.tensor(max(positive, negative), dtype=torch.uint8)
    return float(bits.view(tensor.dtype).item())


def _same(left: Tensor, right: Tensor) -> bool:
    return left is right or (
        left.shape == right.shape and left.dtype == right.dtype and torch.equal(left, right)
    )


@dataclass
class Contents:
    """What a file changes in one model.

    Attributes:
        layers: Weight changes by layer.
        biases: Changes of biases, float32 ``[out]``, by layer.
        norms: Changes of normalization weights, float32, by module path.
        matched: Layer by key of the file.
    """

    layers: dict[str, LayerDelta] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    matched: dict[str, str] = field(default_factory=dict)
