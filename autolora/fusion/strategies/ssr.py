"""SSR-Merge: least squares on what each adapter answers to its own prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from autolora.errors import FusionError
from autolora.fusion.adapter import Adapter
from autolora.fusion.packed import Factors
from autolora.fusion.strategies.base import Run, Strategy, register

RIDGE = 1e-4
"""Of the mean of the diagonal of G."""


@register
class SSR(Strategy):
    """SSR-Merge (2026, arXiv 2606.10617), in closed form.

    With ``A = [A_1; ...; A_K]``, ``B = [B_1, ..., B_K]`` and ``X_k`` the inputs of a layer while
    adapter ``k`` draws a prompt of its own at one timestep, ``Z_k = A X_k``::

        G = sum_k Z_k Z_k^T       Q = [A_1 X_1 Z_1^T; ...; A_K X_K Z_K^T]
        R = Q (G + ridge I)^-1    dW = B R A

    which minimises ``sum_k |B R Z_k - B_k A_k X_k|^2``. Where all prompts give the same inputs it
    is the average.
    """

    name = "ssr"
    summary = "least squares on each adapter's own prompt (SSR-Merge)"
    shapes = True
    calibrates = True

    def __init__(self) -> None:
        self._rows: dict[str, dict[str, range]] = {}
        self._grams: dict[str, dict[str, Tensor]] = {}

    def prepare(
        self, module: nn.Module, adapters: Sequence[tuple[Adapter, float]], run: Run
    ) -> None:
        """Take ``Z_k Z_k^T`` of every layer under each adapter's own prompt."""
        down: dict[str, Tensor] = {}
        for adapter, _ in adapters:
            for layer in adapter.layers:
                rows = self._rows.setdefault(layer, {})
                A = adapter.factors(layer)[0].detach().float()
                start = sum(map(len, rows.values()))
                rows[adapter.name] = range(start, start + len(A))
                down[layer] = torch.cat([down[layer], A]) if layer in down else A
        # `run` attaches an adapter around these layers, which are called all the same.
        linears = {layer: module.get_submodule(layer) for layer in down}
        for adapter, _ in adapters:
            grams: dict[str, Tensor] = {}
            handles = [
                linear.register_forward_pre_hook(_gram(layer, down[layer], grams))
                for layer, linear in linears.items()
            ]
            try:
                run(adapter)
            finally:
                for handle in handles:
                    handle.remove()
            for layer, gram in grams.items():
                self._grams.setdefault(layer, {})[adapter.name] = gram

    def shape(
        self,
        layer: str,
        names: Sequence[str],
        factors: Sequence[Factors],
        strengths: Sequence[float],
    ) -> tuple[list[Factors], list[float]]:
        """Replace the adapters by one of the sum of their ranks."""
        if not factors:
            return [], []
        grams, rows = self._grams.get(layer, {}), self._rows.get(layer, {})
        if any(name not in grams or name not in rows for name in names):
            raise FusionError(
                "the strategy ssr needs a pass with each adapter's own prompt first; attach by the "
                "pipeline, or call its prepare"
            )
        kept = [row for name in names for row in rows[name]]
        picked = [grams[name][kept][:, kept] for name in names]
        return [ssr(factors, picked, strengths)], [1.0]


def _gram(
    layer: str, down: Tensor, grams: dict[str, Tensor]
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
        z = x.float() @ down.to(x.device).T
        gram = (z.T @ z).double().cpu()
        grams[layer] = grams[layer] + gram if layer in grams else gram

    return hook


def ssr(factors: Sequence[Factors], grams: Sequence[Tensor], strengths: Sequence[float]) -> Factors:
    """Return factors ``(R A [R, in], B [out, R])`` of the merged change.

    Args:
        factors: ``(A [r, in], B [out, r])`` of K adapters.
        grams: ``Z_k Z_k^T [R, R]`` of each, R the sum of all ranks.
        strengths: Of each, which scale ``B``.
    """
    A = torch.cat([a.detach().double() for a, _ in factors])
    B = torch.cat(
        [s * b.detach().double() for (_, b), s in zip(factors, strengths, strict=True)], 1
    )
    ranks = [len(a) for a, _ in factors]
    own = [gram.split(ranks)[k] for k, gram in enumerate(grams)]
    G = torch.stack(list(grams)).sum(0)
    G = G + RIDGE * G.diagonal().mean().clamp_min(1e-12) * torch.eye(len(G), dtype=G.dtype)
    R = torch.linalg.solve(G, torch.cat(own).T).T.to(A.device)
    return (R @ A).to(factors[0][0].dtype), B.to(factors[0][1].dtype)
