"""Measures retrieval on the shipped pool, apart for concepts trained on and for those never seen.

The pool is asked as it is and as a copy without names, titles, trigger words or captions. Three
questions: are the right adapters chosen for "a STYLE SUBJECT on a COLOUR background"; where does
the search rank a LoRA whose concept is asked for by name; and how many adapters are chosen for
subjects of the larger pool, none of which fits.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from autolora import AutoLoRAPipeline, Pool
from autolora.config import load_config
from autolora.lora import save_lora
from train.retrieval.config import RetrieverTrainConfig
from train.retrieval.data import in_test
from train.tiny_world.captions import prompt
from train.tiny_world.scenes import COLOURS
from train.tiny_world.styles import STYLES
from train.tiny_world.world import split_world

Numbers = dict[str, dict[str, float]]
"""Metrics by group of concepts."""

Wanted = list[tuple[str, str, str, str]]
"""Subject and style as captions name them, and the names of the two LoRAs."""


def chosen_share(pipe: AutoLoRAPipeline, wanted: Wanted) -> dict[str, float]:
    """Shares of prompts "a STYLE SUBJECT on a COLOUR background" whose adapters were chosen."""
    rng = np.random.default_rng(2)
    right = {"both": 0, "subject": 0, "style": 0, "chosen_per_prompt": 0}
    for subject, style, subject_lora, style_lora in wanted:
        text = prompt(subject, str(rng.choice(list(COLOURS))), style)
        chosen = {hit.name for hit in pipe.choose(text, k=3)}
        right["subject"] += subject_lora in chosen
        right["style"] += style_lora in chosen
        right["both"] += {subject_lora, style_lora} <= chosen
        right["chosen_per_prompt"] += len(chosen)
    return {k: v / max(1, len(wanted)) for k, v in right.items()} | {"prompts": len(wanted)}


def rank_of_own(pipe: AutoLoRAPipeline, loras: dict[str, str]) -> dict[str, float]:
    """Recall and median rank in the whole pool of LoRAs whose concept is searched by name.

    Args:
        pipe: The pipeline.
        loras: Name of the concept by name of the LoRA.
    """
    ranks = []
    for name, concept in loras.items():
        found = [hit.name for hit in pipe.search(concept, k=len(pipe.pool))]
        # The search looks at the nearest of a large pool only; beyond them a LoRA is last.
        ranks.append(found.index(name) + 1 if name in found else len(pipe.pool))
    recalls = {f"recall@{k}": sum(r <= k for r in ranks) / len(ranks) for k in (1, 5)}
    return {**recalls, "median_rank": statistics.median(ranks), "loras": len(ranks)}


def chosen_wrongly(pipe: AutoLoRAPipeline, subjects: list[str]) -> dict[str, float]:
    """Adapters chosen for subjects that no LoRA of the pool draws, on a plain background."""
    count = sum(len(pipe.choose(prompt(name, "blue"), k=3)) for name in subjects)
    return {"chosen_per_prompt": count / max(1, len(subjects)), "prompts": len(subjects)}


def anonymous_pool(pool: Pool, folder: Path) -> dict[str, str]:
    """Copies the pool without names, titles, triggers or captions; returns the new names."""
    renamed = {name: f"lora-{i:03d}" for i, name in enumerate(pool.names)}
    for name, new in renamed.items():
        lora = pool.load(name)
        factors = {layer: lora.factors(layer) for layer in lora.layers}
        save_lora(folder / f"{new}.safetensors", factors, "kohya", dtype="bfloat16")
    return renamed


def measure(
    pipe: AutoLoRAPipeline,
    names: dict[str, str],
    settings: RetrieverTrainConfig,
) -> dict[str, Numbers]:
    """All three questions to one pool.

    A pair counts as trained on where the retriever saw LoRAs of both concepts, as never seen where
    it saw neither; mixed pairs count only in the row for all.

    Args:
        pipe: With the shipped pool, or a copy of it.
        names: Name in this pool by name in the shipped one.
        settings: The retriever's, which decide what it never saw.
    """
    split = split_world()
    styles = [s for s in STYLES if s.slug in names]
    never = {s.name: in_test(s.name, settings) for s in split.shipped}
    never |= {s.name: in_test(f"{s.name} style", settings) for s in styles}
    pairs = [(s.name, t.name, names[s.slug], names[t.slug]) for s in split.shipped for t in styles]
    groups = {
        "all": pairs[:: len(styles) + 1],
        "trained on": [p for p in pairs if not never[p[0]] and not never[p[1]]][::11],
        "never seen": [p for p in pairs if never[p[0]] and never[p[1]]],
    }
    concepts = {names[s.slug]: s.name for s in split.shipped}
    concepts |= {names[s.slug]: s.name for s in styles}
    parts = {"trained on": False, "never seen": True}
    absent = {
        group: [s.name for s in split.large if in_test(s.name, settings) is value]
        for group, value in parts.items()
    }
    return {
        "chosen": {group: chosen_share(pipe, wanted) for group, wanted in groups.items()},
        "ranks": {
            group: rank_of_own(pipe, {n: c for n, c in concepts.items() if never[c] is value})
            for group, value in parts.items()
        },
        "chosen where nothing fits": {
            group: chosen_wrongly(pipe, subjects[:: max(1, len(subjects) // 60)])
            for group, subjects in absent.items()
        },
    }


def evaluate_retrieval(
    pool: Pool, settings: RetrieverTrainConfig, encoder: Path | None = None
) -> dict[str, Any]:
    """Retrieval on the shipped pool as it is, and by weights and portraits alone.

    Args:
        pool: The shipped pool.
        settings: The retriever's.
        encoder: A retriever to use in place of the shipped one.
    """
    config = load_config("tiny")
    with tempfile.TemporaryDirectory() as temporary:
        if encoder is not None:
            config = dataclasses.replace(config, encoder=encoder, index=Path(temporary) / "named")
        named = AutoLoRAPipeline.from_config(config)
        result = {"with metadata": measure(named, {n: n for n in pool.names}, settings)}
        folder = Path(temporary) / "pool"
        renamed = anonymous_pool(pool, folder)
        config = dataclasses.replace(config, pool=folder, index=Path(temporary) / "blind")
        blind = AutoLoRAPipeline.from_config(config)
        result["weights and portraits alone"] = measure(blind, renamed, settings)
    return result
