"""Choosing a set of LoRAs that covers a prompt, not the best ones for the same thing.

Each word that names something is to be answered once. A LoRA answers a word as well as its best
evidence for a concept that holds the word; evidence for a run of words is shared out by how well
the single words fit, so that an elephant does not answer "neon" because "neon elephant" is near to
it. LoRAs are then taken greedily by how much they add (the greedy algorithm for weighted set
cover); a word that a chosen one answers well enough is done, so near-duplicates add nothing. Where
nothing is likely enough, nothing is chosen.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from autolora.errors import RetrievalError
from autolora.retrieval.search import Evidence, Findings, Hit, Searcher, combine

THRESHOLD = 0.5
NEAR_DUPLICATE = 0.985


def choose(
    searcher: Searcher,
    prompt: str,
    k: int = 3,
    *,
    taken: Collection[str] = (),
    threshold: float | None = None,
) -> list[Hit]:
    """Choose LoRAs for a prompt.

    Args:
        searcher: The pool.
        prompt: What is wanted.
        k: How many LoRAs at most.
        taken: Names that are attached anyway; what they answer is not answered again.
        threshold: Probability from which a word counts as answered. By default 0.5 where metadata
            speaks, and the value calibrated on held-out LoRAs where only weights do.

    Returns:
        Hits in the order in which they were taken; empty when nothing fits.

    Raises:
        RetrievalError: An empty prompt, or k below 1.
    """
    if k < 1:
        raise RetrievalError(f"The number of LoRAs must be at least 1, not {k}.")
    findings = searcher.find(prompt)
    answers = answered_words(findings, _thresholds(searcher, threshold))
    names = [record.name for record in searcher.index.records]
    open_words = {word for scores in answers.values() for word in scores}
    for lora, scores in answers.items():
        if names[lora] in taken:
            open_words -= {word for word, score in scores.items() if score >= THRESHOLD}
    rest = {lora: scores for lora, scores in answers.items() if names[lora] not in taken}
    things = {i for i, word in enumerate(findings.words) if word.role == "content"}
    chosen = greedy_cover(rest, open_words, k, _duplicates(searcher, rest), things)
    return [_hit(searcher, findings, lora, words) for lora, words in chosen]


def _thresholds(searcher: Searcher, threshold: float | None) -> dict[str, float]:
    weights = THRESHOLD
    if searcher.retriever is not None and searcher.retriever.calibrated:
        weights = searcher.retriever.calibration.threshold
    given = {"words": THRESHOLD, "texts": THRESHOLD, "weights": weights}
    return given if threshold is None else dict.fromkeys(given, threshold)


def answered_words(
    findings: Findings, thresholds: Mapping[str, float]
) -> dict[int, dict[int, float]]:
    """How well each LoRA answers each word.

    Args:
        findings: What the channels say.
        thresholds: Probability by channel that counts as answered.

    Returns:
        By position of the record, then of the word, a value in [0, 1] where `THRESHOLD` and above
        means answered; a channel's own threshold is moved there.
    """
    singles = {c.covers[0]: n for n, c in enumerate(findings.concepts) if c.text.count(" ") == 0}
    by_lora: dict[int, list[Evidence]] = {}
    for item in findings.evidence:
        by_lora.setdefault(item.lora, []).append(item)
    result: dict[int, dict[int, float]] = {}
    for lora, items in by_lora.items():
        words: dict[int, list[float]] = {}
        for channel in sorted({item.channel for item in items}):
            own = [item for item in items if item.channel == channel]
            spread = _spread(own, singles, len(findings.concepts))
            for word, p in spread.items():
                words.setdefault(word, []).append(_rescale(p, thresholds[channel]))
        result[lora] = {word: _either(ps) for word, ps in words.items()}
    return result


def _spread(
    evidence: Sequence[Evidence], singles: Mapping[int, int], whole: int
) -> dict[int, float]:
    """Share one channel's evidence for runs of words out to the words."""
    by_concept = {item.concept: item.probability for item in evidence if item.concept >= 0}
    alone = {word: by_concept.get(number, 0.0) for word, number in singles.items()}
    answers: dict[int, float] = {}
    for item in evidence:
        if item.concept == whole:
            # The whole prompt is near to whatever is near to one of its words.
            continue
        best = max((alone.get(word, 0.0) for word in item.covers), default=0.0)
        for word in item.covers:
            literal = item.concept < 0 or len(item.covers) == 1
            share = 1.0 if literal or best <= 0 else alone.get(word, 0.0) / best
            answers[word] = max(answers.get(word, 0.0), item.probability * share)
    return answers


