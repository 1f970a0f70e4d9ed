"""Runs DiffSynth's pipeline for one request, with progress and timings."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image

from autolora.flux.loading import text_length_for
from autolora.generation.request import Request

Progress = Callable[[int, int], None]
"""Called as ``progress(steps done, steps in all)``, first with 0."""


@dataclass
class Timings:
    """Seconds that the parts of a generation took."""

    encode: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0


def denoise(
    pipe: Any, request: Request, prompt: str, progress: Progress | None = None
) -> tuple[Image, Timings]:
    """Generate a picture with whatever is attached to the transformer.

    Args:
        pipe: A DiffSynth ``FluxImagePipeline``.
        request: Seed, steps, size and guidance.
        prompt: What the model shall read.
        progress: Told of every step; what it raises ends the generation.

    Returns:
        The picture, and how long its parts took.
    """
    clock = _StepClock(progress, torch.device(pipe.device))
    image = pipe(
        prompt=prompt,
        negative_prompt=request.negative_prompt,
        seed=request.seed,
        rand_device="cpu",  # the same noise on every device
        width=request.width,
        height=request.height,
        num_inference_steps=request.steps,
        sigma_shift=request.sigma_shift,
        t5_sequence_length=text_length_for(pipe, [prompt, request.negative_prompt]),
        progress_bar_cmd=clock.watch,
        **_guidance(pipe, request.guidance),
    )
    end = time.perf_counter()
    timings = Timings(clock.first - clock.start, clock.last - clock.first, end - clock.last)
    return image, timings


def _guidance(pipe: Any, scale: float) -> dict[str, float]:
    """Guidance by two passes, or by an input where the model was distilled to have one."""
    if pipe.dit.guidance_embedder is None:
        return {"cfg_scale": scale}
    return {"cfg_scale": 1.0, "embedded_guidance": scale}


class _StepClock:
    """Stands in for the progress bar that DiffSynth puts around its steps."""

    def __init__(self, progress: Progress | None, device: torch.device) -> None:
        self.progress = progress
        self.device = device
        self.start = self.first = self.last = time.perf_counter()

    def watch(self, timesteps: Sequence[Any]) -> Iterator[Any]:
        self.first = time.perf_counter()
        self._tell(0, len(timesteps))
        for done, timestep in enumerate(timesteps, start=1):
            yield timestep
            self._tell(done, len(timesteps))
        if self.device.type == "cuda":
            # Steps are only queued until here.
            torch.cuda.synchronize(self.device)
        self.last = time.perf_counter()

    def _tell(self, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(done, total)
