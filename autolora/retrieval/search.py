"""Ranking a pool for a prompt, with the reasons.

Three channels look at each concept of the prompt and at the prompt as a whole: *words* (metadata
that stands in the prompt), *texts* (metadata near in meaning) and *weights* (the trained encoder).
Each gives probabilities; a LoRA's score is that at least one channel is right,
``1 - prod(1 - p)``. Ties and scores that say nothing are ordered by reciprocal rank fusion of the
channels (Cormack et al. 2009), averaged over the channels in which a LoRA can be found at all, so
that one without metadata is not ranked below others for lack of a channel.

Shape legend: q concepts, n candidates, D dimensions.

Choosing a set of LoRAs that covers a prompt, not the best ones for the same thing.

Each word that names something is to be answered once. A LoRA answers a word as well as its best
evidence for a concept that holds the word; evidence for a run of words is shared out by how well
the single words fit, so that an elephant does not answer "neon" because "neon elephant" is near to
it. LoRAs are then taken greedily by how much they add (the greedy algorithm for weighted set
cover); a word that a chosen one answers well enough is done, so near-duplicates add nothing. Where
nothing is likely enough, nothing is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np
import torch

from autolora.errors import RetrievalError, shown
from autolora.retrieval.index import PoolIndex
from autolora.retrieval.prompt_terms import (
    Concept,
    Match,
    Word,
    WordIndex,
    find_concepts,
    read_words,
)
from autolora.retrieval.retriever import Retriever
from autolora.retrieval.text import TextEncoder, check_text_encoder

RRF_K = 60
CANDIDATES = 64
_TEXT_LOGISTIC: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "title": (0.74, 18.0),
        "trigger": (0.74, 18.0),
        "tag": (0.80, 18.0),
        "captions": (0.80, 18.0),
        "description": (0.80, 18.0),
    }
)
"""Cosine at which a piece of metadata is as likely meant as not, and the slope there.

