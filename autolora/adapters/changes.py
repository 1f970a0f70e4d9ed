"""The kinds of weight change that adapters are made of.

Shapes: ``r`` is the rank of a factor, ``m`` the output rows that a module of the file stands for,
``n`` the layer's input channels. Every kind gives any of its rows in float64, so that a dense
result is rounded once.

- `LowRank`: ``scale * B @ A`` (LoRA, https://arxiv.org/abs/2106.09685, section 4.1).
- `Kronecker`: ``scale * kron(w1, w2)`` (LoKr, https://arxiv.org/abs/2212.10650 and LyCORIS,
  https://arxiv.org/abs/2309.14859), each of the two a matrix or a product.
- `Hadamard`: ``scale * (a1 @ b1) * (a2 @ b2)`` (FedPara, https://arxiv.org/abs/2108.06098,
  proposition 2; LyCORIS calls it LoHa).
- `Full`: the difference itself.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Rows of a change that are computed at once in float64: bounds the extra memory, not the result.
ROW_BLOCK = 2048


class Change(Protocol):
    """What is asked of a weight change."""

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
        core: ``[r, r]`` (LyCORIS' ``t1``, ``t2``).
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
        return int(self.a.shape[0 if self.core is None else 1]), int(self.b.shape[1])

    def left(self) -> Tensor:
        """The left factor ``[p, r]`` in float64, with the core folded in."""
        assert self.a is not None
        a = self.a.to(torch.float64)
        if self.core is None:
            return a
        return a.T @ self.core.reshape(self.core.shape[:2]).to(torch.float64)

    def right(self) -> Tensor:
        """The right factor ``[r, q]`` in float64."""
        assert self.b is not None
        return self.b.to(torch.float64)

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
