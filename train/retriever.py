"""Trains the retriever on a pool whose LoRAs have captions.

    python -m train.retriever --config configs/train/retriever.yaml
    accelerate launch -m train.retriever --config configs/train/retriever.yaml

Prints a table of held-out and trained-on retrieval beside the paper's encoder, metadata and
chance, and the same as one JSON document on the last line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator

from autolora.errors import AutoLoRAError, ConfigError
from autolora.retrieval.retriever import Retriever
from autolora.retrieval.text import MiniLMText, TextEncoder
from train.retrieval.activations import text_activations
from train.retrieval.config import FAMILIES, RetrieverTrainConfig, load_config
from train.retrieval.data import (
    Activate,
    Features,
    PoolData,
    Split,
    load_data,
    make_features,
    split_concepts,
)
from train.retrieval.fit import Candidate, fit_paper, fit_ridges, fit_transformer
from train.retrieval.newcomers import add_newcomers
from train.retrieval.report import (
    Evaluation,
    banks,
    calibrate,
    choose_members,
    concept_names,
    join,
    provenance,
)
from train.retrieval.responses import fit_closed_form, fit_responses

Say = Callable[[str], None]


def fit_candidates(
    data: PoolData,
    features: Features,
    split: Split,
    config: RetrieverTrainConfig,
    accelerator: Accelerator,
    say: Say,
) -> list[Candidate]:
    """Fit every kind of encoder to the fit part."""
    found: list[Candidate] = []
    for family in FAMILIES:
        if family not in features.families or family not in config.families:
            continue
        if family == "responses":
            found += fit_responses(data, features, split.fit, split.validation, config)
            continue
        found += fit_ridges(family, data, features, split.fit, split.validation, config)
        if config.steps:
            part = (split.fit, split.validation)
            found.append(fit_transformer(family, data, features, *part, config, accelerator))
    for candidate in found:
        m = candidate.metrics
        say(f"validation  {candidate.name:<44} R@1 {m.recall[1]:.3f}  MRR {m.mrr:.3f}")
    return found


def build(
    candidates: list[Candidate],
    data: PoolData,
    features: Features,
    split: Split,
    config: RetrieverTrainConfig,
    text_encoder: TextEncoder,
) -> tuple[Retriever, dict[str, Any]]:
    """Join the best encoders, calibrate them, and fit them again to everything but the test part.

    Calibration uses the encoders of the fit part, since the final ones have seen the validation
    part.
    """
    members = choose_members(candidates, data, features, split, config.ensemble)
    weights = [weight for _, weight in members]
    first = join([c.encoder for c, _ in members], weights, features, text_encoder)
    calibration = calibrate(first, data, features, split, text_encoder)
    encoders = [candidate.refit(split.seen) for candidate, _ in members]
    bare = join(encoders, weights, features, text_encoder)
    background, references = banks(bare, data, features, split.seen, text_encoder)
    concepts = concept_names(data, split.seen)
    more = {"members": [{"name": c.name, "weight": w} for c, w in members]}
    retriever = join(
        encoders,
        weights,
        features,
        text_encoder,
        calibration=calibration,
        provenance=provenance(data, split, config, {**more, "concepts": concepts}),
        background=background,
        references=references,
        concepts=text_encoder.encode(concepts),
    )
    if "responses" in features.families and len(concepts):
        encoder = fit_closed_form(features, split.seen, config)
        retriever = add_newcomers(retriever, encoder, data, features, split.seen, text_encoder)
    return retriever, more


def extend(
    config: RetrieverTrainConfig, text_encoder: TextEncoder, say: Say, activate: Activate
) -> dict[str, Any]:
    """Give the retriever ``config.extend`` an encoder of newcomers, fitted to this pool.

    Returns:
        The encoder's own numbers, and its calibration.

    Raises:
        AutoLoRAError: The retriever, the pool or the settings cannot be used.
    """
    before = Retriever.load(config.extend)
    config = replace(config, families=("responses",), portraits="")
    data = load_data(config, text_encoder)
    split = split_concepts(data.concepts, data.concept_names, config)
    features = make_features(data, split.seen, config, text_encoder, activate)
    if "responses" not in features.families:
        raise ConfigError(f"No LoRA of {config.pool} changes {list(config.response_layers)}.")
    encoder = fit_closed_form(features, split.seen, config)
    retriever = add_newcomers(before, encoder, data, features, split.seen, text_encoder)
    evaluation = Evaluation(data, features, split)
    evaluation.add_retriever(
        "the encoder of newcomers", join([encoder], [1.0], features, text_encoder)
    )
    evaluation.add_chance()
    retriever.spec.provenance["newcomers"] = {
        **provenance(data, split, config, {}),
        "metrics": evaluation.to_dict(),
    }
    retriever.save(config.out)
    say(evaluation.table())
    assert retriever.spec.newcomers is not None
    result = {
        "out": config.out,
        "numbers": evaluation.to_dict(),
        "calibration": retriever.spec.newcomers.to_dict(),
    }
    say(json.dumps(result))
    return result


def measure(
    retriever: Retriever,
    candidates: list[Candidate],
    data: PoolData,
    features: Features,
    split: Split,
    config: RetrieverTrainConfig,
    text_encoder: TextEncoder,
) -> Evaluation:
    """Rank with the retriever and with everything that it is compared with."""
    evaluation = Evaluation(data, features, split)
    evaluation.add_retriever("ours, joined", retriever)
    evaluation.add_search("ours, as the search ranks", retriever)
    for family in FAMILIES:
        own = [candidate for candidate in candidates if candidate.family == family]
        if family != "responses":
            own = sorted(own, key=lambda candidate: candidate.metrics.mrr)[-1:]
        for best in own:
            single = join([best.refit(split.seen)], [1.0], features, text_encoder)
            evaluation.add_retriever(f"ours, {best.name}", single)
    if config.paper_steps:
        evaluation.add_paper(fit_paper(data, split.seen, config))
    evaluation.add_metadata(text_encoder)
    evaluation.add_chance()
    return evaluation


def train(
    config: RetrieverTrainConfig,
    text_encoder: TextEncoder,
    say: Say = print,
    activate: Activate = text_activations,
) -> dict[str, Any]:
    """Train, measure and write a retriever.

    Args:
        config: Settings.
        text_encoder: Encodes captions.
        say: Receives lines for people.
        activate: Gives activations of captions in the base model.

    Returns:
        The numbers, as they are printed on the last line.

    Raises:
        AutoLoRAError: The pool, the portraits or the settings cannot be used.
    """
    if config.extend:
        return extend(config, text_encoder, say, activate)
    start = time.perf_counter()
    # Closed forms and an encoder of a few hundred thousand numbers: a GPU would only wait for data.
    accelerator = Accelerator(cpu=True)
    tell: Say = say if accelerator.is_main_process else (lambda line: None)
    data = load_data(config, text_encoder)
    split = split_concepts(data.concepts, data.concept_names, config)
    tell(
        f"{len(data)} LoRAs of {len(data.concept_names)} concepts, {len(data.text)} captions; "
        f"fit {len(split.fit)}, validation {len(split.validation)}, test {len(split.test)}"
    )
    for name, reason in list(data.skipped.items())[:5]:
        tell(f"left out {name}: {reason}")
    features = make_features(data, split.seen, config, text_encoder, activate)
    candidates = fit_candidates(data, features, split, config, accelerator, tell)
    if not candidates:
        raise ConfigError(f"None of {list(config.families)} can be fitted without portraits.")
    retriever, more = build(candidates, data, features, split, config, text_encoder)
    evaluation = measure(retriever, candidates, data, features, split, config, text_encoder)
    retriever.spec.provenance["metrics"] = evaluation.to_dict()
    if accelerator.is_main_process:
        retriever.save(config.out)
    tell(evaluation.table())
    count = sum(p.numel() for p in retriever.state_dict().values())
    result = {
        "out": config.out,
        "numbers": evaluation.to_dict(),
        "members": more["members"],
        "stored_numbers": count,
        "calibration": retriever.calibration.to_dict(),
        "loras": {k: len(getattr(split, k)) for k in ("fit", "validation", "test")},
        "left_out": len(data.skipped),
        "seconds": round(time.perf_counter() - start, 1),
    }
    tell(json.dumps(result))
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and train.

    Args:
        arguments: The command line; ``sys.argv`` when None.

    Returns:
        Exit status: 0, or 2 for wrong input.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--config", type=Path, required=True, help="YAML file with the settings")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="replaces a setting"
    )
    options = parser.parse_args(arguments)
    try:
        overrides: dict[str, Any] = {}
        for item in options.set:
            key, equals, value = item.partition("=")
            if not equals:
                raise ConfigError(f"--set wants KEY=VALUE, not {item!r}.")
            overrides[key] = yaml.safe_load(value) if value else ""
        train(load_config(options.config, overrides), MiniLMText())
    except AutoLoRAError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
