"""What the retriever learns from: a pool's LoRAs, captions and portraits, and how they are split.

Shape legend: n LoRAs, T captions, D text dimensions, S settings, K noises.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from autolora.errors import AutoLoRAError, ConfigError
from autolora.families.flux1.layers import LAYERS
from autolora.lora import LoRA, Metadata, Pool
from autolora.retrieval.encoders import read_factors, stack_reads
from autolora.retrieval.features import (
    LoRAInputs,
    PortraitSpec,
    TokenSpec,
    WeightTokens,
    fit_probes,
    portrait_tokens,
    weight_tokens,
)
from autolora.retrieval.prompt_terms import stem, stems
from autolora.retrieval.text import TextEncoder
from train.retrieval.activations import text_activations
from train.retrieval.config import RetrieverTrainConfig


@dataclass
class PoolData:
    """A pool to learn from.

    Attributes:
        loras: n adapters.
        metadata: Their metadata.
        concepts: ``[n]``, number of the concept of each; copies of a style share one.
        concept_names: Names of the concepts.
        captions: T captions.
        text: Caption vectors ``[T, D]``.
        owners: ``[T]``, the LoRA of each caption.
        portraits: ``[n, S, K, C, h, w]``, None without a cache.
        portrait_settings: How the portraits were made, as their file says.
        skipped: Reason by name, for LoRAs that were left out.
    """

    loras: list[LoRA]
    metadata: list[Metadata]
    concepts: Tensor
    concept_names: list[str]
    captions: list[str]
    text: Tensor
    owners: Tensor
    portraits: Tensor | None
    portrait_settings: dict[str, str]
    skipped: dict[str, str]

    def __len__(self) -> int:
        """Count the LoRAs."""
        return len(self.loras)


@dataclass
class Split:
    """Indices of LoRAs; no concept is in two parts.

    Attributes:
        fit: For fitting.
        validation: For early stopping, model selection and calibration.
        test: Never seen.
    """

    fit: Tensor
    validation: Tensor
    test: Tensor

    @property
    def seen(self) -> Tensor:
        """All but the test part."""
        return torch.cat([self.fit, self.validation]).sort().values


def load_data(config: RetrieverTrainConfig, encoder: TextEncoder) -> PoolData:
    """Read a pool with captions.

    Args:
        config: Names the pool and the portraits.
        encoder: Encodes the captions.

    Returns:
        The LoRAs that have captions (and a portrait, where there is a cache).

    Raises:
        ConfigError: Fewer than ten LoRAs can be used.
    """
    pool = Pool(config.pool)
    portraits, settings = _read_portraits(config.portraits)
    loras: list[LoRA] = []
    metadata: list[Metadata] = []
    skipped: dict[str, str] = {}
    for name in pool.names:
        found = pool.metadata(name)
        if not found.captions:
            skipped[name] = "no captions"
        elif portraits is not None and name not in portraits:
            skipped[name] = "no portrait"
        else:
            try:
                loras.append(pool.load(name))
                metadata.append(found)
            except AutoLoRAError as error:
                skipped[name] = str(error)
    if len(loras) < 10:
        reasons = "; ".join(sorted(set(skipped.values()))[:3])
        raise ConfigError(
            f"Only {len(loras)} of {len(pool)} LoRAs in {config.pool} can be trained on "
            f"({reasons}); captions belong in <stem>.captions.json beside each file."
        )
    names = [min(found.captions, key=len).casefold() for found in metadata]
    concept_names = sorted(set(names))
    number = {name: i for i, name in enumerate(concept_names)}
    texts = [caption for found in metadata for caption in found.captions]
    owners = [i for i, found in enumerate(metadata) for _ in found.captions]
    return PoolData(
        loras,
        metadata,
        torch.tensor([number[name] for name in names]),
        concept_names,
        texts,
        encoder.encode(texts).float(),
        torch.tensor(owners),
        None if portraits is None else torch.stack([portraits[lora.name] for lora in loras]),
        settings,
        skipped,
    )


def _read_portraits(path: str) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
    if not path:
        return None, {}
    try:
        with safe_open(Path(path), framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            settings = dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"The portraits {path} cannot be read: {error}.") from error
    shapes = {tuple(tensor.shape) for tensor in tensors.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 5:
        raise ConfigError(f"The portraits {path} must all have one shape [S, K, C, h, w].")
    return tensors, settings


def _fraction(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def in_test(concept: str, config: RetrieverTrainConfig) -> bool:
    """Whether training never sees LoRAs of this concept.

    Args:
        concept: The shortest caption of its LoRAs, in lower case.
        config: Share and seed.
    """
    return _fraction(f"test/{config.split_seed}/{concept}") < config.test_share


def split_concepts(concepts: Tensor, names: Sequence[str], config: RetrieverTrainConfig) -> Split:
    """Divide LoRAs by a hash of their concept's name.

    The part of a concept does not depend on which others are in the pool.

    Args:
        concepts: ``[n]``.
        names: Names of the concepts.
        config: Shares and seed.

    Returns:
        The split.

    Raises:
        ConfigError: A part is empty.
    """
    parts: list[int] = []
    for name in names:
        if in_test(name, config):
            parts.append(2)
        else:
            inner = _fraction(f"validation/{config.split_seed}/{name}")
            parts.append(int(inner < config.validation_share))
    part = torch.tensor(parts)[concepts]
    fit, validation, test = (torch.nonzero(part == number)[:, 0] for number in range(3))
    if not (len(fit) and len(validation) and len(test)):
        raise ConfigError(
            f"The pool has too few concepts ({len(names)}) for a training, a validation and a "
            "test part; add LoRAs or change the shares."
        )
    return Split(fit, validation, test)


@dataclass
class Features:
    """Tokens of all LoRAs, with how they were made.

    Attributes:
        inputs: Weight tokens and portrait tokens of n LoRAs.
        tokens: How weight tokens are made; None without them.
        probes: Fitted queries by layer.
        portrait: Shape of the portraits; None without them.
        response_layers: Text-side layers whose read factors are in the inputs.
        activations: Activations ``[texts, in]`` of `texts` by layer.
        texts: Vectors ``[texts, D]`` of common words and of captions of LoRAs that may be looked
            at.
        words: Vectors ``[words, D]`` of common words that no seen LoRA is named by.
    """

    inputs: LoRAInputs
    tokens: TokenSpec | None
    probes: dict[str, Tensor]
    portrait: PortraitSpec | None
    response_layers: tuple[str, ...] = ()
    activations: dict[str, Tensor] = field(default_factory=dict)
    texts: Tensor | None = None
    words: Tensor | None = None

    @property
    def families(self) -> list[str]:
        """Which inputs there are."""
        found = ["portraits"] if self.inputs.portraits is not None else []
        found += ["weights"] if self.inputs.weights is not None else []
        found += ["both"] if len(found) == 2 else []
        return [*found, "responses"] if self.inputs.reads is not None else found


Activate = Callable[[str, Sequence[str], Sequence[str]], dict[str, Tensor]]


def make_features(
    data: PoolData,
    seen: Tensor,
    config: RetrieverTrainConfig,
    encoder: TextEncoder,
    activate: Activate = text_activations,
) -> Features:
    """Make the tokens of all LoRAs; whatever is fitted is fitted to the seen ones.

    Args:
        data: The pool.
        seen: Indices of LoRAs that may be looked at.
        config: Sizes.
        encoder: Encodes common words.
        activate: Gives activations of texts; called where ``responses`` are wanted.

    Returns:
        The tokens.

    Raises:
        ConfigError: Only portraits are wanted, and there are none.
    """
    inputs = LoRAInputs()
    portrait: PortraitSpec | None = None
    tokens: TokenSpec | None = None
    probes: dict[str, Tensor] = {}
    if data.portraits is not None and {"portraits", "both"} & set(config.families):
        _, settings, _, channels, height, width = data.portraits.shape
        grid = min(config.portrait_grid, height, width)
        portrait = PortraitSpec(settings, channels, grid)
        inputs.portraits = portrait_tokens(data.portraits, portrait)
    if {"weights", "both"} & set(config.families):
        known = [data.loras[i] for i in seen.tolist()]
        layers = sorted({layer for lora in known for layer in lora.layers}, key=LAYERS.sort_key)
        tokens = TokenSpec(tuple(layers), config.probes, config.sketch)
        if config.fitted_probes:
            probes = fit_probes(known, tokens)
        inputs.weights = WeightTokens.cat([weight_tokens(x, tokens, probes) for x in data.loras])
    features = Features(inputs, tokens, probes, portrait)
    if "responses" in config.families:
        _add_responses(features, data, seen, config, encoder, activate)
    if not features.families:
        raise ConfigError("families asks for portraits, but no portraits file is set.")
    return features


def _add_responses(
    features: Features,
    data: PoolData,
    seen: Tensor,
    config: RetrieverTrainConfig,
    encoder: TextEncoder,
    activate: Activate,
) -> None:
    """Read factors of all LoRAs; activations of words and of one in two captions."""
    rows = torch.nonzero(torch.isin(data.owners, seen))[::2, 0].tolist()
    words = encoder.words(config.vocabulary) if hasattr(encoder, "words") else []
    unseen = set(range(len(data.concept_names))) - set(data.concepts[seen].tolist())
    kept_out = {word for i in unseen for word in stems(data.concept_names[i])}
    if config.reserved:
        from train.tiny_world.subjects import reserved_words

        kept_out |= {stem(word) for word in reserved_words()}
    words = [word for word in words if stem(word) not in kept_out]
    # One in four as a caption says it, so that the map knows words in their usual company.
    said = [f"a picture of a {word}" if i % 4 == 3 else word for i, word in enumerate(words)]
    texts = list(dict.fromkeys(said + [data.captions[i] for i in rows]))
    features.response_layers = config.response_layers
    features.activations = activate(config.base_model, texts, config.response_layers)
    features.texts = encoder.encode(texts)
    # A word that names what some LoRA draws is no example of a text that nothing fits.
    named = {
        word for i in set(data.concepts[seen].tolist()) for word in stems(data.concept_names[i])
    }
    others = [word for word in words if stem(word) not in named]
    features.words = encoder.encode(others) if others else None
    reads = stack_reads([read_factors(lora, config.response_layers) for lora in data.loras])
    features.inputs.reads = reads


def data_hash(data: PoolData) -> str:
    """Hash of the names and contents that were trained on."""
    rows = sorted(f"{lora.name}:{lora.sha256}" for lora in data.loras)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
