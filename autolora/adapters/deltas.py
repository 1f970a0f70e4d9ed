"""What an adapter adds to the weight of one linear layer.

Shapes: ``r`` is the rank of one piece, ``R`` the joined rank of a layer, ``in`` and ``out`` the
layer's features. A weight change is ``delta W = scale * B @ A`` with ``A [r, in]``, ``B [out, r]``
(LoRA, https://arxiv.org/abs/2106.09685, section 4.1), where ``scale`` is ``alpha / r``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from autolora.errors import LoRAFormatError, shown

# Rows of delta W that are computed at once in float64: bounds the extra memory, not the result.
_ROW_BLOCK = 2048


@dataclass(frozen=True)
class LowRank:
    """One low-rank piece of a layer's weight change, on all or some of its output rows.

    Attributes:
        A: Down projection ``[r, in]``, in the dtype of its file.
        B: Up projection ``[m, r]``, in the dtype of its file.
        scale: Factor on ``B @ A``, ``alpha / r``.
        rows: The layer's output rows that B's rows stand for, in B's order; they hold ``m`` in all.
    """

    A: Tensor
    B: Tensor
    scale: float
    rows: tuple[slice, ...]

    @property
    def rank(self) -> int:
        """Rank ``r`` of this piece."""
        return int(self.A.shape[0])

    def scaled_rows(self) -> list[tuple[slice, Tensor]]:
        """B with the scale folded in, split by destination.

        Returns:
            Pairs of output rows and float64 ``[rows, r]``.
        """
        up = self.B.to(torch.float64) * self.scale
        parts = torch.split(up, [rows.stop - rows.start for rows in self.rows])
        return list(zip(self.rows, parts, strict=True))

    def add_to(self, dense: Tensor) -> None:
        """Add this piece to a dense weight change.

        Args:
            dense: Float32 ``[out, in]``, changed in place.
        """
        down = self.A.to(torch.float64)
        for rows, up in self.scaled_rows():
            for start in range(0, up.shape[0], _ROW_BLOCK):
                block = up[start : start + _ROW_BLOCK]
                first = rows.start + start
                dense[first : first + block.shape[0]] += (block @ down).to(dense.dtype)


@dataclass(frozen=True)
class LayerDelta:
    """All that one adapter adds to one layer.

    Attributes:
        out_features: The layer's output channels.
        in_features: The layer's input channels.
        pieces: Pieces on rows that do not overlap.
    """

    out_features: int
    in_features: int
    pieces: tuple[LowRank, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(out, in)`` of the weight that is changed."""
        return self.out_features, self.in_features

    @cached_property
    def _groups(self) -> tuple[tuple[LowRank, ...], ...]:
        """Pieces with equal A together: a fused layer that was split shares one A again."""
        groups: list[list[LowRank]] = []
        for piece in self.pieces:
            for group in groups:
                if _same(group[0].A, piece.A):
                    group.append(piece)
                    break
            else:
                groups.append([piece])
        return tuple(map(tuple, groups))

    @property
    def rank(self) -> int:
        """Joined rank ``R`` of all pieces."""
        return sum(group[0].rank for group in self._groups)

    @property
    def tensors(self) -> Sequence[Tensor]:
        """Every stored tensor, in the dtype of its file."""
        return [tensor for piece in self.pieces for tensor in (piece.A, piece.B)]

    def dense(self) -> Tensor:
        """Weight change at strength 1.

        Products are accumulated in float64 and rounded once.

        Returns:
            Float32 ``[out, in]``.
        """
        device = self.pieces[0].A.device
        dense = torch.zeros(*self.shape, dtype=torch.float32, device=device)
        for piece in self.pieces:
            piece.add_to(dense)
        return dense

    def factors(self) -> tuple[Tensor, Tensor]:
        """Joined factors: rows that a piece does not cover are zero in its columns of B.

        Returns:
            ``A [R, in]`` and ``B [out, R]`` in float32, with the scale folded into B.
        """
        A = torch.cat([group[0].A.to(torch.float32) for group in self._groups])
        B = torch.zeros(self.out_features, A.shape[0], dtype=torch.float32, device=A.device)
        start = 0
        for group in self._groups:
            stop = start + group[0].rank
            for piece in group:
                for rows, up in piece.scaled_rows():
                    B[rows, start:stop] = up.to(torch.float32)
            start = stop
        return A, B


def check_pair(name: str, layer: str, A: Tensor, B: Tensor) -> None:
    """Make sure that two tensors are the factors of a layer.

    Args:
        name: The adapter or file they are for.
        layer: The layer they are for.
        A: Should be ``[r, in]``.
        B: Should be ``[out, r]``.

    Raises:
        LoRAFormatError: They do not fit together, or hold anything but finite numbers.
    """
    where = f"Factors of layer {shown(layer)} in LoRA {shown(name)!r}"
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or 0 in (*A.shape, *B.shape):
        raise LoRAFormatError(
            f"{where} have shapes A {list(A.shape)} and B {list(B.shape)}; "
            "give A [rank, in] and B [out, rank]."
        )
    if not (A.is_floating_point() and B.is_floating_point()):
        raise LoRAFormatError(f"{where} are {A.dtype} and {B.dtype}; give floating-point tensors.")
    if not (is_finite(A) and is_finite(B)):
        raise LoRAFormatError(f"{where} hold NaN or infinite values; train or merge again.")


def is_finite(tensor: Tensor) -> bool:
    """Tell whether every value of a tensor is a finite number.

    Args:
        tensor: Any real tensor, of any dtype that files hold.

    Returns:
        False when it holds NaN or an infinity.
    """
    if not tensor.is_floating_point():
        return True
    if tensor.element_size() == 1:
        tensor = tensor.to(torch.float32)
    # Extremes carry NaN along, and need no array of flags the size of the tensor.
    low, high = torch.aminmax(tensor.detach())
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _same(left: Tensor, right: Tensor) -> bool:
    return left is right or (
        left.shape == right.shape and left.dtype == right.dtype and torch.equal(left, right)
    )