Set so that names which share only a kind ("sailboat" and "canoe", 0.66; "elephant" and "mammoth",
0.58 in MiniLM) do not count and synonyms ("kitty" and "cat", 0.84) do.
"""
_TEXT_CERTAINTY = 0.94
"""However near in meaning, it is less certain than words that stand in the prompt."""


@dataclass(frozen=True)
class Hit:
    """A LoRA that was found.

    Attributes:
        name: Its name in the pool.
        score: Probability that the prompt asks for it, in [0, 1].
        why: The strongest reason, in words.
        title: Its name for people.
        channels: Probability by channel that found it.
        concepts: Words of the prompt that it answers.
    """

    name: str
    score: float
    why: str
    title: str = ""
    channels: Mapping[str, float] = field(default_factory=dict)
    concepts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evidence:
    """One reason to take a LoRA.

    Attributes:
        lora: Position of the record.
        channel: ``words``, ``texts`` or ``weights``.
        concept: Number of the concept; the number of concepts stands for the whole prompt.
        probability: That the LoRA is meant.
        why: The reason in words.
        covers: Positions of the content words that it answers.
    """

    lora: int
    channel: str
    concept: int
    probability: float
    why: str
    covers: tuple[int, ...]


@dataclass
class Findings:
    """All that the channels say about a prompt.

    Attributes:
        words: Words of the prompt.
        concepts: Its concepts.
        evidence: All reasons.
    """

    words: list[Word]
    concepts: list[Concept]
    evidence: list[Evidence]


def reciprocal_rank_fusion(
    rankings: Mapping[str, Sequence[int]], available: Mapping[str, set[int]] | None = None
) -> dict[int, float]:
    """Fuse rankings by ``1 / (60 + rank)``.

    Args:
        rankings: Items best first, by channel.
        available: Items that a channel could have found, by channel; all when None. An item's sum
            is divided by the number of channels that could have found it.

    Returns:
        Fused score by item.
    """
    fused: dict[int, float] = {}
    for items in rankings.values():
        for rank, item in enumerate(items, start=1):
            fused[item] = fused.get(item, 0.0) + 1 / (RRF_K + rank)
    if available is None:
        return {item: total / max(len(rankings), 1) for item, total in fused.items()}
    counts = {
        item: sum(item in available[channel] for channel in rankings if channel in available)
        for item in fused
    }
    return {item: total / max(counts[item], 1) for item, total in fused.items()}


class Searcher:
    """Finds LoRAs of an index for prompts.

    Args:
        index: The pool's index.
        text_encoder: Encodes prompts; the one that the index was made with.
        retriever: The trained encoders; without them only metadata is searched.
    """

    def __init__(
        self, index: PoolIndex, text_encoder: TextEncoder, retriever: Retriever | None = None
    ) -> None:
        check_text_encoder(index.provenance.text_encoder, text_encoder)
        if retriever is not None:
            check_text_encoder(retriever.spec.text_encoder, text_encoder)
            if retriever.dim != index.provenance.dim and index.provenance.dim:
                raise RetrievalError(
                    f"The index holds vectors of length {index.provenance.dim}, the retriever "
                    f"gives {retriever.dim}; run autolora index --rebuild."
                )
        self.index = index
        self.text_encoder = text_encoder
        self.retriever = retriever if index.provenance.dim else None
        self.word_index = WordIndex(index.texts)
        with_text = {row.lora for row in index.texts}
        with_vector = {i for i, r in enumerate(index.records) if r.vector is not None}
        self._known = np.full(index.channel_size("weights"), np.nan, np.float32)
        self.available = {"words": with_text, "texts": with_text, "weights": with_vector}

    def search(self, prompt: str, k: int = 5) -> list[Hit]:
        """Rank the pool.

        Args:
            prompt: What is wanted.
            k: How many hits at most.

        Returns:
            Hits, best first.

        Raises:
            RetrievalError: An empty prompt, or k below 1.
        """
        if k < 1:
            raise RetrievalError(f"The number of hits must be at least 1, not {k}.")
        findings = self.find(prompt)
        scores = combine(findings.evidence)
        rank = self._fused(findings.evidence)
        order = sorted(scores, key=lambda i: (-round(scores[i], 3), -rank[i], i))
        return [self.hit(i, findings, scores[i]) for i in order[:k]]

    def find(self, prompt: str) -> Findings:
        """Collect what every channel says.

        Args:
            prompt: What is wanted.

        Returns:
            The findings.

        Raises:
            RetrievalError: An empty prompt.
        """
        if not prompt.strip():
            raise RetrievalError("The prompt is empty; say what the picture shall show.")
        # A terminal in another encoding hands over lone surrogates, which tokenizers refuse.
        prompt = prompt.encode("utf-8", "replace").decode()
        words = read_words(prompt)
        concepts = find_concepts(words)
        evidence = [_from_match(match) for match in self.word_index.find(words)]
        texts = [concept.text for concept in concepts] + [" ".join(prompt.split())]
        vectors = self.text_encoder.encode(texts)
        whole = tuple(i for i, word in enumerate(words) if word.role == "content")
        covers = [concept.covers for concept in concepts] + [whole]
        evidence += self._from_texts(texts, vectors, covers)
        evidence += self._from_weights(texts, vectors, covers)
        return Findings(words, concepts, evidence)

    def _from_texts(
        self, texts: list[str], vectors: torch.Tensor, covers: list[tuple[int, ...]]
    ) -> list[Evidence]:
        found: dict[tuple[int, int], Evidence] = {}
        for number, results in enumerate(self.index.search("texts", vectors.numpy(), CANDIDATES)):
            for lora, similarity, row in results:
                text = self.index.texts[row]
                p = self._text_probability(text.kind, similarity)
                key = (number, lora)
                if key not in found or found[key].probability < p:
                    said = shown(text.text.partition("\n")[0], 60)
                    kind = "captions are" if text.kind == "captions" else f"{text.kind} is"
                    why = f'{kind} close to "{shown(texts[number])}" ({similarity:.2f}): "{said}"'
                    found[key] = Evidence(lora, "texts", number, p, why, covers[number])
        return list(found.values())

    def _text_probability(self, kind: str, similarity: float) -> float:
        """Probability that metadata is meant, by its cosine with a part of the prompt."""
        centre, slope = _TEXT_LOGISTIC[kind]
        if hasattr(self.text_encoder, "logistic"):
            measured = self.text_encoder.logistic
            if measured is None:
                # Without anything to compare with, similarities only order the pool.
                return min(max(similarity, 0.0), 1.0) * 0.5 * _TEXT_CERTAINTY
            # Of texts that are not names, as much more is asked as of MiniLM.
            centre, slope = measured.centre + centre - _TEXT_LOGISTIC["title"][0], measured.slope
        return _TEXT_CERTAINTY / (1 + math.exp(-slope * (similarity - centre)))

    def _from_weights(
        self, texts: list[str], vectors: torch.Tensor, covers: list[tuple[int, ...]]
    ) -> list[Evidence]:
        retriever = self.retriever
        if retriever is None or not self.index.channel_size("weights"):
            return []
        queries = retriever.encode_text(vectors)
        results = self.index.search("weights", queries.numpy(), CANDIDATES)
        owner = {row: lora for result in results for lora, _, row in result}
        rows = np.array(sorted(owner), np.int64)
        loras = torch.from_numpy(self.index.vectors("weights", rows))
        if retriever.calibrated:
            probability = retriever.judge(
                queries, loras, self._known_log_odds(rows, loras)
            ).sigmoid()
        else:
            # Without anything to compare with, similarities only order the pool.
            probability = (queries @ loras.T).clamp(0, 1) * 0.5
        column = {int(row): i for i, row in enumerate(rows)}
        return [
            Evidence(
                lora,
                "weights",
                number,
                float(probability[number, column[row]]),
                f'its weights look like "{shown(texts[number])}" ({similarity:.2f})',
                covers[number],
            )
            for number, result in enumerate(results)
            for lora, similarity, row in result
        ]

    def _known_log_odds(self, rows: np.ndarray, loras: torch.Tensor) -> torch.Tensor:
        """`Retriever.known_log_odds` of rows of the weight channel, computed once for each."""
        assert self.retriever is not None
        new = np.isnan(self._known[rows])
        if new.any():
            found = self.retriever.known_log_odds(loras[torch.from_numpy(new)])
            self._known[rows[new]] = found.numpy()
        return torch.from_numpy(self._known[rows])

    def _fused(self, evidence: Sequence[Evidence]) -> dict[int, float]:
        best: dict[str, dict[int, float]] = {}
        for item in evidence:
            channel = best.setdefault(item.channel, {})
            channel[item.lora] = max(channel.get(item.lora, 0.0), item.probability)
        rankings = {
            channel: [lora for _, lora in sorted((-p, lora) for lora, p in scores.items())]
            for channel, scores in best.items()
        }
        return reciprocal_rank_fusion(rankings, self.available)

    def hit(self, lora: int, findings: Findings, score: float) -> Hit:
        """Describe a LoRA that was found.

        Args:
            lora: Position of the record.
            findings: What was found.
            score: Its score.

        Returns:
            The hit with its strongest reason.
        """
        own = [item for item in findings.evidence if item.lora == lora]
        best = max(own, key=lambda item: item.probability)
        channels: dict[str, float] = {}
        for item in own:
            channels[item.channel] = max(channels.get(item.channel, 0.0), item.probability)
        record = self.index.records[lora]
        concepts = tuple(findings.words[i].text for i in best.covers)
        return Hit(record.name, score, best.why, record.title, channels, concepts)


def combine(evidence: Sequence[Evidence]) -> dict[int, float]:
    """Probability by LoRA that at least one channel is right.

    Args:
        evidence: Reasons; of each channel the strongest one counts.

    Returns:
        ``1 - prod(1 - p)`` over channels, by position of the record.
    """
    best: dict[tuple[int, str], float] = {}
    for item in evidence:
        key = (item.lora, item.channel)
        best[key] = max(best.get(key, 0.0), item.probability)
    wrong: dict[int, float] = {}
    for (lora, _), probability in best.items():
        wrong[lora] = wrong.get(lora, 1.0) * (1 - probability)
    return {lora: 1 - left for lora, left in wrong.items()}


def _from_match(match: Match) -> Evidence:
    names = {"title": "title", "trigger": "trigger word", "tag": "tag"}
    why = f'{names[match.kind]} "{shown(match.text)}" is in the prompt'
    return Evidence(match.lora, "words", -1, match.probability, why, match.covers)


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
