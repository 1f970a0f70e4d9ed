"""From similarities to probabilities.

A cosine says little by itself: some LoRAs are near to every text (hubs), some texts near to every
LoRA. A similarity is therefore compared with the same LoRA's similarities to background texts and
with the same text's similarities to reference LoRAs, and a logistic regression on these two
standard scores, fitted on pairs that the encoder was not trained on, gives the probability that
the LoRA is what the text asks for.

Shape legend: q texts, n LoRAs, b background texts, m reference LoRAs, D dimensions.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

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

    def probability(self, scores: Tensor) -> Tensor:
        """Probabilities.

        Args:
            scores: Standard scores ``[..., 2]`` as `standard_scores` gives them.

        Returns:
            ``[...]`` in [0, 1].
        """
        return torch.sigmoid(self.bias + scores @ scores.new_tensor([self.lora, self.text]))

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
        ``[q, n, 2]``: standard deviations above the LoRA's mean over background texts, and above
        the text's mean over reference LoRAs.
    """
    similarity = text @ lora.T
    of_lora = lora @ background.T
    of_text = text @ references.T
    by_lora = (similarity - of_lora.mean(1)) / of_lora.std(1).clamp_min(_TINY)
    by_text = (similarity - of_text.mean(1, keepdim=True)) / of_text.std(1, keepdim=True).clamp_min(
        _TINY
    )
    return torch.stack([by_lora, by_text], -1)


def fit_calibration(
    scores: Tensor, positives: Tensor, ignored: Tensor | None = None
) -> Calibration:
    """Fit on pairs that the encoder was not trained on.

    The weights are drawn to 1, more so the fewer pairs there are. Negatives keep their natural
    share, so that the probability is that of this LoRA in a pool of about this size. The threshold
    maximises the mean of two shares: queries whose best LoRA is right and above it, and queries
    with their own LoRAs taken out of the pool for which every LoRA is below it.

    Args:
        scores: ``[q, n, 2]``.
        positives: ``[q, n]``; a query may have none, which says that nothing fits it.
        ignored: ``[q, n]``, pairs that are neither.

    Returns:
        The calibration.
    """
    kept = torch.ones_like(positives) if ignored is None else ~ignored
    x = scores[kept].double()
    x = torch.cat([torch.ones(len(x), 1, dtype=x.dtype), x], 1)
    y = positives[kept].double()
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
    return Calibration(bias, lora, text, _best_threshold(fitted.probability(scores), positives))


def _best_threshold(probability: Tensor, positives: Tensor) -> float:
    best, where = probability.max(1)
    right = positives.gather(1, where[:, None])[:, 0]
    asked = positives.any(1)
    without = probability.masked_fill(positives, 0.0).amax(1)
    candidates = torch.cat([best, without]).unique()
    value = [
        float(((best >= t) & right)[asked].double().mean() + (without < t).double().mean())
        for t in candidates
    ]
    return float(candidates[int(torch.tensor(value).argmax())])
