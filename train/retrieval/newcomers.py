"""Gives a retriever an encoder for LoRAs that are none of the concepts it was fitted to.

The response encoder in closed form learns no pairs of LoRAs and texts, so it knows none by heart:
what it says of the LoRAs at hand is what it will say of new ones, and it is calibrated on them.

Shape legend: n LoRAs, T captions, D dimensions.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from autolora.errors import ConfigError
from autolora.retrieval.calibration import fit_calibration, standard_scores
from autolora.retrieval.encoders import ResponseEncoder
from autolora.retrieval.retriever import Retriever
from autolora.retrieval.text import TextEncoder
from train.retrieval.data import Features, PoolData
from train.retrieval.fit import captions_of, same_concept
from train.retrieval.report import banks, evenly, join

SHARE = 0.5
"""Share of the encoder of newcomers in the joined vectors, by which candidates are found."""

TEXTS = 3
"""Texts that a short prompt asks for: "a neon owl" asks for "neon", for "owl", and for both."""


def add_newcomers(
    retriever: Retriever,
    encoder: ResponseEncoder,
    data: PoolData,
    features: Features,
    rows: Tensor,
    text_encoder: TextEncoder,
) -> Retriever:
    """Join an encoder of newcomers to a retriever, calibrated by itself.

    Args:
        retriever: Names the concepts that it was fitted to; an encoder of newcomers that it has
            already is replaced.
        encoder: In closed form.
        data: The pool.
        features: Its read factors.
        rows: LoRAs that may be looked at.
        text_encoder: The retriever's.

    Returns:
        A new retriever; the given one's encoders are in it as they are.

    Raises:
        ConfigError: The retriever does not fit.
    """
    spec = retriever.spec
    if not retriever.calibrated or not len(retriever.concepts):
        raise ConfigError("A retriever without calibration or concepts cannot tell newcomers.")
    members, weights = retriever.members, spec.weights
    if spec.newcomers is not None:
        members, weights = members[:-1], weights[:-1]
    layers = spec.response_layers if any(m.uses_responses for m in members) else ()
    if layers not in ((), features.response_layers):
        raise ConfigError(
            f"The retriever looks at responses of {list(layers)}, the encoder of "
            f"newcomers at {list(features.response_layers)}; set response_layers alike."
        )
    alone = join([encoder], [1.0], features, text_encoder)
    background, references = banks(alone, data, features, rows, text_encoder)
    captions = captions_of(data, rows)
    queries, positives = data.text[captions], same_concept(data, captions, rows)
    if features.words is not None:
        words = evenly(features.words[1:], len(queries))
        queries = torch.cat([queries, words])
        positives = torch.cat([positives, positives.new_zeros(len(words), positives.shape[1])])
    loras = alone.encode_inputs(features.inputs[rows])
    scores = standard_scores(alone.encode_text(queries), loras, background, references)
    joined = replace(
        spec,
        weights=(*(weight / sum(weights) * (1 - SHARE) for weight in weights), SHARE),
        response_layers=features.response_layers,
        newcomers=fit_calibration(scores, positives, texts=TEXTS),
    )
    return Retriever(
        joined,
        [*members, encoder],
        retriever.probes,
        retriever.background,
        retriever.references,
        retriever.concepts,
        background,
        references,
    )
