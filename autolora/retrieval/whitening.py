"""A closed-form linear head for text vectors.

Captions of one LoRA differ in background colours and phrasing, which say nothing about the LoRA.
Whitening by the covariance within LoRAs (linear discriminant analysis) makes these differences
small beside those between LoRAs, with no training and no more parameters than a matrix.

Shape legend: n texts, D text dimensions, E output dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class TextWhitening:
    """An affine map of text vectors followed by normalization.

    Attributes:
        mean: ``[D]``, subtracted first.
        matrix: ``[D, E]``.
    """

    mean: Tensor
    matrix: Tensor

    @property
    def dim(self) -> int:
        """Output dimensions E."""
        return self.matrix.shape[1]

    def __call__(self, text: Tensor) -> Tensor:
        """Map text vectors.

        Args:
            text: ``[n, D]``.

        Returns:
            Unit vectors ``[n, E]``.
        """
        return F.normalize((text - self.mean) @ self.matrix, dim=-1)

    @classmethod
    def fit(
        cls, text: Tensor, owners: Tensor, dim: int | None = None, shrinkage: float = 0.1
    ) -> TextWhitening:
        """Fit to the captions of a training pool.

        Args:
            text: Caption vectors ``[n, D]``.
            owners: ``[n]``, which LoRA or concept each belongs to.
            dim: E; all of D when None. Fewer keep the directions in which LoRAs differ most.
            shrinkage: Share of the within-covariance that is replaced by a multiple of the
                identity; 1 gives plain centring.

        Returns:
            The head.
        """
        points = text.double()
        mean = points.mean(0)
        inverse = torch.unique(owners, return_inverse=True)[1]
        groups = int(inverse.max()) + 1
        sums = points.new_zeros(groups, points.shape[1]).index_add_(0, inverse, points)
        counts = torch.bincount(inverse, minlength=groups)
        centres = sums / counts[:, None]
        inner = points - centres[inverse]
        within = inner.T @ inner / max(len(points) - groups, 1)
        size = within.diagonal().mean().clamp_min(1e-9)
        identity = torch.eye(len(within), dtype=within.dtype) * size
        values, vectors = torch.linalg.eigh((1 - shrinkage) * within + shrinkage * identity)
        matrix = vectors * values.clamp_min(1e-12).rsqrt() @ vectors.T
        if dim is not None and dim < matrix.shape[1]:
            between = (centres - centres.mean(0)) @ matrix
            axes = torch.linalg.eigh(between.T @ between).eigenvectors
            matrix = matrix @ axes[:, -dim:].flip(1)
        return cls(mean.float(), matrix.float())