def _rescale(p: float, threshold: float) -> float:
    """Move a channel's threshold to the common one, piecewise linearly."""
    if threshold <= 0 or threshold >= 1:
        return p
    if p < threshold:
        return p * THRESHOLD / threshold
    return THRESHOLD + (p - threshold) * (1 - THRESHOLD) / (1 - threshold)


def _either(probabilities: Sequence[float]) -> float:
    """At least one channel is right; a channel that finds nothing adds next to nothing.

    Only channels that reach the threshold support each other: several weak hints are no reason.
    """
    strong = [p for p in probabilities if p >= THRESHOLD]
    if not strong:
        return max(probabilities, default=0.0)
    wrong = 1.0
    for p in strong:
        wrong *= 1 - p
    return 1 - wrong


def greedy_cover(
    answers: Mapping[int, Mapping[int, float]],
    open_words: Collection[int],
    k: int,
    duplicates: Mapping[int, Collection[int]],
    things: Collection[int] | None = None,
) -> list[tuple[int, tuple[int, ...]]]:
    """Take LoRAs one after another by what they add.

    Args:
        answers: As `answered_words` gives them.
        open_words: Words that are still to be answered.
        k: How many LoRAs at most.
        duplicates: LoRAs that are nearly the same, by LoRA.
        things: Words of which a LoRA must add one to be taken; all when None. The others only
            make a LoRA that answers them too come before one that does not.

    Returns:
        LoRAs with the words that each was taken for.
    """
    left = set(open_words)
    candidates = set(answers)
    chosen: list[tuple[int, tuple[int, ...]]] = []
    while left and candidates and len(chosen) < k:
        gains = {lora: _gain(answers[lora], left, things) for lora in candidates}
        best = min(candidates, key=lambda lora: (-sum(gains[lora].values()), lora))
        if not gains[best]:
            break
        chosen.append((best, tuple(sorted(gains[best]))))
        left -= set(gains[best])
        candidates -= {best, *duplicates.get(best, ())}
    return chosen


def _gain(
    answers: Mapping[int, float], left: Collection[int], things: Collection[int] | None
) -> dict[int, float]:
    """What a LoRA adds by word; nothing where it adds no thing."""
    added = {word: answers[word] for word in left if answers.get(word, 0) >= THRESHOLD}
    return added if things is None or any(word in things for word in added) else {}


def _duplicates(searcher: Searcher, loras: Collection[int]) -> dict[int, set[int]]:
    """Candidates with the same content, or vectors that can hardly be told apart."""
    records = searcher.index.records
    same: dict[int, set[int]] = {}
    ordered = sorted(lora for lora in loras if records[lora].vector is not None)
    rows = np.array([records[lora].vector for lora in ordered], np.int64)
    if len(ordered) > 1:
        vectors = searcher.index.vectors("weights", rows)
        for i, j in np.argwhere(vectors @ vectors.T > NEAR_DUPLICATE):
            if i != j:
                same.setdefault(ordered[i], set()).add(ordered[j])
    by_sha: dict[str, list[int]] = {}
    for lora in loras:
        by_sha.setdefault(records[lora].sha256, []).append(lora)
    for sha, group in by_sha.items():
        for lora in group if sha else ():
            same.setdefault(lora, set()).update(other for other in group if other != lora)
    return same


def _hit(searcher: Searcher, findings: Findings, lora: int, words: Sequence[int]) -> Hit:
    """A hit that gives the reason for the words it was taken for."""
    wanted = set(words)
    own = [
        item
        for item in findings.evidence
        if item.lora == lora and wanted & set(item.covers) and item.concept < len(findings.concepts)
    ]
    narrowed = Findings(findings.words, findings.concepts, own)
    hit = searcher.hit(lora, narrowed, combine(own)[lora])
    return replace(hit, concepts=tuple(findings.words[i].text for i in words))
