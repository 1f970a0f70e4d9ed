"""Joins encoders, calibrates the result, and measures it beside everything it must beat.

Shape legend: n LoRAs, T captions, D joined dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from autolora.retrieval.calibration import (
    Calibration,
    fit_calibration,
    standard_scores,
)
from autolora.retrieval.index import metadata_texts
from autolora.retrieval.retriever import Encoder, Retriever, RetrieverSpec
from autolora.retrieval.text import TextEncoder
from train.retrieval.config import RetrieverTrainConfig
from train.retrieval.data import Features, PoolData, Split, data_hash
from train.retrieval.fit import Candidate, PaperFit, captions_of, family_inputs, same_concept
from train.retrieval.metrics import Metrics, chance, evaluate

BANK = 256
UNRELATED = (
    "a quarterly tax report",
    "the minutes of the board meeting",
    "a spreadsheet of monthly expenses",
    "terms and conditions of the contract",
    "an abstract idea",
    "how to install the printer driver",
)
"""Prompts that no LoRA of drawings fits, kept among the background texts."""


def join(
    encoders: Sequence[Encoder],
    weights: Sequence[float],
    features: Features,
    text_encoder: TextEncoder,
    **rest: Any,
) -> Retriever:
    """Make a retriever of encoders with what their inputs need."""
    uses_weights = any(encoder.uses_weights for encoder in encoders)
    uses_responses = any(encoder.uses_responses for encoder in encoders)
    uses_portraits = any(encoder.uses_portraits for encoder in encoders)
    names = ("background", "references", "concepts")
    banks = {key: rest.pop(key) for key in names if key in rest}
    spec = RetrieverSpec(
        tokens=features.tokens if uses_weights else None,
        portrait=features.portrait if uses_portraits else None,
        text_encoder=text_encoder.name,
        weights=tuple(weights),
        response_layers=features.response_layers if uses_responses else (),
        **rest,
    )
    probes = features.probes if uses_weights else None
    return Retriever(spec, encoders, probes, **banks)


def choose_members(
    candidates: Sequence[Candidate],
    data: PoolData,
    features: Features,
    split: Split,
    most: int,
) -> list[tuple[Candidate, float]]:
    """Greedy ensemble selection by validation MRR (Caruana et al. 2004), with repetition.

    The LoRAs that the encoders were fitted to stand among the candidates: an encoder that has
    memorised them puts them before new ones, which shows only there.

    Args:
        candidates: Fitted encoders.
        data: The pool.
        features: Its tokens.
        split: Its parts.
        most: Selections at most.

    Returns:
        Members with weights that add up to 1.
    """
    captions = captions_of(data, split.validation)
    positives = same_concept(data, captions, split.seen)
    with torch.no_grad():
        scores = [
            c.encoder.encode_text(data.text[captions])
            @ c.encoder.encode_loras(family_inputs(features.inputs, c.family)[split.seen]).T
            for c in candidates
        ]
    counts = [0] * len(candidates)
    total = torch.zeros_like(scores[0])
    best = 0.0
    for _ in range(most):
        values = [evaluate(total + score, positives).mrr for score in scores]
        winner = max(range(len(values)), key=values.__getitem__)
        if values[winner] <= best:
            break
        best = values[winner]
        total = total + scores[winner]
        counts[winner] += 1
    return [
        (candidate, count / sum(counts))
        for candidate, count in zip(candidates, counts, strict=True)
        if count
    ]


@torch.no_grad()
def banks(
    retriever: Retriever, data: PoolData, features: Features, rows: Tensor, text: TextEncoder
) -> tuple[Tensor, Tensor]:
    """Background texts and reference LoRAs, evenly taken.

    Half of the texts are common words where there are any: prompts are compared by single words.

    Returns:
        Text vectors ``[b, D]`` and LoRA vectors ``[m, D]``.
    """
    captions = data.text[captions_of(data, rows)]
    words = captions[:0] if features.words is None else evenly(features.words, BANK // 2)
    unrelated = text.encode(list(UNRELATED))
    background = torch.cat([evenly(captions, BANK - len(words)), words, unrelated])
    references = features.inputs[evenly(rows, BANK)]
    return retriever.encode_text(background), retriever.encode_inputs(references)


def concept_names(data: PoolData, rows: Tensor) -> list[str]:
    """Names of the concepts of some LoRAs, as prompts say them."""
    names = {data.concept_names[i] for i in data.concepts[rows].tolist()}
    return sorted({name.removesuffix(" style") for name in names})


def evenly(rows: Tensor, count: int) -> Tensor:
    """At most so many rows, at equal distances."""
    return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).long()]


@torch.no_grad()
def calibrate(
    retriever: Retriever, data: PoolData, features: Features, split: Split, text: TextEncoder
) -> Calibration:
    """Fit the calibration on the validation part, which this retriever was not fitted to.

    Its captions are asked for among all LoRAs but the test part; common words are asked for as
    texts that nothing fits.
    """
    background, references = banks(retriever, data, features, split.fit, text)
    captions = captions_of(data, split.validation)
    queries = data.text[captions]
    positives = same_concept(data, captions, split.seen)
    if features.words is not None:
        words = evenly(features.words[1:], len(queries))
        queries = torch.cat([queries, words])
        positives = torch.cat([positives, positives.new_zeros(len(words), positives.shape[1])])
    loras = retriever.encode_inputs(features.inputs[split.seen])
    concepts = text.encode(concept_names(data, split.fit))
    scores, known = (
        standard_scores(retriever.encode_text(texts), loras, background, references)
        for texts in (queries, concepts)
    )
    return fit_calibration(scores, positives, known)


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Attributes:
        method: What ranks.
        part: On which LoRAs.
        metrics: How well.
    """

    method: str
    part: str
    metrics: Metrics


