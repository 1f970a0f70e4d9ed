"""Fits the response encoder: in closed form, then by the contrastive loss.

Shape legend: n LoRAs, T captions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autolora.retrieval.encoders import ResponseEncoder
from autolora.retrieval.features import LoRAInputs
from autolora.retrieval.retriever import Encoder
from train.retrieval.config import RetrieverTrainConfig
from train.retrieval.data import Features, PoolData
from train.retrieval.fit import Candidate, family_inputs, pick_captions, validate
from train.retrieval.losses import ContrastiveLoss


def fit_responses(
    data: PoolData,
    features: Features,
    fit: Tensor,
    validation: Tensor,
    config: RetrieverTrainConfig,
) -> list[Candidate]:
    """The response encoder as the closed form gives it, and trained further."""
    inputs = family_inputs(features.inputs, "responses")

    def closed(rows: Tensor) -> Encoder:
        return fit_closed_form(features, rows, config)

    def trained(rows: Tensor) -> Encoder:
        return train_responses(data, features, rows, config)

    makers = {"responses, no pairs": closed}
    if config.response_steps:
        makers["responses"] = trained
    found: list[Candidate] = []
    for name, make in makers.items():
        encoder = make(fit)
        metrics = validate(encoder, data, inputs, validation)
        found.append(Candidate(name, "responses", encoder, make, metrics))
    return found


def fit_closed_form(
    features: Features, rows: Tensor, config: RetrieverTrainConfig
) -> ResponseEncoder:
    """The encoder that looks at texts and centres on LoRAs, and learns no pairs."""
    assert features.texts is not None and features.inputs.reads is not None
    activations = list(features.activations.values())
    reads = features.inputs.reads[rows]
    return ResponseEncoder.fit(features.texts, activations, reads, config.response_directions)


def train_responses(
    data: PoolData, features: Features, rows: Tensor, config: RetrieverTrainConfig
) -> ResponseEncoder:
    """Train queries and text map from the closed form, with linear decay of the learning rate."""
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    encoder = fit_closed_form(features, rows, config)
    assert features.inputs.reads is not None
    loss = ContrastiveLoss(config.response_temperature)
    groups = (
        ([encoder.text_matrix, encoder.text_bias], config.response_lr * _size(encoder.text_matrix)),
        ([encoder.queries], config.response_query_lr * _size(encoder.queries)),
        (list(loss.parameters()), 1e-3),
    )
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "lr": lr} for parameters, lr in groups], weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 1 - step / config.response_steps
    )
    for _ in range(config.response_steps):
        pick = rows[torch.randperm(len(rows), generator=generator)[: 2 * config.batch]]
        text = data.text[pick_captions(data, pick, generator)]
        lora = encoder.encode_loras(LoRAInputs(reads=features.inputs.reads[pick]))
        concepts = data.concepts[pick]
        value = loss(encoder.encode_text(text), lora, pick, pick, concepts, concepts)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
    return encoder.requires_grad_(False).eval()


def _size(tensor: Tensor) -> float:
    return float(tensor.detach().abs().mean())
