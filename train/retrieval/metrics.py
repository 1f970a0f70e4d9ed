"""Retrieval metrics: recall at k, mean reciprocal rank, median rank, and their chance level.

Shape legend: Q queries, N candidates.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

RECALLS = (1, 5, 10)


@dataclass(frozen=True)
class Metrics:
    """How well a ranking finds what belongs to each query.

    Attributes:
        recall: Share of queries with a positive among the first k, by k.
        mrr: Mean of one over the rank of the best positive.
        median_rank: Median rank of the best positive, 1 at best.
        queries: Number of queries.
        candidates: Number of candidates.
    """

    recall: dict[int, float]
    mrr: float
    median_rank: float
    queries: int
    candidates: int

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        plain = asdict(self)
        plain["recall"] = {str(k): value for k, value in self.recall.items()}
        return plain


def best_ranks(scores: Tensor, positives: Tensor) -> Tensor:
    """Rank of the best positive of each query.

    Ties are counted against the query: candidates that are no positives and score the same as the
    best positive stand before it, so that nothing is gained by giving equal scores.

    Args:
        scores: ``[Q, N]``, higher is better.
        positives: ``[Q, N]``, true for candidates that belong to the query; at least one per row.

    Returns:
        Ranks ``[Q]`` from 1, int64.

    Raises:
        ValueError: A query without a positive, or scores that are not numbers.
    """
    if not bool(positives.any(1).all()):
        raise ValueError("every query needs at least one positive candidate")
    if bool(scores.isnan().any()):
        raise ValueError("scores must be numbers")
    best = scores.masked_fill(~positives, -torch.inf).amax(1, keepdim=True)
    return ((scores >= best) & ~positives).sum(1) + 1


def summarize(ranks: Tensor, candidates: int) -> Metrics:
    """Metrics of ranks.

    Args:
        ranks: ``[Q]`` from 1.
        candidates: N, how many candidates were ranked.

    Returns:
        The metrics; the median of an even number of ranks is the mean of the middle two.
    """
    ranks = ranks.double()
    return Metrics(
        recall={k: float((ranks <= k).double().mean()) for k in RECALLS},
        mrr=float((1 / ranks).mean()),
        median_rank=float(torch.quantile(ranks, 0.5)),
        queries=len(ranks),
        candidates=candidates,
    )


def evaluate(scores: Tensor, positives: Tensor) -> Metrics:
    """Metrics of scores; see `best_ranks` and `summarize`.

    Args:
        scores: ``[Q, N]``.
        positives: ``[Q, N]``.

    Returns:
        The metrics.
    """
    return summarize(best_ranks(scores, positives), scores.shape[1])


def chance(positives: Tensor) -> Metrics:
    """Expected metrics of a random order.

    The rank of the first of m positives among N is r with probability
    ``C(N - r, m - 1) / C(N, m)``.

    Args:
        positives: ``[Q, N]``.

    Returns:
        Expected metrics; the median rank is that of the mixture over queries.
    """
    total = positives.shape[1]
    law = torch.zeros(total, dtype=torch.float64)
    counts = positives.sum(1).tolist()
    for m in set(counts):
        ways = [
            math.comb(total - rank, m - 1) / math.comb(total, m) for rank in range(1, total + 1)
        ]
        law += torch.tensor(ways, dtype=torch.float64) * counts.count(m) / len(counts)
    rank = torch.arange(1, total + 1, dtype=torch.float64)
    return Metrics(
        recall={k: float(law[:k].sum()) for k in RECALLS},
        mrr=float((law / rank).sum()),
        median_rank=float(rank[min(int((law.cumsum(0) < 0.5).sum()), total - 1)]),
        queries=len(counts),
        candidates=total,
    )
