import math

import pytest
import torch

from train.retrieval.losses import ContrastiveLoss, multi_positive_info_nce


def unit(*shape: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=g), dim=-1)


def naive(logits: torch.Tensor, positives: torch.Tensor, ignored: torch.Tensor) -> list[float]:
    losses = []
    for row, pos, skip in zip(logits.tolist(), positives.tolist(), ignored.tolist(), strict=True):
        negatives = [math.exp(v) for v, p, s in zip(row, pos, skip, strict=True) if not p and not s]
        own = [math.exp(v) for v, p in zip(row, pos, strict=True) if p]
        each = [-math.log(e / (e + sum(negatives))) for e in own]
        losses.append(sum(each) / len(each) if each else 0.0)
    return losses


def test_one_positive_per_row_is_cross_entropy() -> None:
    text, lora = unit(6, 8, seed=0), unit(6, 8, seed=1)
    ids = torch.arange(6)
    loss = ContrastiveLoss(temperature=0.1)(text, lora, ids, ids)
    logits = text @ lora.T / 0.1
    both = (
        torch.nn.functional.cross_entropy(logits, ids),
        torch.nn.functional.cross_entropy(logits.T, ids),
    )
    assert loss.item() == pytest.approx((both[0] + both[1]).item() / 2, rel=1e-5)


def test_several_positives_and_ignored_pairs_equal_a_naive_rewrite() -> None:
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(7, 9, generator=g) * 3
    positives = torch.rand(7, 9, generator=g) < 0.3
    ignored = (torch.rand(7, 9, generator=g) < 0.3) & ~positives
    positives[0] = False
    loss = multi_positive_info_nce(logits, positives, ignored)
    torch.testing.assert_close(
        loss, torch.tensor(naive(logits, positives, ignored)), rtol=1e-4, atol=1e-5
    )


def test_another_lora_of_the_same_concept_is_no_negative() -> None:
    text, lora = unit(3, 8, seed=0), unit(3, 8, seed=1)
    ids, concepts = torch.arange(3), torch.tensor([0, 0, 1])
    loss = ContrastiveLoss()
    moved = lora.clone().requires_grad_()
    logits = (text @ moved.T)[:1]
    mask = torch.tensor([[True, False, False]])
    multi_positive_info_nce(logits, mask, torch.tensor([[False, True, False]])).sum().backward()
    assert moved.grad is not None and not moved.grad[1].any() and moved.grad[2].any()
    with_concepts = loss(text, lora, ids, ids, concepts, concepts)
    assert with_concepts < loss(text, lora, ids, ids)


def test_the_temperature_learns_and_stays_above_its_floor() -> None:
    loss = ContrastiveLoss(temperature=0.07, lowest=0.05)
    text, ids = unit(4, 8, seed=0), torch.arange(4)
    loss(text, text, ids, ids).backward()
    assert loss.log_scale.grad is not None and loss.log_scale.grad < 0
    with torch.no_grad():
        loss.log_scale.fill_(100.0)
    expected = ContrastiveLoss(temperature=0.05)(text, text, ids, ids)
    assert loss(text, text, ids, ids).item() == pytest.approx(expected.item(), abs=1e-6)
