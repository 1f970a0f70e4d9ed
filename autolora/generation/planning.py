"""A picture that is planned: what takes part, and what the report says before it is made."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from autolora.flux.config import PipelineConfig
from autolora.generation.identity import identify_base
from autolora.generation.report import Report
from autolora.generation.request import Request
from autolora.generation.selecting import Chosen
from autolora.generation.versions import program_versions


class Clock:
    """Seconds between marks."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def mark(self, name: str) -> None:
        """Note the time since the last mark under a name."""
        now = time.perf_counter()
        self.seconds[name], self.last = now - self.last, now

    def total(self) -> float:
        """Return the seconds since the start."""
        return time.perf_counter() - self.start


@dataclass
class Plan:
    """A picture that is ready to be made.

    Attributes:
        request: What was asked for.
        chosen: The adapters that take part.
        report: All of the report but how it went.
        gated: Whether trained gates act.
        clock: Runs since the call.
    """

    request: Request
    chosen: list[Chosen]
    report: Report
    gated: bool
    clock: Clock


def plan_report(
    request: Request,
    used_prompt: str,
    config: PipelineConfig,
    strategy: str,
    chosen: Sequence[Chosen],
    notes: list[str],
    text_encoders: bool | None,
) -> Report:
    """Return the report of a picture that is yet to be made.

    Args:
        request: What was asked for.
        used_prompt: What the model is going to read.
        config: The base model's configuration.
        strategy: How the adapters are fused.
        chosen: The adapters that take part.
        notes: What a user should know; more may be added to this list later.
        text_encoders: Whether adapters act on text encoders; None is the configured choice.
    """
    return Report(
        prompt=request.typed,
        used_prompt=used_prompt,
        negative_prompt=request.negative_prompt,
        model=config.name,
        strategy=strategy,
        seed=request.seed,
        steps=request.steps,
        width=request.width,
        height=request.height,
        guidance=request.guidance,
        sigma_shift=request.sigma_shift,
        text_encoders=config.adapters.text_encoders if text_encoders is None else text_encoders,
        adapters=[entry.to_report() for entry in chosen],
        base=identify_base(config),
        notes=notes,
        versions=program_versions(),
    )
