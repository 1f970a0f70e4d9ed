"""Several pictures of one prompt: one call each, one call for all, and batches.

    python scripts/bench_many.py --model tiny --pictures 8 --repeats 5

Every way draws the same seeds with the same adapters; the ways take turns, and medians are
compared. The first column is DiffSynth's own pipeline, called once per picture with the adapters
attached. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

from autolora.pipeline import AutoLoRAPipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny", help="base model")
    parser.add_argument("--prompt", default="a neon elephant on a blue background")
    parser.add_argument("--pictures", type=int, default=8, help="pictures per way")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--batches", type=int, nargs="*", default=[2, 4, 8], help="batch sizes")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; medians are shown")
    arguments = parser.parse_args()
    pipe = AutoLoRAPipeline.from_config(arguments.model)
    first = pipe(arguments.prompt, steps=arguments.steps)
    adapters = [(used.name, used.strength) for used in first.report.adapters]
    pipe.attach(adapters)
    ways = make_ways(pipe, first.prompt, arguments)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    pictures: dict[str, list[Any]] = {}
    for _ in range(arguments.repeats):
        for name, run in ways.items():
            start = time.perf_counter()
            pictures[name] = run()
            seconds[name].append(time.perf_counter() - start)
    report(arguments, adapters, seconds, pictures)


def make_ways(
    pipe: AutoLoRAPipeline, prompt: str, arguments: argparse.Namespace
) -> dict[str, Callable[[], list[Any]]]:
    seeds = list(range(arguments.pictures))
    config, base = pipe.config, pipe.base
    embedded = base.dit.guidance_embedder is not None
    guidance = (
        {"embedded_guidance": config.guidance} if embedded else {"cfg_scale": config.guidance}
    )

    def diffsynth() -> list[Any]:
        return [
            base(
                prompt,
                seed=seed,
                width=config.width,
                height=config.height,
                num_inference_steps=arguments.steps,
                sigma_shift=config.sigma_shift,
                **base.family.inputs(base, [prompt, ""]),
                progress_bar_cmd=lambda steps: steps,
                **guidance,
            )
            for seed in seeds
        ]

    def calls() -> list[Any]:
        return [pipe(prompt, seed, steps=arguments.steps).image for seed in seeds]

    def many(batch: int) -> list[Any]:
        outputs = pipe.generate_many(prompt, seeds, steps=arguments.steps, batch=batch)
        return [output.image for output in outputs]

    ways: dict[str, Callable[[], list[Any]]] = {"DiffSynth, one call each": diffsynth}
    ways["one call each"] = calls
    for batch in [1, *arguments.batches]:
        ways[f"generate_many, batch {batch}"] = lambda batch=batch: many(batch)
    return ways


def report(
    arguments: argparse.Namespace,
    adapters: list[tuple[str, float]],
    seconds: dict[str, list[float]],
    pictures: dict[str, list[Any]],
) -> None:
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rival, *_ = medians.values()
    alone = [np.asarray(image, dtype=int) for image in pictures["one call each"]]
    rows = []
    print("| way | seconds per picture | of DiffSynth | largest difference in grey levels |")
    print("|---|---|---|---|")
    for name, median in medians.items():
        differences = [
            int(np.abs(np.asarray(image, dtype=int) - one).max())
            for image, one in zip(pictures[name], alone, strict=True)
        ]
        row = {
            "way": name,
            "seconds": median / arguments.pictures,
            "ratio": median / rival,
            "difference": max(differences),
        }
        rows.append(row)
        print(f"| {name} | {row['seconds']:.3f} | {row['ratio']:.2f} | {row['difference']} |")
    facts = {"model": arguments.model, "steps": arguments.steps, "pictures": arguments.pictures}
    print(json.dumps({**facts, "adapters": adapters, "rows": rows}))


if __name__ == "__main__":
    main()
