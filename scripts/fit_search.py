"""Learns how much each hint counts when a prompt is searched, from the tuning half of the prompts.

    python scripts/fit_search.py [--model tiny]

Logistic regression on the features of `autolora.retrieval.relevance`, of which a LoRA's best run of
words counts (multiple-instance learning). Hints can only speak for a LoRA and circumstances only
against it, so weights of the wrong sign are held at 0. Cross-validation over prompts says how well
the probabilities are calibrated. Writes `autolora/retrieval/data/relevance.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from autolora import AutoLoRAPipeline
from autolora.retrieval.index import PoolIndex, build_vectors
from autolora.retrieval.lexicon import DATA, lexicon
from autolora.retrieval.relevance import FEATURES
from autolora.retrieval.search import Searcher, feature_rows
from scripts.evaluate_search import Prompt, read_prompts

_AGAINST = "spelled modifier verb compound unrelated unknown clause is_style kind_long near_long"
AGAINST = frozenset(_AGAINST.split())
RELATIONS = ("alias", "style", "synonym", "kind", "member", "head", "tag", "phrase", "keyword")
KIND = 0.85
PENALTY = 0.0003
STEPS = 600
FOLDS = 5


class Bags(NamedTuple):
    """Runs of words ``[n, F]`` with the bag of each; labels and prompts of bags.

    A bag is a prompt and a LoRA.
    """

    rows: Tensor
    bag: Tensor
    label: Tensor
    prompt: Tensor


POOLS: tuple[dict[str, str], ...] = (
    {"title": "title"},
    {"title": "tag", "description": "description"},
    {"captions": "captions", "phrase": "phrase"},
)
"""Kinds of metadata to keep, and what they are taken for: pools that people have tell less than
the committed one."""


def variants(searcher: Searcher) -> list[Searcher]:
    """The pool as it is, and the poorer ones of `POOLS`."""
    index = searcher.index
    vectors = index.vectors("texts")
    found = [searcher]
    for kinds in POOLS:
        rows = [i for i, row in enumerate(index.texts) if row.kind in kinds]
        texts = [replace(index.texts[i], kind=kinds[index.texts[i].kind]) for i in rows]
        weights = build_vectors(index.vectors("weights")) if index.provenance.dim else None
        other = PoolIndex(
            index.provenance, index.records, texts, weights, build_vectors(vectors[rows])
        )
        found.append(Searcher(other, searcher.text_encoder, searcher.retriever))
    return found


def collect(searchers: list[Searcher], prompts: list[Prompt]) -> Bags:
    """Features of every LoRA that has any, for every prompt in every pool."""
    rows, bag, label, owner = [], [], [], []
    for searcher, (number, prompt) in product(searchers, enumerate(prompts)):
        findings, pairs = searcher.collect(prompt.text)
        bags: dict[int, int] = {}
        right = frozenset().union(*prompt.right)
        told = ((k, pair) for k, pair in pairs.items() if pair.features)
        own = {k: pair for k, pair in told if not findings.concepts[k[0]].negated}
        table = feature_rows(own.values())
        for (_, lora), row in zip(own, table, strict=True):
            if lora not in searcher.with_text:
                continue
            if lora not in bags:
                bags[lora] = len(label)
                label.append(float(searcher.index.records[lora].name in right))
                owner.append(number)
            rows.append(torch.from_numpy(row))
            bag.append(bags[lora])
    return Bags(
        torch.stack(rows), torch.tensor(bag), torch.tensor(label).double(), torch.tensor(owner)
    )


def joined(first: Bags, second: Bags) -> Bags:
    """Both collections; prompts keep their numbers."""
    moved = second._replace(bag=second.bag + len(first.label))
    return Bags(*(torch.cat(pair) for pair in zip(first, moved, strict=True)))


def bag_logits(weights: Tensor, bags: Bags) -> Tensor:
    """Log-odds of each bag: of its best run of words."""
    least = torch.full((len(bags.label),), -torch.inf, dtype=torch.double)
    return least.scatter_reduce(0, bags.bag, bags.rows @ weights, "amax")


def fit(bags: Bags, used: Tensor) -> Tensor:
    """Weights of the regression on some of the bags."""
    signs = torch.tensor([-1.0 if name in AGAINST else 1.0 for name in FEATURES]).double()
    weights = torch.zeros(len(FEATURES), dtype=torch.double)
    weights[0] = -3.0
    weights[1:] = signs[1:]
    weights.requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=0.05)
    for _ in range(STEPS):
        logits = bag_logits(weights, bags)[used]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, bags.label[used], reduction="sum"
        ) / len(bags.prompt.unique())
        loss = loss + PENALTY * (weights[1:] ** 2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            weights[1:] = torch.where(weights[1:] * signs[1:] < 0, 0.0, weights[1:])
            # Nothing names a LoRA more surely than its name, and a kind does so less.
            most = weights[FEATURES.index("name")]
            for name in RELATIONS:
                at = FEATURES.index(name)
                weights[at] = torch.minimum(weights[at], most * (KIND if name == "kind" else 1))
    return weights.detach()


def main() -> None:
    """Fit, cross-validate, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny", help="configuration or path of a YAML file")
    options = parser.parse_args()
    searcher = AutoLoRAPipeline.from_config(options.model).open_index().searcher
    names = {record.name for record in searcher.index.records}
    prompts = [p for p in read_prompts("tuning") if any(r <= names for r in p.right)]
    pools = variants(searcher)
    bags = collect(pools, prompts)
    # Again without the lists of everyday names, so that what WordNet says is weighed, too.
    lexicon().__dict__["_names"] = {}
    bags = joined(bags, collect(pools[:2], prompts))
    held_out = torch.zeros(len(bags.label), dtype=torch.double)
    for fold in range(FOLDS):
        out = bags.prompt % FOLDS == fold
        held_out[out] = bag_logits(fit(bags, ~out), bags)[out]
    p = held_out.sigmoid()
    brier = float(((p - bags.label) ** 2).mean())
    calibration = []
    for low, high in ((0.0, 0.1), (0.1, 0.3), (0.3, 0.5), (0.5, 0.7), (0.7, 0.9), (0.9, 1.01)):
        inside = (p >= low) & (p < high)
        if inside.any():
            row = (int(inside.sum()), float(p[inside].mean()), float(bags.label[inside].mean()))
            calibration.append(row)
            print("held out: {} pairs, mean probability {:.3f}, right {:.3f}".format(*row))
    weights = fit(bags, torch.ones(len(bags.label), dtype=torch.bool))
    found = {name: round(float(w), 4) for name, w in zip(FEATURES, weights, strict=True)}
    for name, weight in found.items():
        print(f"{name:16} {weight:8.3f}")
    data = {"prompts": len(prompts), "pairs": len(bags.label), "weights": found}
    (DATA / "relevance.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"brier": round(brier, 5), "calibration": calibration}))


if __name__ == "__main__":
    main()
