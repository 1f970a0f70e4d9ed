"""The paper's LoRA encoder as its published code has it, to compare with.

One learned query per layer goes through the delta, ``t = q A^T B^T``; a linear map per layer type
brings it to a common size; learned position embeddings, two CLIP-like layers with a causal mask,
LayerNorm, mean pool. The loss is symmetric InfoNCE on the bare cosine (temperature 1), times ten.
Scale is not normalized, and a missing layer is a zero delta. Nothing here is used to retrieve.

Shape legend: n LoRAs, T layer types, m layers of a type, r rank, W width, D text dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autolora.errors import RetrievalError
from autolora.families.flux1.layers import LAYERS

if TYPE_CHECKING:
    from autolora.lora.lora import LoRA


@dataclass
class StackedFactors:
    """Factors of n LoRAs by layer type, zero where a LoRA lacks a layer.

    Attributes:
        layers: Layers of each type, in order.
        down: ``A [n, m, r, in]`` by type.
        up: ``B [n, m, out, r]`` by type.
    """

    layers: dict[str, list[str]]
    down: dict[str, Tensor]
    up: dict[str, Tensor]

    def __getitem__(self, rows: Tensor) -> StackedFactors:
        """Select some of the LoRAs."""
        return StackedFactors(
            self.layers,
            {kind: A[rows] for kind, A in self.down.items()},
            {kind: B[rows] for kind, B in self.up.items()},
        )


def stack_factors(loras: Sequence[LoRA], layers: Sequence[str]) -> StackedFactors:
    """Stack the factors of LoRAs, padded to the largest rank.

    The published code knows low-rank deltas alone. Others (LoKr, LoHa, full differences) enter by
    their leading factors and DoRA without its magnitudes, just as in our own tokens, so that both
    encoders see the same pool.

    Args:
        loras: n adapters.
        layers: Canonical layers to take, each changed by at least one adapter.

    Returns:
        The factors, in float32.

    Raises:
        RetrievalError: No adapter changes one of the layers, or adapters of different base models.
    """
    by_type: dict[str, list[str]] = {}
    for layer in sorted(layers, key=LAYERS.sort_key):
        parsed = LAYERS.parse(layer)
        by_type.setdefault(parsed.row.template if parsed else layer, []).append(layer)
    down: dict[str, Tensor] = {}
    up: dict[str, Tensor] = {}
    for kind, names in by_type.items():
        found = {
            (i, j): lora.leading_factors(name)
            for i, lora in enumerate(loras)
            for j, name in enumerate(names)
            if name in lora
        }
        shapes = {(A.shape[1], B.shape[0]) for A, B in found.values()}
        if len(shapes) != 1:
            raise RetrievalError(
                f"Layers {kind} have {len(shapes)} shapes among the LoRAs, not one; compare LoRAs "
                "of one base model, in layers that they change."
            )
        in_features, out_features = shapes.pop()
        rank = max(len(A) for A, _ in found.values())
        down[kind] = torch.zeros(len(loras), len(names), rank, in_features)
        up[kind] = torch.zeros(len(loras), len(names), out_features, rank)
        for (i, j), (A, B) in found.items():
            down[kind][i, j, : len(A)] = A
            up[kind][i, j, :, : len(A)] = B
    return StackedFactors(by_type, down, up)


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


class PaperEncoder(nn.Module):
    """The published weight encoder.

    Args:
        factors: Factors to take the layers and sizes from.
        width: W; 768 in the paper, equal to the text encoder's dimension.
        depth: CLIP-like layers.
        heads: Attention heads.
    """

    def __init__(
        self, factors: StackedFactors, width: int = 768, depth: int = 2, heads: int = 12
    ) -> None:
        super().__init__()
        self.kinds = list(factors.layers)
        self.queries = nn.ParameterList(
            nn.Parameter(torch.randn(*factors.down[kind].shape[1::2])) for kind in self.kinds
        )
        self.projections = nn.ModuleList(
            nn.Linear(factors.up[kind].shape[2], width) for kind in self.kinds
        )
        count = sum(len(names) for names in factors.layers.values())
        self.position = nn.Parameter(torch.zeros(count, width))
        layer = nn.TransformerEncoderLayer(
            width,
            heads,
            dim_feedforward=4 * width,
            dropout=0.0,
            activation=_quick_gelu,
            batch_first=True,
            norm_first=True,
        )
        self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, factors: StackedFactors) -> Tensor:
        """Encode LoRAs.

        Args:
            factors: n LoRAs with the layers of the constructor's.

        Returns:
            Vectors ``[n, W]``, not normalized.
        """
        tokens = []
        for kind, query, project in zip(self.kinds, self.queries, self.projections, strict=True):
            narrow = torch.einsum("mi,nmri->nmr", query, factors.down[kind])
            tokens.append(project(torch.einsum("nmr,nmor->nmo", narrow, factors.up[kind])))
        x = torch.cat(tokens, 1) + self.position
        causal = torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1)
        pooled: Tensor = self.norm(self.blocks(x, mask=causal)).mean(1)
        return pooled


def paper_loss(text: Tensor, lora: Tensor) -> Tensor:
    """The published loss: symmetric InfoNCE on cosines without a temperature, times ten.

    Args:
        text: ``[B, W]``.
        lora: ``[B, W]``, row i belongs to text i; repeated LoRAs are not masked.

    Returns:
        A scalar.
    """
    logits = F.normalize(text, dim=-1) @ F.normalize(lora, dim=-1).T
    target = torch.arange(len(logits))
    return 10 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def project_text(text: Tensor, width: int) -> Tensor:
    """Bring text vectors to the encoder's width where they differ.

    The paper's CLIP-L and its encoder both have 768 dimensions. A width above the text's is
    reached by padding with zeros, which leaves cosines as they are.

    Args:
        text: ``[n, D]``.
        width: W.

    Returns:
        ``[n, W]``.

    Raises:
        ValueError: W is below D.
    """
    if width < text.shape[1]:
        raise ValueError(f"width {width} is below the text's {text.shape[1]} dimensions")
    return F.pad(text, (0, width - text.shape[1]))


def paper_schedule(width: int) -> dict[str, float]:
    """The published training settings.

    Args:
        width: W, to scale the learning rate of smaller encoders as 1/sqrt(W).

    Returns:
        ``lr``, ``batch`` and ``steps``.
    """
    return {"lr": 1e-4 * math.sqrt(768 / width), "batch": 32, "steps": 2000}