PARTS = ("trained on", "never seen", "never seen, in the whole pool")


class Evaluation:
    """Ranks the captions of seen and never-seen LoRAs with several methods.

    Args:
        data: The pool.
        features: Its tokens.
        split: Its parts.
    """

    def __init__(self, data: PoolData, features: Features, split: Split) -> None:
        self.data, self.features = data, features
        every = torch.arange(len(data))
        self.cases = dict(
            zip(
                PARTS,
                ((split.seen, split.seen), (split.test,) * 2, (split.test, every)),
                strict=True,
            )
        )
        self.lines: list[Line] = []

    def add(self, method: str, score: Any) -> None:
        """Measure a method.

        Args:
            method: Its name.
            score: Function of caption vectors ``[T, D]`` and LoRA indices to scores ``[T, n]``.
        """
        for part, (asked, pool) in self.cases.items():
            captions = captions_of(self.data, asked)
            positives = same_concept(self.data, captions, pool)
            scores = score(self.data.text[captions], pool)
            self.lines.append(Line(method, part, evaluate(scores, positives)))

    def add_retriever(self, method: str, retriever: Retriever) -> None:
        """Measure a retriever."""
        inputs = self.features.inputs

        def score(text: Tensor, rows: Tensor) -> Tensor:
            return retriever.encode_text(text) @ retriever.encode_inputs(inputs[rows]).T

        self.add(method, score)

    def add_search(self, method: str, retriever: Retriever) -> None:
        """Measure a retriever with what the search makes of its vectors."""
        inputs = self.features.inputs

        def score(text: Tensor, rows: Tensor) -> Tensor:
            loras = retriever.encode_inputs(inputs[rows])
            known = retriever.known_log_odds(loras)
            return retriever.judge(retriever.encode_text(text), loras, known)

        self.add(method, score)

    def add_paper(self, paper: PaperFit) -> None:
        """Measure the paper's encoder."""
        self.add("paper's encoder", paper.scores)

    def add_metadata(self, encoder: TextEncoder) -> None:
        """Measure titles, trigger words and tags, without the captions, which are the queries."""
        vectors: list[Tensor] = []
        for found in self.data.metadata:
            texts = [text for kind, text in metadata_texts(found) if kind != "captions"]
            vectors.append(encoder.encode(texts) if texts else torch.zeros(1, encoder.dim))

        def score(text: Tensor, rows: Tensor) -> Tensor:
            return torch.stack([(text @ vectors[i].T).amax(1) for i in rows.tolist()], 1)

        self.add("metadata text alone", score)

    def add_chance(self) -> None:
        """Add the expected numbers of a random order."""
        for part, (asked, pool) in self.cases.items():
            positives = same_concept(self.data, captions_of(self.data, asked), pool)
            self.lines.append(Line("chance", part, chance(positives)))

    def table(self) -> str:
        """The table as text, one block per part."""
        rows: list[str] = []
        for part, (asked, pool) in self.cases.items():
            rows.append(f"{part}: captions of {len(asked)} LoRAs among {len(pool)}")
            rows.append(f"  {'method':<36}{'R@1':>7}{'R@5':>7}{'R@10':>7}{'MRR':>7}{'median':>8}")
            for line in self.lines:
                if line.part == part:
                    m = line.metrics
                    recalls = "".join(f"{m.recall[k]:>7.3f}" for k in (1, 5, 10))
                    rows.append(f"  {line.method:<36}{recalls}{m.mrr:>7.3f}{m.median_rank:>8.1f}")
        return "\n".join(rows)

    def to_dict(self) -> dict[str, Any]:
        """Metrics by method and part."""
        result: dict[str, Any] = {}
        for line in self.lines:
            result.setdefault(line.method, {})[line.part] = line.metrics.to_dict()
        return result


def provenance(
    data: PoolData, split: Split, config: RetrieverTrainConfig, more: dict[str, Any]
) -> dict[str, Any]:
    """What travels with the weights."""
    return {
        "base_model": config.base_model,
        "portraits": data.portrait_settings,
        "data_sha256": data_hash(data),
        "loras": {k: len(getattr(split, k)) for k in ("fit", "validation", "test")},
        "torch": torch.__version__,
        "config": {
            k: v for k, v in asdict(config).items() if k not in ("pool", "out", "portraits")
        },
        **more,
    }
