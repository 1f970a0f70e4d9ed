"""From a plan to pictures: adapters in force, prompt read once, one picture per seed."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from autolora.fusion.prefetch import ready_beside
from autolora.generation.denoise import (
    Timings,
    Watch,
    chunks,
    decode_latents,
    denoise_latents,
    read_texts,
)
from autolora.generation.planning import Plan
from autolora.generation.report import Output

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

MAX_BATCH = 16


def make_pictures(
    base: Any,
    plan: Plan,
    acting: AbstractContextManager[Any],
    seeds: Sequence[int],
    watch: Watch,
    batch: int = 1,
) -> list[Output]:
    """Draw a planned picture for each seed.

    Args:
        base: The DiffSynth pipeline.
        plan: What was planned; its report is copied for each picture.
        acting: A context in which the adapters are in force; it gives what was attached.
        seeds: Seeds of the noises.
        watch: Who is told of steps and shown previews.
        batch: Pictures to draw at once. More than 1 is faster where a single picture does not
            keep the device busy, but rounding then differs by a grey level here and there.

    Returns:
        One output per seed, in their order.
    """
    groups = list(chunks(seeds, min(batch, MAX_BATCH)))
    # A batch takes a step for all of its pictures at once.
    total = len(groups) * plan.request.steps
    drawn: list[tuple[list[int], Tensor, float, Any]] = []
    with acting as attachment:
        plan.clock.mark("attach")
        wait_for_adapters = ready_beside(base.dit, base.torch_dtype, torch.device(base.device))
        texts = read_texts(base, plan.request, plan.report.used_prompt)
        wait_for_adapters()
        for number, group in enumerate(groups):
            here = dataclasses.replace(watch, done=number * plan.request.steps, total=total)
            with _recording(base, plan) as records:
                latents, seconds = denoise_latents(base, plan.request, texts, group, here)
            drawn.append((group, latents, seconds, records))
        layers = {entry.name: len(entry.layers) for entry in attachment.adapters}
    # Decoded at the end: a decoder that is fetched would send the transformer away each time.
    outputs: list[Output] = []
    for group, latents, seconds, records in drawn:
        start = time.perf_counter()
        images = decode_latents(base, latents)
        timings = Timings(texts.seconds, seconds, time.perf_counter() - start)
        outputs += _outputs(base, plan, group, images, timings, records, layers)
        texts.seconds = 0.0  # the pictures after the first read nothing
    return outputs


def _recording(base: Any, plan: Plan) -> AbstractContextManager[Any]:
    from autolora.fusion import record_gates

    return record_gates(base.dit) if plan.gated else nullcontext()


def _outputs(
    base: Any,
    plan: Plan,
    seeds: Sequence[int],
    images: Sequence[Image],
    timings: Timings,
    records: Any,
    layers: dict[str, int],
) -> list[Output]:
    """One output per picture of a group that was drawn together."""
    gates = records.by_adapter() if records is not None else {}
    gate_map = records.by_step(plan.request.steps) if records is not None else None
    hits = [entry.hit for entry in plan.chosen if entry.hit is not None]
    outputs = []
    for seed, image in zip(seeds, images, strict=True):
        report = copy.deepcopy(plan.report)
        report.seed = seed
        if base.dit.guidance_embedder is not None:
            report.true_cfg = plan.request.true_cfg
        for used in report.adapters:
            used.layers, used.gate = layers[used.name], gates.get(used.name)
        shares = {name: seconds / len(seeds) for name, seconds in vars(timings).items()}
        report.timings = {**plan.clock.seconds, **shares, "total": plan.clock.total()}
        if len(seeds) > 1:
            report.notes.append(
                f"Drawn in a batch of {len(seeds)}; drawn alone, single pixels may differ by a "
                "grey level."
            )
        outputs.append(Output(image, hits, report.used_prompt, report, gate_map))
    return outputs
