"""Fits the encoders: ridge regression, the transformer, the paper's encoder.

Shape legend: n LoRAs, T captions, D text dimensions, E output dimensions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from autolora.families.flux1.layers import LAYERS
from autolora.retrieval.encoders import LoRAEncoder, RidgeEncoder, TextWhitening
from autolora.retrieval.features import FlatSpec, LoRAInputs, TokenSpec, portrait_tokens
from autolora.retrieval.retriever import Encoder
from train.retrieval.baseline import (
    PaperEncoder,
    StackedFactors,
    paper_loss,
    paper_schedule,
    project_text,
    stack_factors,
)
from train.retrieval.config import RetrieverTrainConfig
from train.retrieval.data import Features, PoolData
from train.retrieval.losses import ContrastiveLoss
from train.retrieval.metrics import Metrics, evaluate

Refit = Callable[[Tensor], Encoder]


@dataclass
class Candidate:
    """A fitted encoder with how well it does on the validation part.

    Attributes:
        name: What it is.
        family: Which inputs it takes.
        encoder: Fitted to the fit part.
        refit: Fits the same kind to other LoRAs.
        metrics: On the validation part.
    """

    name: str
    family: str
    encoder: Encoder
    refit: Refit
    metrics: Metrics


def family_inputs(inputs: LoRAInputs, family: str) -> LoRAInputs:
    """The inputs of a family."""
    if family == "responses":
        return LoRAInputs(reads=inputs.reads)
    return inputs.only(weights=family != "portraits", portraits=family != "weights")


def captions_of(data: PoolData, rows: Tensor) -> Tensor:
    """Positions of the captions of some LoRAs."""
    return torch.nonzero(torch.isin(data.owners, rows))[:, 0]


def same_concept(data: PoolData, captions: Tensor, rows: Tensor) -> Tensor:
    """``[T, n]``, true where a caption and a LoRA are of the same concept."""
    return data.concepts[data.owners[captions]][:, None] == data.concepts[rows][None, :]


@torch.no_grad()
def validate(encoder: Encoder, data: PoolData, inputs: LoRAInputs, rows: Tensor) -> Metrics:
    """Metrics of all captions of some LoRAs among these LoRAs."""
    captions = captions_of(data, rows)
    scores = encoder.encode_text(data.text[captions]) @ encoder.encode_loras(inputs[rows]).T
    return evaluate(scores, same_concept(data, captions, rows))


def fit_whitening(data: PoolData, rows: Tensor, config: RetrieverTrainConfig) -> TextWhitening:
    """The closed-form text head of some LoRAs' captions."""
    captions = captions_of(data, rows)
    owners = data.concepts[data.owners[captions]]
    return TextWhitening.fit(data.text[captions], owners, config.dim, config.shrinkage)


def mean_targets(data: PoolData, rows: Tensor, whitening: TextWhitening) -> Tensor:
    """Mean whitened caption vector of each LoRA ``[n, E]``."""
    mapped = whitening(data.text)
    sums = mapped.new_zeros(len(data), mapped.shape[1]).index_add_(0, data.owners, mapped)
    return F.normalize(sums[rows], dim=-1)


def flat_specs(family: str, tokens: TokenSpec | None) -> dict[str, FlatSpec]:
    """Feature sets that the linear encoder tries in a family.

    Deltas of text-side layers read the training captions themselves, so these are also tried by
    themselves.
    """
    if family == "portraits" or tokens is None:
        return {"ridge": FlatSpec(("portrait",))}
    every = tuple(range(len(tokens.layers)))
    parsed = [LAYERS.parse(layer) for layer in tokens.layers]
    text_side = tuple(
        i
        for i in every
        if (p := parsed[i]) is not None and (".b_" in p.row.template or "_b." in p.row.template)
    )
    sets = {"ridge read": (("read",), every), "ridge read+write": (("read", "write"), every)}
    if text_side and text_side != every:
        sets["ridge read, text side"] = (("read",), text_side)
    extra = ("portrait",) if family == "both" else ()
    return {name: FlatSpec((*extra, *groups), layers) for name, (groups, layers) in sets.items()}


def fit_ridges(
    family: str,
    data: PoolData,
    features: Features,
    fit: Tensor,
    validation: Tensor,
    config: RetrieverTrainConfig,
) -> list[Candidate]:
    """The best ridge of each feature set of a family."""
    whitening = fit_whitening(data, fit, config)
    tokens = features.tokens or TokenSpec(("none",))
    found: list[Candidate] = []
    for name, spec in flat_specs(family, features.tokens).items():
        options: list[Candidate] = []
        for ridge in config.ridges:

            def refit(
                rows: Tensor,
                spec: FlatSpec = spec,
                ridge: float = ridge,
                head: TextWhitening | None = None,
            ) -> Encoder:
                head = head or fit_whitening(data, rows, config)
                return RidgeEncoder.fit(
                    features.inputs[rows],
                    mean_targets(data, rows, head),
                    head,
                    spec,
                    tokens,
                    ridge,
                    config.components,
                )

            encoder = refit(fit, head=whitening)
            metrics = validate(encoder, data, features.inputs, validation)
            options.append(Candidate(f"{name} {family}", family, encoder, refit, metrics))
        found.append(max(options, key=lambda option: option.metrics.mrr))
    return found


class _Towers(nn.Module):
    """Encoder and loss in one module, so that one forward pass is what processes synchronise."""

    def __init__(self, encoder: LoRAEncoder, loss: ContrastiveLoss) -> None:
        super().__init__()
        self.encoder, self.loss = encoder, loss

    def forward(self, inputs: LoRAInputs, text: Tensor, ids: Tensor, concepts: Tensor) -> Tensor:
        """Contrastive loss of LoRAs and one caption of each."""
        lora, head = self.encoder(inputs), self.encoder.encode_text(text)
        loss: Tensor = self.loss(head, lora, ids, ids, concepts, concepts)
        return loss


