"""NP-LoRA: the first adapter's input space is kept free of the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from autolora.fusion.packed import Factors
from autolora.fusion.strategies.base import Strategy, register

MU = 0.5


@register
class NullProjection(Strategy):
    """NP-LoRA (arXiv 2511.11051): ``dW_1 + sum_{i>1} dW_i (I - mu / (1 + mu) V V^T)``.

    ``V`` is an orthonormal basis of the rows of ``A_1``. The paper merges a style and a content and
    protects the style; here the first adapter in the order of attaching is the protected one, and
    any number of others is projected.
    """

    name = "np"
    summary = "keeps the others out of the first adapter's directions (NP-LoRA)"
    shapes = True

    def shape(
        self,
        layer: str,
        names: Sequence[str],
        factors: Sequence[Factors],
        strengths: Sequence[float],
    ) -> tuple[list[Factors], list[float]]:
        """Project all adapters but the first."""
        if len(factors) < 2:
            return list(factors), list(strengths)
        first = factors[0][0].detach().double()
        basis = torch.linalg.qr(first.T).Q
        projected = [factors[0]]
        for A, B in factors[1:]:
            rows = A.detach().double()
            rows = rows - MU / (1 + MU) * (rows @ basis.to(rows.device)) @ basis.T.to(rows.device)
            projected.append((rows.to(A.dtype), B))
        return projected, list(strengths)
