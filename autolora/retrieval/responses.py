"""Responses: how strongly a LoRA's text-side deltas answer to a text.

A LoRA is trained with captions. By the chain rule every step adds to its delta products whose
input side is the activations of those captions, so the row space of a delta that reads the text
stream holds the directions of its training captions. The response of delta ``BA`` to the
activation ``x`` of a text has the energy ``|B A x|^2 = <x x^T, A^T B^T B A>``: an inner product of
something of the text and something of the LoRA, which an index can search. It needs no training on
LoRAs, and what training adds carries over to concepts that no training LoRA had.

Activations are taken relative to their mean over texts and along their principal directions, half
whitened, with the mean's own direction added (its cross terms carry the sign): these are the
queries that go through the delta. A ridge regression predicts the activations from the text
encoder's sentence vector, so that the base model is needed only for fitting. From there queries
and text map are trained by the contrastive loss.

Shape legend: n LoRAs, T texts, L layers, r rank, m queries, v = m (m + 1) / 2, D text dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autolora.errors import RetrievalError
from autolora.retrieval.features import LoRAInputs

if TYPE_CHECKING:
    from autolora.lora.lora import LoRA

_TINY = 1e-12
_MEAN_SHARE = 0.5
"""Size of the mean's coordinate beside the others; from 0.3 to 1 makes little difference."""


def half_vector(matrix: Tensor) -> Tensor:
    """Upper triangles of symmetric matrices, such that dot products equal those of the matrices.

    Args:
        matrix: ``[..., m, m]``.

    Returns:
        ``[..., v]``.
    """
    rows, columns = torch.triu_indices(matrix.shape[-1], matrix.shape[-1])
    return matrix[..., rows, columns] * torch.where(rows == columns, 1.0, 2.0**0.5).to(matrix)


def fit_queries(activations: Tensor, directions: int, whitening: float = 0.5) -> Tensor:
    """Directions along which activations of texts vary, and that of their mean.

    Args:
        activations: ``[T, in]`` of one layer, the mean over a text's tokens.
        directions: Principal directions at most; the mean's is added to them.
        whitening: 0 keeps the variances of the directions, 1 makes them equal.

    Returns:
        Queries ``[m, in]``, the last one along the mean.
    """
    x = activations.double()
    mean = x.mean(0)
    centred = x - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
    kept = min(directions, int((values > values.max() * 1e-6).sum()))
    values, vectors = values[-kept:].flip(0), vectors[:, -kept:].flip(1)
    rows = (vectors * values.pow(-whitening / 2)).T
    along = mean / mean.norm().clamp_min(_TINY) * rows.norm(dim=1).mean()
    return torch.cat([rows, along[None]]).float()


def read_factors(lora: LoRA, layers: Sequence[str]) -> Tensor:
    """The side of a LoRA's deltas that reads, without regard to what they write.

    ``F`` with ``F^T F = (BA)^T (BA) / |(BA)^T (BA)|``; any split of the factors and any strength
    gives the same ``F`` up to a rotation of its rows.

    Args:
        lora: The adapter.
        layers: L layers that read inputs of the same size.

    Returns:
        ``[L, r, in]`` with the largest rank as r, zero in layers that the LoRA does not change;
        ``[L, 0, 0]`` when it changes none.
    """
    found: dict[str, Tensor] = {}
    for layer in layers:
        if layer not in lora:
            continue
        A, B = lora.leading_factors(layer)
        values, vectors = torch.linalg.eigh((B.T @ B).double())
        factor = values.clamp_min(0).sqrt()[:, None] * (vectors.T @ A.double())
        norm = torch.linalg.matrix_norm(factor @ factor.T)
        if norm > _TINY:
            found[layer] = (factor / norm.sqrt()).float()
    rank = max((len(factor) for factor in found.values()), default=0)
    width = next((factor.shape[1] for factor in found.values()), 0)
    result = torch.zeros(len(layers), rank, width)
    for position, layer in enumerate(layers):
        if layer in found:
            result[position, : len(found[layer])] = found[layer]
    return result


def stack_reads(reads: Sequence[Tensor]) -> Tensor:
    """Join the read factors of several LoRAs.

    Args:
        reads: n tensors ``[L, r, in]`` of any rank.

    Returns:
        ``[n, L, r, in]`` with the largest rank.
    """
    rank = max(factor.shape[1] for factor in reads)
    width = max(factor.shape[2] for factor in reads)
    result = torch.zeros(len(reads), reads[0].shape[0], rank, width)
    for position, factor in enumerate(reads):
        result[position, :, : factor.shape[1], : factor.shape[2]] = factor
    return result


