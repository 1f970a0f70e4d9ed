"""From similarities to probabilities.

A cosine says little by itself: some LoRAs are near to every text (hubs), some texts near to every
LoRA. A similarity is therefore compared with the same LoRA's similarities to background texts and
with the same text's similarities to reference LoRAs, and a logistic regression on these two
standard scores, fitted on pairs that the encoder was not trained on, gives the probability that
the LoRA is what the text asks for.

An encoder knows the LoRAs it was fitted to by heart, and so puts them before new ones also for
texts that merely resemble theirs. A LoRA that is surely one of the known concepts is nothing else:
what it claims beyond that is explained away (`explain_away`).

Shape legend: q texts, n LoRAs, b background texts, m reference LoRAs, c concepts, D dimensions.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

_TINY = 1e-6
_PENALTY = 3.0


@dataclass(frozen=True)
class Calibration:
    """Logistic regression on two standard scores.

    Attributes:
        bias: Log odds at scores of zero.
        lora: Weight of the score among background texts.
        text: Weight of the score among reference LoRAs.
        threshold: Probability from which a LoRA is worth attaching.
    """

    bias: float = -6.0
    lora: float = 1.0
    text: float = 1.0
    threshold: float = 0.5

    def log_odds(self, scores: Tensor) -> Tensor:
        """Logarithm of the odds that a LoRA is what a text asks for.

        Args:
            scores: Standard scores ``[..., 2]`` as `standard_scores` gives them.

        Returns:
            ``[...]`` in nats.
        """
        return self.bias + scores @ scores.new_tensor([self.lora, self.text])

    def to_dict(self) -> dict[str, float]:
        """Plain data."""
        return asdict(self)


def standard_scores(text: Tensor, lora: Tensor, background: Tensor, references: Tensor) -> Tensor:
    """Similarities measured against what is usual for the LoRA and for the text.

    Args:
        text: Unit vectors ``[q, D]``.
        lora: Unit vectors ``[n, D]``.
        background: Texts ``[b, D]``.
        references: LoRAs ``[m, D]``.

    Returns:
        ``[q, n, 2]``, standard deviations above the LoRA's mean over background texts, and above
        the text's mean over reference LoRAs.
    """
    similarity = text @ lora.T
    of_lora = lora @ background.T
    of_text = text @ references.T
    by_lora = (similarity - of_lora.mean(1)) / _deviation(of_lora).clamp_min(_TINY).T
    by_text = (similarity - of_text.mean(1, keepdim=True)) / _deviation(of_text).clamp_min(_TINY)
    return torch.stack([by_lora, by_text], -1)


def _deviation(similarity: Tensor) -> Tensor:
    """Standard deviation of each row, ``[rows, 1]``; 0 of a single value, which has none."""
    if not len(similarity) or similarity.shape[1] < 2:
        return torch.zeros(len(similarity), 1)
    return similarity.std(1, keepdim=True)


def explain_away(log_odds: Tensor, known: Tensor) -> Tensor:
    """Lower what a LoRA claims by how much surer it is to be something known.

    ``l - max(0, k - l)``: cross-domain similarity local scaling (CSLS, Conneau et al. 2018, arXiv
    1710.04087) on the side of the LoRA with one neighbour, where the LoRA has a better one.

    Args:
        log_odds: ``[..., n]`` of texts, in nats.
        known: ``[n]``, the highest that each LoRA reaches for a concept that the encoders were
            fitted to; minus infinity changes nothing.

    Returns:
        ``[..., n]``, at most `log_odds`.
    """
    return log_odds - (known - log_odds).clamp_min(0)


def fit_calibration(
    scores: Tensor, positives: Tensor, known: Tensor | None = None, texts: int = 1
) -> Calibration:
    """Fit on pairs that the encoder was not trained on.

    The weights are drawn to 1, more so the fewer pairs there are. Negatives keep their natural
    share, so that the probability is that of this LoRA in a pool of about this size. The threshold
    maximises the mean of two shares: queries whose best LoRA is right and above it, and queries
    with their own LoRAs taken out of the pool for which every LoRA is below it.

    Args:
        scores: ``[q, n, 2]``.
        positives: ``[q, n]``; a query may have none, which says that nothing fits it.
        known: Scores ``[c, n, 2]`` of the concepts that the encoder was fitted to, which explain
            LoRAs away before the threshold is looked for.
        texts: How many texts of a prompt are asked for at once; where nothing fits the prompt,
            all of them should find every LoRA below the threshold.

    Returns:
        The calibration.
    """
    x = scores.double().flatten(0, 1)
    x = torch.cat([torch.ones(len(x), 1, dtype=x.dtype), x], 1)
    y = positives.double().flatten()
    weights = torch.zeros(3, dtype=x.dtype)
    # The two scores are near to each other; the penalty keeps few pairs from playing one of them
    # off against the other.
    prior = torch.tensor([0.0, 1.0, 1.0], dtype=x.dtype)
    penalty = torch.diag(torch.tensor([1e-6, _PENALTY, _PENALTY], dtype=x.dtype))
    for _ in range(50):  # Newton's method; the loss is convex.
        p = torch.sigmoid(x @ weights)
        gradient = x.T @ (p - y) + penalty @ (weights - prior)
        hessian = (x * (p * (1 - p))[:, None]).T @ x + penalty + 1e-9 * torch.eye(3).double()
        step = torch.linalg.solve(hessian, gradient)
        weights = weights - step.clamp(-2, 2)
        if step.abs().max() < 1e-8:
            break
    bias, lora, text = weights.tolist()
    fitted = Calibration(bias, lora, text)
    log_odds = fitted.log_odds(scores)
    if known is not None and len(known):
        log_odds = explain_away(log_odds, fitted.log_odds(known).amax(0))
    return replace(fitted, threshold=_best_threshold(log_odds.sigmoid(), positives, texts))


def _best_threshold(probability: Tensor, positives: Tensor, texts: int = 1) -> float:
    best, where = probability.max(1)
    right = positives.gather(1, where[:, None])[:, 0]
    asked = positives.any(1)
    without = probability.masked_fill(positives, 0.0).amax(1)
    candidates = torch.cat([best, without]).unique()
    value = [
        float(((best >= t) & right)[asked].double().mean() + (without < t).double().mean() ** texts)
        for t in candidates
    ]
    return float(candidates[int(torch.tensor(value).argmax())])
