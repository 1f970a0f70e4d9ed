"""What counts as an answer to a word, and which of several answers are taken."""

import numpy as np
import pytest

from autolora.retrieval.index import PoolIndex, Provenance, Record, build_vectors
from autolora.retrieval.prompt_terms import find_concepts, read_words
from autolora.retrieval.search import (
    Evidence,
    Findings,
    Searcher,
    answered_words,
    choose,
    greedy_cover,
)
from tests.retrieval.synthetic import WordVectors

WORDS = WordVectors()
HALF = {"words": 0.5, "texts": 0.5, "weights": 0.5}


def findings(prompt: str, *evidence: tuple[int, str, str, float]) -> Findings:
    """Evidence as LoRA, channel, concept and probability; the whole prompt is the concept ``*``."""
    words = read_words(prompt)
    concepts = find_concepts(words)
    texts = [concept.text for concept in concepts]
    every = tuple(i for i, word in enumerate(words) if word.role == "content")
    items = [
        Evidence(lora, channel, len(texts), p, "", every)
        if text == "*"
        else Evidence(lora, channel, texts.index(text), p, "", concepts[texts.index(text)].covers)
        for lora, channel, text, p in evidence
    ]
    return Findings(words, concepts, items)


def test_the_whole_prompt_answers_no_word() -> None:
    found = findings("a neon elephant", (0, "texts", "*", 0.99), (0, "texts", "neon", 0.2))
    assert answered_words(found, HALF)[0] == pytest.approx({1: 0.2})


def test_a_channels_threshold_is_moved_to_the_common_one() -> None:
    thresholds = {**HALF, "weights": 0.8}
    for p, moved in ((0.4, 0.25), (0.8, 0.5), (0.9, 0.75), (1.0, 1.0)):
        found = findings("an elephant", (0, "weights", "elephant", p))
        assert answered_words(found, thresholds)[0][1] == pytest.approx(moved)
    extreme = {**HALF, "weights": 1.0}
    found = findings("an elephant", (0, "weights", "elephant", 0.7))
    assert answered_words(found, extreme)[0][1] == 0.7


def test_only_channels_that_are_sure_support_each_other() -> None:
    both = [(0, "texts", "elephant", 0.6), (0, "weights", "elephant", 0.7)]
    assert answered_words(findings("an elephant", *both), HALF)[0][1] == pytest.approx(0.88)
    faint = [(0, "texts", "elephant", 0.4), (0, "weights", "elephant", 0.45)]
    assert answered_words(findings("an elephant", *faint), HALF)[0][1] == 0.45
    mixed = [(0, "texts", "elephant", 0.4), (0, "weights", "elephant", 0.7)]
    assert answered_words(findings("an elephant", *mixed), HALF)[0][1] == pytest.approx(0.7)


def test_near_duplicates_of_a_chosen_one_are_left_out() -> None:
    answers = {0: {1: 0.9}, 1: {2: 0.8}, 2: {2: 0.7}}
    assert greedy_cover(answers, {1, 2}, 3, {}) == [(0, (1,)), (1, (2,))]
    assert greedy_cover(answers, {1, 2}, 3, {0: {1}}) == [(0, (1,)), (2, (2,))]


def test_a_lora_must_add_a_thing_and_modifiers_only_break_ties() -> None:
    answers = {0: {1: 0.9}, 1: {1: 0.8, 2: 0.8}}  # word 1 is a modifier, word 2 a thing
    assert greedy_cover(answers, {1, 2}, 3, {}, things={2}) == [(1, (1, 2))]
    assert greedy_cover({0: {1: 0.9}}, {1, 2}, 3, {}, things={2}) == []


def searcher(vectors: np.ndarray, shas: list[str]) -> Searcher:
    records = [Record(f"l{i}", f"l{i}", 1, 1, "", sha, f"l{i}", i) for i, sha in enumerate(shas)]
    texts = build_vectors(np.zeros((0, WORDS.dim), np.float32))
    provenance = Provenance("e", vectors.shape[1], WORDS.name, WORDS.dim)
    return Searcher(PoolIndex(provenance, records, [], build_vectors(vectors), texts), WORDS)


