"""Times prompt to picture: AutoLoRA with retrieval and three adapters over the bare pipeline.

    python scripts/bench_pipeline.py [--repeats 7]

Both run in one process, in turns, on the same model, size, steps and guidance. The bare pipeline is
DiffSynth's ``FluxImagePipeline`` with its own guidance (two passes per step); a second line shows
the embedded pipeline without adapters, which runs both passes as one batch. Ratios are of medians;
the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from autolora import AutoLoRAPipeline
from autolora.config import load_config
from autolora.families.load import load_pipeline

PROMPT = "a neon elephant on a blue background"
ASKED = [("rocket", 1.0)]  # beside the two that retrieval takes


def bare_call(pipe: Any, steps: int, guidance: float) -> Callable[[int], Any]:
    """A picture by the DiffSynth pipeline alone."""
    size = pipe.dit.config.size

    def call(seed: int) -> Any:
        return pipe(
            PROMPT,
            cfg_scale=guidance,
            height=size,
            width=size,
            num_inference_steps=steps,
            seed=seed,
            t5_sequence_length=pipe.dit.config.text_length,
            progress_bar_cmd=lambda items: items,
        )

    return call


def unbatched(pipe: Any) -> Any:
    """The same pipeline with DiffSynth's own guidance, two passes per step."""
    from diffsynth.pipelines.flux_image import FluxImagePipeline

    pipe.cfg_guided_model_fn = FluxImagePipeline.cfg_guided_model_fn.__get__(pipe)
    return pipe


def interleaved(calls: dict[str, Callable[[int], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each call; they take turns, so that noise falls on all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for seed in range(repeats + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call(seed)
            if seed:  # the first round warms up
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Parses the command line, times, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = load_config("tiny")
    ours = AutoLoRAPipeline.from_config("tiny")
    if len(ours(PROMPT, loras=ASKED).report.adapters) != 3:  # also builds a missing index
        raise SystemExit("The prompt should take three adapters; rebuild the index.")
    diffsynth = unbatched(load_pipeline(config))
    embedded = load_pipeline(config)

    def full(seed: int) -> Any:
        return ours(PROMPT, seed=seed)

    def three(seed: int) -> Any:
        return ours(PROMPT, seed=seed, loras=ASKED)

    calls = {
        "DiffSynth pipeline, no adapters": bare_call(diffsynth, config.steps, config.guidance),
        "embedded pipeline, no adapters": bare_call(embedded, config.steps, config.guidance),
        "AutoLoRA, 2 adapters by retrieval": full,
        "AutoLoRA, retrieval, 3 adapters": three,
    }
    medians = interleaved(calls, args.repeats)
    reference = medians["DiffSynth pipeline, no adapters"]
    for name, seconds in medians.items():
        print(f"{name:38s} {seconds:7.3f} s   {seconds / reference:5.2f} x bare")
    ratios = {name: seconds / reference for name, seconds in medians.items()}
    print(json.dumps({"steps": config.steps, "threads": args.threads, "ratio": ratios}))


if __name__ == "__main__":
    main()
