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


def findings(prompt: str, *evidence: tuple[int, str, float], literal: bool = False) -> Findings:
    """Evidence as LoRA, run of words and probability."""
    words = read_words(prompt)
    concepts = find_concepts(words)
    number = {concept.text: i for i, concept in enumerate(concepts)}
    items = [Evidence(lora, number[text], p, literal=literal) for lora, text, p in evidence]
    return Findings(words, concepts, items)


def test_only_what_is_likely_enough_answers() -> None:
    found = findings("an elephant", (0, "elephant", 0.6), (1, "elephant", 0.4))
    assert answered_words(found) == {0: {1: 0.6}}
    assert answered_words(found, 0.7) == {}
    assert answered_words(found, 0.3) == {0: {1: 0.6}, 1: {1: 0.4}}


def test_what_is_to_be_left_out_answers_nothing() -> None:
    found = findings("a rose, no elephant", (0, "elephant", 0.9), (1, "rose", 0.9))
    assert answered_words(found) == {1: {1: 0.9}}


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
    found = findings("a neon rose", (0, "neon", 0.9), (1, "rose", 0.8))
    monkeypatch.setattr(Searcher, "find", lambda *_: found)
    assert [hit.name for hit in choose(pool, "x")] == expected


def test_what_taken_ones_answer_is_not_answered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = searcher(np.eye(3, dtype=np.float32), ["a", "b", "c"])
    found = findings(
        "a neon rose",
        (0, "rose", 0.9),
        (1, "rose", 0.8),
        (2, "neon", 0.7),
        (0, "neon", 0.3),
    )
    monkeypatch.setattr(Searcher, "find", lambda *_: found)
    assert [hit.name for hit in choose(pool, "x", taken=["l0"])] == ["l2"]
    assert [hit.name for hit in choose(pool, "x", taken=["l2"])] == ["l0"]
    hit = choose(pool, "x")[0]
    assert (hit.concepts, hit.score) == (("rose",), pytest.approx(0.9))


def test_a_threshold_of_ones_own_holds_for_every_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = searcher(np.eye(2, dtype=np.float32), ["a", "b"])
    found = findings("a neon rose", (0, "rose", 0.9), (1, "neon", 0.6))
    monkeypatch.setattr(Searcher, "find", lambda *_: found)
    assert [hit.name for hit in choose(pool, "x")] == ["l0", "l1"]
    assert [hit.name for hit in choose(pool, "x", threshold=0.7)] == ["l0"]
    assert choose(pool, "x", threshold=0.95) == []


def test_a_run_of_words_is_shared_out_by_its_words() -> None:
    found = findings(
        "a neon elephant",
        (0, "elephant", 0.8),
        (0, "neon", 0.08),
        (0, "neon elephant", 0.9),
    )
    # The elephant is why the run is near; and where no word alone is near, all of them are.
    assert answered_words(found)[0] == pytest.approx({2: 0.9})
    alone = findings("a neon elephant", (0, "neon elephant", 0.9), (0, "elephant", 0.1))
    assert answered_words(alone)[0] == pytest.approx({1: 0.9, 2: 0.9})


def test_a_name_of_several_words_answers_them_all() -> None:
    told = [(0, "neon elephant", 0.9), (0, "elephant", 0.6)]
    found = findings("a neon elephant", *told, literal=True)
    assert answered_words(found)[0] == pytest.approx({1: 0.9, 2: 0.9})


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
    answers = {
        i: {w: 0.5 + float(rng.rand()) / 2 for w in range(5) if rng.rand() < 0.6} for i in range(9)
    }
    chosen = greedy_cover(answers, set(range(5)), 4, {})
    assert [lora for lora, _ in chosen] == brute_force_cover(answers, set(range(5)), 4)
    covered = [word for _, words in chosen for word in words]
    assert len(covered) == len(set(covered))