class ResponseEncoder(nn.Module):
    """Energy of responses as a cosine; queries and text map can be trained further.

    Args:
        layers: L.
        directions: m, with the mean's.
        inputs: Input size of the layers.
        text_dim: D.
    """

    kind = "responses"
    uses_weights = False
    uses_portraits = False
    uses_responses = True
    text_mean: Tensor
    text_centre: Tensor
    lora_centre: Tensor

    def __init__(self, layers: int, directions: int, inputs: int, text_dim: int) -> None:
        super().__init__()
        self.layers, self.directions = layers, directions
        self.inputs, self.text_dim = inputs, text_dim
        size = directions * (directions + 1) // 2
        self.queries = nn.Parameter(torch.zeros(layers, directions, inputs))
        self.text_matrix = nn.Parameter(torch.zeros(layers, text_dim, directions))
        self.text_bias = nn.Parameter(torch.zeros(layers, directions))
        self.register_buffer("text_mean", torch.zeros(text_dim))
        self.register_buffer("text_centre", torch.zeros(layers, size))
        self.register_buffer("lora_centre", torch.zeros(layers, size))

    @property
    def dim(self) -> int:
        """Length of the vectors, L v."""
        return int(self.text_centre.numel())

    @property
    def config(self) -> dict[str, Any]:
        """What the constructor needs, as plain data."""
        return {
            "layers": self.layers,
            "directions": self.directions,
            "inputs": self.inputs,
            "text_dim": self.text_dim,
        }

    def encode_loras(self, inputs: LoRAInputs) -> Tensor:
        """Encode LoRAs.

        Args:
            inputs: n LoRAs with read factors.

        Returns:
            Unit vectors ``[n, L v]``; layers that a LoRA lacks are zero.

        Raises:
            RetrievalError: There are no read factors, or they are of another base model.
        """
        reads = inputs.reads
        if reads is None:
            raise RetrievalError("This encoder needs a LoRA's text-side deltas; there are none.")
        if reads.shape[3] != self.inputs:
            raise RetrievalError(
                f"The retriever's queries have {self.inputs} inputs, but the LoRA's deltas have "
                f"{reads.shape[3]}; the retriever was trained for another base model."
            )
        present = reads.flatten(2).any(-1, keepdim=True)
        centred = F.normalize(self._grams(reads) - self.lora_centre, dim=-1) * present
        return F.normalize(centred.flatten(1), dim=-1)

    def _grams(self, reads: Tensor) -> Tensor:
        """Half vectors of the Gram matrices of the responses, of unit norm ``[n, L, v]``."""
        narrow = torch.einsum("lmi,nlri->nlmr", self.queries, reads)
        return F.normalize(half_vector(narrow @ narrow.mT), dim=-1)

    def encode_text(self, text: Tensor) -> Tensor:
        """Map text vectors ``[n, D]`` to unit vectors ``[n, L v]``."""
        products = self._products(text) - self.text_centre
        return F.normalize(F.normalize(products, dim=-1).flatten(1), dim=-1)

    def _products(self, text: Tensor) -> Tensor:
        """Half vectors of ``y y^T`` of the predicted activations ``[n, L, v]``."""
        y = torch.einsum("nd,ldm->nlm", text - self.text_mean, self.text_matrix) + self.text_bias
        return half_vector(y[..., :, None] * y[..., None, :])

    @classmethod
    def fit(
        cls,
        text: Tensor,
        activations: Sequence[Tensor],
        reads: Tensor,
        directions: int = 64,
        ridge: float = 0.01,
    ) -> ResponseEncoder:
        """Fit in closed form, without pairs of LoRAs and texts.

        Args:
            text: Sentence vectors ``[T, D]``.
            activations: Activations of the same texts ``[T, in]`` by layer.
            reads: Read factors ``[n, L, r, in]`` to centre on.
            directions: Principal directions at most.
            ridge: Penalty of the regression, in units of the text vectors' mean variance.

        Returns:
            The encoder.
        """
        queries = [fit_queries(points, directions) for points in activations]
        shortest = min(len(query) for query in queries)
        queries = [torch.cat([query[: shortest - 1], query[-1:]]) for query in queries]
        encoder = cls(len(queries), shortest, queries[0].shape[1], text.shape[1])
        mean = text.double().mean(0)
        centred = text.double() - mean
        gram = centred.T @ centred
        gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        with torch.no_grad():
            for layer, (points, query) in enumerate(zip(activations, queries, strict=True)):
                x = points.double()
                moved = (x - x.mean(0)) @ query[:-1].double().T
                matrix = torch.linalg.solve(gram, centred.T @ moved)
                encoder.queries[layer] = query
                encoder.text_matrix[layer, :, :-1] = matrix.float()
                size = (centred @ matrix).norm(dim=1).mean()
                encoder.text_bias[layer, -1] = float(size) * _MEAN_SHARE
            encoder.text_mean.copy_(mean)
            encoder.text_centre.copy_(encoder._products(text).mean(0))
            encoder.lora_centre.copy_(encoder._grams(reads).mean(0))
        return encoder.eval()