def pick_captions(data: PoolData, rows: Tensor, generator: torch.Generator) -> Tensor:
    """Position of a random caption of each LoRA."""
    noise = torch.rand(len(rows), len(data.owners), generator=generator)
    return noise.masked_fill(data.owners[None, :] != rows[:, None], -1).argmax(1)


def _batch(
    data: PoolData, features: Features, family: str, rows: Tensor, size: int, g: torch.Generator
) -> tuple[LoRAInputs, Tensor, Tensor, Tensor]:
    """Some LoRAs, one caption of each; portraits from a random half of the noises."""
    pick = rows[torch.randperm(len(rows), generator=g)[:size]]
    inputs = family_inputs(features.inputs, family)
    inputs = inputs[pick]
    if (
        inputs.portraits is not None
        and data.portraits is not None
        and features.portrait is not None
    ):
        count = data.portraits.shape[2]
        some = torch.randperm(count, generator=g)[: max(1, (count + 1) // 2)]
        inputs.portraits = portrait_tokens(data.portraits[pick], features.portrait, some)
    return inputs, data.text[pick_captions(data, pick, g)], pick, data.concepts[pick]


def train_encoder(
    family: str,
    data: PoolData,
    features: Features,
    rows: Tensor,
    validation: Tensor | None,
    config: RetrieverTrainConfig,
    accelerator: Accelerator,
    steps: int,
) -> tuple[LoRAEncoder, int]:
    """Train the transformer by the contrastive loss.

    Args:
        family: Which inputs it takes.
        data: The pool.
        features: Its tokens.
        rows: LoRAs to train on.
        validation: LoRAs for early stopping; None trains for all steps.
        config: Settings.
        accelerator: Runs it, on one process or several.
        steps: Steps at most.

    Returns:
        The encoder at its best step, and that step.
    """
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed + 1000 * accelerator.process_index)
    inputs = family_inputs(features.inputs, family)
    sizes = {k: getattr(config, k) for k in ("dim", "width", "depth", "heads", "dropout")}
    whitening = fit_whitening(data, rows, config)
    sizes["dim"] = whitening.dim
    encoder = LoRAEncoder.for_inputs(inputs, features.portrait, data.text.shape[1], **sizes)
    encoder.text_head.start_from(whitening)
    towers = _Towers(encoder, ContrastiveLoss(config.temperature))
    optimizer = torch.optim.AdamW(
        towers.parameters(), lr=config.lr, weight_decay=config.weight_decay
    )
    model, optimizer = accelerator.prepare(towers, optimizer)
    best, best_step, best_state = -1.0, steps, None
    for step in range(1, steps + 1):
        model.train()
        optimizer.param_groups[0]["lr"] = config.lr * min(1.0, step / 20)
        batch = _batch(data, features, family, rows, config.batch, generator)
        loss = model(batch[0], *(t.to(accelerator.device) for t in batch[1:]))
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if validation is None or step % config.evaluate_every:
            continue
        encoder.eval()
        mrr = validate(encoder, data, inputs, validation).mrr
        if mrr > best:
            best, best_step, best_state = mrr, step, copy.deepcopy(encoder.state_dict())
        elif step - best_step >= config.patience * config.evaluate_every:
            break
    if best_state is not None:
        encoder.load_state_dict(best_state)
    return encoder.eval(), best_step


def fit_transformer(
    family: str,
    data: PoolData,
    features: Features,
    fit: Tensor,
    validation: Tensor,
    config: RetrieverTrainConfig,
    accelerator: Accelerator,
) -> Candidate:
    """The transformer of a family, stopped early; refitting repeats the number of steps found."""
    encoder, steps = train_encoder(
        family, data, features, fit, validation, config, accelerator, config.steps
    )

    def refit(rows: Tensor) -> Encoder:
        return train_encoder(family, data, features, rows, None, config, accelerator, steps)[0]

    metrics = validate(encoder, data, family_inputs(features.inputs, family), validation)
    return Candidate(f"transformer {family}", family, encoder, refit, metrics)


@dataclass
class PaperFit:
    """The paper's encoder, trained.

    Attributes:
        encoder: The encoder.
        factors: Factors of all LoRAs.
    """

    encoder: PaperEncoder
    factors: StackedFactors

    @torch.no_grad()
    def scores(self, text: Tensor, rows: Tensor) -> Tensor:
        """Cosines ``[T, n]`` of texts and LoRAs."""
        lora = F.normalize(self.encoder(self.factors[rows]), dim=-1)
        return F.normalize(project_text(text, lora.shape[1]), dim=-1) @ lora.T


def fit_paper(data: PoolData, rows: Tensor, config: RetrieverTrainConfig) -> PaperFit:
    """Train the paper's encoder as its published code does, on the same LoRAs."""
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    layers = {layer for i in rows.tolist() for layer in data.loras[i].layers}
    factors = stack_factors(data.loras, sorted(layers))
    width = max(config.paper_width, data.text.shape[1])
    encoder = PaperEncoder(factors, width, heads=width // 64)
    schedule = paper_schedule(width)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=schedule["lr"])
    captions = captions_of(data, rows)
    for _ in range(config.paper_steps):
        pick = captions[
            torch.randint(len(captions), (int(schedule["batch"]),), generator=generator)
        ]
        text = project_text(data.text[pick], width)
        loss = paper_loss(text, encoder(factors[data.owners[pick]]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return PaperFit(encoder.eval(), factors)
