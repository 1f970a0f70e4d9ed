import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train.retrieval.metrics import best_ranks, chance, evaluate


def naive_rank(scores: list[float], positives: list[bool]) -> int:
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], positives[i]))
    return 1 + next(place for place, i in enumerate(order) if positives[i])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(1, 12), st.integers(0, 10_000))
def test_metrics_equal_a_naive_rewrite(queries: int, candidates: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    # Few distinct values, so that there are many ties.
    scores = torch.randint(0, 4, (queries, candidates), generator=g).float()
    positives = torch.rand(queries, candidates, generator=g) < 0.3
    positives[torch.arange(queries), torch.randint(candidates, (queries,), generator=g)] = True
    pairs = zip(scores.tolist(), positives.tolist(), strict=True)
    expected = [naive_rank(s, p) for s, p in pairs]
    assert best_ranks(scores, positives).tolist() == expected
    metrics = evaluate(scores, positives)
    assert metrics.mrr == pytest.approx(sum(1 / r for r in expected) / queries)
    assert metrics.median_rank == pytest.approx(statistics.median(expected))
    for k in (1, 5, 10):
        assert metrics.recall[k] == pytest.approx(sum(r <= k for r in expected) / queries)


def test_equal_scores_gain_nothing() -> None:
    positives = torch.eye(4, dtype=torch.bool)
    assert best_ranks(torch.zeros(4, 4), positives).tolist() == [4, 4, 4, 4]


def test_chance_equals_a_simulation() -> None:
    g = torch.Generator().manual_seed(0)
    positives = torch.zeros(2, 12, dtype=torch.bool)
    positives[0, 3] = True
    positives[1, [0, 5, 7]] = True
    expected = chance(positives)
    trials = torch.rand(20_000, 12, generator=g)
    for row in (0, 1):
        alone = chance(positives[row : row + 1])
        seen = evaluate(trials, positives[row].expand(20_000, -1))
        for k in (1, 5, 10):
            assert alone.recall[k] == pytest.approx(seen.recall[k], abs=0.015)
        assert alone.mrr == pytest.approx(seen.mrr, abs=0.01)
        assert abs(alone.median_rank - seen.median_rank) <= 1
    assert expected.recall[1] == pytest.approx((1 / 12 + 3 / 12) / 2)
    assert expected.recall[10] <= 1 + 1e-12


@pytest.mark.parametrize(
    ("scores", "positives", "words"),
    [
        (torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.bool), "at least one positive"),
        (torch.full((1, 3), torch.nan), torch.ones(1, 3, dtype=torch.bool), "must be numbers"),
    ],
)
def test_bad_input(scores: torch.Tensor, positives: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        best_ranks(scores, positives)
