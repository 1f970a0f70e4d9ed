"""From a plan to pictures: adapters in force, prompt read once, one picture per seed."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from autolora.fusion.attach import ready_beside
from autolora.generation.denoise import (
    Texts,
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


@dataclass
class _Group:
    """Pictures whose steps were taken together: their seeds, latents, seconds, gates if any."""

    seeds: list[int]
    latents: Tensor
    seconds: float
    records: Any


def make_pictures(
    base: Any,
    plan: Plan,
    acting: AbstractContextManager[Any],
    seeds: Sequence[int],
    watch: Watch,
    batch: int = 1,
    drawn: Callable[[Output], None] | None = None,
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
        drawn: Given every picture as soon as its batch is decoded; what it raises ends the call.

    Returns:
        One output per seed, in their order; none where `drawn` was given them, so that any number
        of pictures takes the memory of a batch.
    """
    groups = list(chunks(seeds, batch))
    # A batch takes a step for all of its pictures at once.
    total = len(groups) * plan.request.steps
    waiting: list[_Group] = []
    outputs: list[Output] = []
    with acting as attachment:
        plan.clock.mark("attach")
        wait_for_adapters = ready_beside(base.dit, base.torch_dtype, torch.device(base.device))
        texts = read_texts(base, plan.request, plan.report.used_prompt)
        wait_for_adapters()
        layers = {entry.name: len(entry.layers) for entry in attachment.adapters}
        for number, group in enumerate(groups):
            here = dataclasses.replace(watch, done=number * plan.request.steps, total=total)
            with _recording(base, plan) as records:
                latents, seconds = denoise_latents(base, plan.request, texts, group, here)
            waiting.append(_Group(group, latents, seconds, records))
            # Where nobody waits for single pictures, all are decoded after the last step: a
            # decoder that is fetched sends an offloaded transformer away.
            if drawn is not None or number == len(groups) - 1:
                for output in _decoded(base, plan, waiting, texts, layers):
                    (drawn or outputs.append)(output)
                waiting.clear()
    return outputs


def _decoded(
    base: Any, plan: Plan, groups: Sequence[_Group], texts: Texts, layers: Mapping[str, int]
) -> Iterator[Output]:
    for group in groups:
        start = time.perf_counter()
        images = decode_latents(base, group.latents)
        timings = Timings(texts.seconds, group.seconds, time.perf_counter() - start)
        texts.seconds = 0.0  # the pictures after the first read nothing
        yield from _outputs(base, plan, group, images, timings, layers)


def _recording(base: Any, plan: Plan) -> AbstractContextManager[Any]:
    from autolora.fusion import record_gates

    return record_gates(base.dit) if plan.gated else nullcontext()


def _outputs(
    base: Any,
    plan: Plan,
    group: _Group,
    images: Sequence[Image],
    timings: Timings,
    layers: Mapping[str, int],
) -> Iterator[Output]:
    """One output per picture of a group that was drawn together."""
    records, count = group.records, len(group.seeds)
    gates = records.by_adapter() if records is not None else {}
    gate_map = records.by_step(plan.request.steps) if records is not None else None
    hits = [entry.hit for entry in plan.chosen if entry.hit is not None]
    for seed, image in zip(group.seeds, images, strict=True):
        report = copy.deepcopy(plan.report)
        report.seed = seed
        if base.dit.guidance_embedder is not None:
            report.true_cfg = plan.request.true_cfg
        for used in report.adapters:
            used.layers, used.gate = layers[used.name], gates.get(used.name)
        shares = {name: seconds / count for name, seconds in vars(timings).items()}
        report.timings = {**plan.clock.seconds, **shares, "total": plan.clock.total()}
        if count > 1:
            report.batch = list(group.seeds)
            report.notes.append(
                f"Drawn in a batch of {count}; drawn alone, single pixels may differ by a "
                "grey level."
            )
        yield Output(image, hits, report.used_prompt, report, gate_map)