@pytest.mark.parametrize(
    ("angle", "shas", "expected"),
    [
        (0.0, ["a", "b"], ["l0"]),  # the same vector in another file
        (0.1, ["a", "b"], ["l0"]),  # a cosine of 0.995
        (0.3, ["a", "b"], ["l0", "l1"]),  # 0.955
        (1.5, ["a", "a"], ["l0"]),  # the same bytes
        (1.5, ["", ""], ["l0", "l1"]),  # unread files have no hash to share
    ],
)
def test_what_is_nearly_the_same_is_taken_once(
    monkeypatch: pytest.MonkeyPatch, angle: float, shas: list[str], expected: list[str]
) -> None:
    pool = searcher(np.array([[1, 0], [np.cos(angle), np.sin(angle)]], np.float32), shas)
    found = findings("a neon rose", (0, "texts", "neon", 0.9), (1, "texts", "rose", 0.8))
    monkeypatch.setattr(Searcher, "find", lambda self, prompt: found)
    assert [hit.name for hit in choose(pool, "x")] == expected


def test_what_taken_ones_answer_is_not_answered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = searcher(np.eye(3, dtype=np.float32), ["a", "b", "c"])
    found = findings(
        "a neon rose",
        (0, "texts", "rose", 0.9),
        (1, "texts", "rose", 0.8),
        (2, "texts", "neon", 0.7),
        (0, "texts", "neon", 0.3),
    )
    monkeypatch.setattr(Searcher, "find", lambda self, prompt: found)
    assert [hit.name for hit in choose(pool, "x", taken=["l0"])] == ["l2"]
    assert [hit.name for hit in choose(pool, "x", taken=["l2"])] == ["l0"]
    hit = choose(pool, "x")[0]
    assert (hit.concepts, hit.score) == (("rose",), pytest.approx(0.9))


def test_a_threshold_of_ones_own_holds_for_every_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = searcher(np.eye(2, dtype=np.float32), ["a", "b"])
    found = findings("a neon rose", (0, "texts", "rose", 0.9), (1, "weights", "neon", 0.6))
    monkeypatch.setattr(Searcher, "find", lambda self, prompt: found)
    assert [hit.name for hit in choose(pool, "x")] == ["l0", "l1"]
    assert [hit.name for hit in choose(pool, "x", threshold=0.7)] == ["l0"]
    assert choose(pool, "x", threshold=0.95) == []


def test_a_run_of_words_is_shared_out_by_its_words() -> None:
    found = findings(
        "a neon elephant",
        (0, "texts", "elephant", 0.8),
        (0, "texts", "neon", 0.08),
        (0, "texts", "neon elephant", 0.9),
    )
    assert answered_words(found, HALF)[0] == pytest.approx({1: 0.09, 2: 0.9})


def brute_force_cover(answers: dict[int, dict[int, float]], left: set[int], k: int) -> list[int]:
    chosen: list[int] = []
    while len(chosen) < k:
        gains = [
            (sum(p for w, p in answers[i].items() if w in left and p >= 0.5), -i)
            for i in answers
            if i not in chosen
        ]
        if not gains or max(gains)[0] == 0:
            break
        best = -max(gains)[1]
        chosen.append(best)
        left = left - {w for w, p in answers[best].items() if p >= 0.5}
    return chosen


@pytest.mark.parametrize("seed", range(8))
def test_greedy_cover_equals_a_naive_rewrite(seed: int) -> None:
    rng = np.random.RandomState(seed)
    answers = {i: {w: float(rng.rand()) for w in range(5) if rng.rand() < 0.6} for i in range(9)}
    chosen = greedy_cover(answers, set(range(5)), 4, {})
    assert [lora for lora, _ in chosen] == brute_force_cover(answers, set(range(5)), 4)
    covered = [word for _, words in chosen for word in words]
    assert len(covered) == len(set(covered))
