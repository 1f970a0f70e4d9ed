"""Ranking a pool for a prompt, with the reasons.

Three channels look at each concept of the prompt and at the prompt as a whole: *words* (metadata
that stands in the prompt), *texts* (metadata near in meaning) and *weights* (the trained encoder).
Each gives probabilities; a LoRA's score is that at least one channel is right,
``1 - prod(1 - p)``. Ties and scores that say nothing are ordered by reciprocal rank fusion of the
channels (Cormack et al. 2009), averaged over the channels in which a LoRA can be found at all, so
that one without metadata is not ranked below others for lack of a channel.

Shape legend: q concepts, n candidates, D dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import torch

from autolora.errors import RetrievalError, shown
from autolora.retrieval.concepts import Concept, Word, find_concepts, read_words
from autolora.retrieval.index import PoolIndex
from autolora.retrieval.lexical import Match, WordIndex
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
