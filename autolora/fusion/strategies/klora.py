"""K-LoRA: in each layer and step the adapter with the larger top entries."""

from __future__ import annotations

from torch import Tensor

from autolora.fusion.strategies.base import Step, Strategy, register
from autolora.fusion.strategies.deltas import dense

ALPHA, BETA = 1.5, 0.5


@register
class KLoRA(Strategy):
    """K-LoRA (Ouyang et al., 2025, arXiv 2502.18461).

    In a layer the sums ``S_i`` of the ``K = r_1 r_i`` largest ``|dW_i|`` are compared, those of all
    but the first adapter (the content) times ``gamma (alpha t / T + beta)`` with ``gamma`` the
    ratio of all entries' sums, so that content speaks early and style late; the larger one acts
    alone. The paper has two adapters; here the first is the content, all others are styles.
    """

    name = "klora"
    summary = "in each layer and step one adapter, by its largest entries (K-LoRA)"
    by_step = True

    def __init__(self) -> None:
        self._top: dict[str, dict[str, float]] = {}
        self._gamma: dict[str, float] = {}
        self._known: tuple[str, ...] = ()

    def _measure(self, step: Step) -> None:
        """Sum up the entries of all layers, once for a set of adapters."""
        content, totals = step.names[0], dict.fromkeys(step.names, 0.0)
        self._known = step.names
        for layer, fused in step.layers.items():
            ranks = {n: a.shape[0] for n, (a, _) in zip(fused.names, fused.factors, strict=True)}
            self._top[layer] = {}
            for name, pair in zip(fused.names, fused.factors, strict=True):
                sizes = dense(pair).abs().flatten()
                k = min(sizes.numel(), ranks.get(content, 1) * ranks[name])
                self._top[layer][name] = float(sizes.topk(k).values.sum())
                totals[name] += float(sizes.sum())
        self._gamma = {n: totals[content] / t if t > 0 else 0.0 for n, t in totals.items()}

    def predict(self, step: Step) -> Tensor:
        """Let one adapter act in each layer."""
        if self._known != step.names:
            self._measure(step)
        late = ALPHA * step.number / max(1, step.steps) + BETA
        for layer, fused in step.layers.items():
            scores = {n: self._score(layer, n, step.names[0], late) for n in fused.names}
            live = {n: s for n, s in scores.items() if step.strengths[n] != 0}
            best = max(live, key=lambda n: live[n]) if live else None
            fused.set_strengths([step.strengths[n] if n == best else 0.0 for n in fused.names])
        return step.run({})

    def _score(self, layer: str, name: str, content: str, late: float) -> float:
        top = self._top[layer][name]
        return top if name == content else top * self._gamma[name] * late
