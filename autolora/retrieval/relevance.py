"""The probability that a LoRA is what a run of words asks for: one logistic regression.

Its inputs are how the words and the LoRA's names hang together, how near metadata are in meaning,
and what the LoRA's weights say; its weights are learned on prompts by `scripts/fit_search.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from autolora.retrieval.lexicon import DATA

FEATURES = (
    "bias", "name", "alias", "style", "synonym", "kind", "member", "head", "tag", "phrase",
    "keyword", "spelled", "modifier", "verb", "compound",
    "cos_title", "cos_tag", "cos_look", "cos_description", "cos_captions", "cos_lead",
    "unrelated", "unknown", "clause", "is_style", "kind_long", "near_long", "weights",
)  # fmt: skip
WORDS = frozenset(FEATURES[1:15])
TEXTS = frozenset(name for name in FEATURES if name.startswith("cos_"))
_NUMBER = {name: i for i, name in enumerate(FEATURES)}
COSINE_FLOOR = 0.4
"""Cosines below this are all the same: nothing in common."""


@lru_cache(maxsize=1)
def learned() -> np.ndarray:
    """Weights of the regression, ``[len(FEATURES)]``."""
    stored = json.loads((DATA / "relevance.json").read_text(encoding="utf-8"))
    return np.array([stored["weights"][name] for name in FEATURES])


def vector(features: Mapping[str, float]) -> np.ndarray:
    """Features by name as a row; what is not named is 0."""
    row = np.zeros(len(FEATURES))
    row[0] = 1.0
    for name, value in features.items():
        row[_NUMBER[name]] = value
    return row


def cosine_feature(similarity: float) -> float:
    """A cosine above the floor, squared: what is near counts far more than what is less far."""
    return max(0.0, (similarity - COSINE_FLOOR) / (1 - COSINE_FLOOR)) ** 2


def probability(rows: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Probabilities ``[n]`` of rows of features ``[n, F]``."""
    logits = rows @ (learned() if weights is None else weights)
    return np.asarray(1 / (1 + np.exp(-np.clip(logits, -30, 30))))
