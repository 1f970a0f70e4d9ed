"""Responses: how strongly a LoRA's text-side deltas answer to a text.

A LoRA is trained with captions. By the chain rule every step adds to its delta products whose
input side is the activations of those captions, so the row space of a delta that reads the text
stream holds the directions of its training captions. The response of delta ``BA`` to the
activation ``x`` of a text has the energy ``|B A x|^2 = <x x^T, A^T B^T B A>``: an inner product of
something of the text and something of the LoRA, which an index can search. Nothing has to be
learned from LoRAs for it, so it works for concepts that no training LoRA had.

Activations are taken relative to their mean over texts and along their principal directions, half
whitened, with the mean's own direction added (its cross terms carry the sign). The base model is
needed only for fitting: a ridge regression predicts the activations from the text encoder's
sentence vector.

Shape legend: n LoRAs, T texts, L layers, m directions, v = m (m + 1) / 2, D text dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autolora.errors import RetrievalError
from autolora.retrieval.features import LoRAInputs

if TYPE_CHECKING:
    from autolora.adapters.lora import LoRA

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


def fit_queries(
    activations: Mapping[str, Tensor], directions: int, whitening: float = 0.5
) -> dict[str, Tensor]:
    """Directions along which activations of texts vary, and that of their mean.

    Args:
        activations: ``[T, in]`` by layer, the mean over a text's tokens.
        directions: Principal directions at most; the mean's is added to them.
        whitening: 0 keeps the variances of the directions, 1 makes them equal.

    Returns:
        Queries ``[m, in]`` by layer, the last one along the mean.
    """
    queries: dict[str, Tensor] = {}
    for layer, points in activations.items():
        x = points.double()
        mean = x.mean(0)
        centred = x - mean
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
        kept = min(directions, int((values > values.max() * 1e-6).sum()))
        values, vectors = values[-kept:].flip(0), vectors[:, -kept:].flip(1)
        rows = (vectors * values.pow(-whitening / 2)).T
        along = mean / mean.norm().clamp_min(_TINY) * rows.norm(dim=1).mean()
        queries[layer] = torch.cat([rows, along[None]]).float()
    return queries


def response_features(lora: LoRA, queries: Mapping[str, Tensor]) -> Tensor:
    """Gram matrices of a LoRA's responses to the queries, of unit norm.

    Args:
        lora: The adapter.
        queries: ``[m, in]`` by layer, the same m for all.

    Returns:
        ``[L, v]``; NaN in layers that the LoRA does not change.

    Raises:
        RetrievalError: A layer's input size is not that of its queries.
    """
    rows: list[Tensor] = []
    for layer, query in queries.items():
        size = len(query) * (len(query) + 1) // 2
        absent = torch.full((size,), torch.nan)
        if layer not in lora:
            rows.append(absent)
            continue
        A, B = lora.factors(layer)
        if A.shape[1] != query.shape[1]:
            raise RetrievalError(
                f"The retriever's queries of layer {layer} have {query.shape[1]} inputs, but the "
                f"LoRA has {A.shape[1]}; the retriever was trained for another base model."
            )
        narrow = query @ A.T  # [m, r]
        gram = half_vector(narrow @ (B.T @ B) @ narrow.T)
        norm = gram.norm()
        rows.append(gram / norm if norm > _TINY else absent)
    return torch.stack(rows)


class ResponseEncoder(nn.Module):
    """Energy of responses as a cosine.

    Args:
        layers: L.
        directions: m, with the mean's.
        text_dim: D.
    """

    kind = "responses"
    uses_weights = False
    uses_portraits = False
    uses_responses = True
    text_mean: Tensor
    text_matrix: Tensor
    text_bias: Tensor
    text_centre: Tensor
    lora_centre: Tensor

    def __init__(self, layers: int, directions: int, text_dim: int) -> None:
        super().__init__()
        self.layers, self.directions, self.text_dim = layers, directions, text_dim
        size = directions * (directions + 1) // 2
        self.register_buffer("text_mean", torch.zeros(text_dim))
        self.register_buffer("text_matrix", torch.zeros(layers, text_dim, directions))
        self.register_buffer("text_bias", torch.zeros(layers, directions))
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
            "text_dim": self.text_dim,
        }

    def encode_loras(self, inputs: LoRAInputs) -> Tensor:
        """Encode LoRAs.

        Args:
            inputs: n LoRAs with response features.

        Returns:
            Unit vectors ``[n, L v]``; layers that a LoRA lacks are zero.

        Raises:
            RetrievalError: There are no response features.
        """
        if inputs.responses is None:
            raise RetrievalError("This encoder needs a LoRA's responses, and there are none.")
        centred = F.normalize(inputs.responses - self.lora_centre, dim=-1)
        return F.normalize(centred.nan_to_num(0.0).flatten(1), dim=-1)

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
        queries: Sequence[Tensor],
        loras: Tensor,
        ridge: float = 0.01,
    ) -> ResponseEncoder:
        """Fit in closed form.

        Args:
            text: Sentence vectors ``[T, D]``.
            activations: Activations of the same texts ``[T, in]`` by layer.
            queries: ``[m, in]`` by layer, as `fit_queries` makes them.
            loras: Response features ``[n, L, v]`` to centre on.
            ridge: Penalty of the regression, in units of the text vectors' mean variance.

        Returns:
            The encoder.
        """
        encoder = cls(len(queries), len(queries[0]), text.shape[1])
        mean = text.double().mean(0)
        centred = text.double() - mean
        gram = centred.T @ centred
        gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        for layer, (points, query) in enumerate(zip(activations, queries, strict=True)):
            x = points.double()
            moved = (x - x.mean(0)) @ query[:-1].double().T
            matrix = torch.linalg.solve(gram, centred.T @ moved)
            encoder.text_matrix[layer, :, :-1] = matrix.float()
            size = (centred @ matrix).norm(dim=1).mean()
            encoder.text_bias[layer, -1] = float(size) * _MEAN_SHARE
        encoder.text_mean.copy_(mean)
        encoder.text_centre.copy_(encoder._products(text).mean(0))
        encoder.lora_centre.copy_(loras.nanmean(0).nan_to_num(0.0))
        return encoder.eval()
