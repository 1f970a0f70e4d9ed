"""What a picture is asked for with, checked before anything heavy is loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from autolora.errors import GenerationError, shown
from autolora.flux.config import (
    PipelineConfig,
    guidance_problem,
    rounded_size,
    size_problem,
    steps_problem,
    top_k_problem,
)
from autolora.generation.prompts import (
    AskedLoRA,
    ParsedPrompt,
    check_strength,
    check_text,
    parse_prompt,
)

MAX_SEED = 2**63 - 1
MAX_BATCH = 16
"""Most pictures that are drawn at once."""


@dataclass(frozen=True)
class Request:
    """One picture to make; every value is known to be possible.

    Attributes:
        typed: The prompt as it was typed.
        prompt: The prompt without tags.
        tags: The adapters that its tags ask for.
        negative_prompt: What the picture shall not show.
        seed: Seed of the noise.
        steps: Denoising steps.
        width: Pixels.
        height: Pixels.
        guidance: Guidance scale.
        sigma_shift: Shift of the noise schedule; None is the default.
        top_k: Most adapters to take.
        true_cfg: Scale of classifier-free guidance beside embedded guidance; 1 is off.
        notes: Where this is not quite what was asked for, one sentence each.
    """

    typed: str
    prompt: str
    tags: tuple[AskedLoRA, ...]
    negative_prompt: str
    seed: int
    steps: int
    width: int
    height: int
    guidance: float
    sigma_shift: float | None
    top_k: int
    true_cfg: float = 1.0
    notes: tuple[str, ...] = ()


def make_request(
    config: PipelineConfig,
    prompt: str,
    *,
    seed: int = 0,
    steps: int | None = None,
    size: tuple[int, int] | None = None,
    guidance: float | None = None,
    negative_prompt: str = "",
    top_k: int | None = None,
) -> Request:
    """Check what was asked for and fill in the model's defaults.

    Args:
        config: The base model's configuration.
        prompt: The prompt, with or without tags.
        seed: Seed of the noise.
        steps: Denoising steps.
        size: Width and height in pixels.
        guidance: Guidance scale.
        negative_prompt: What the picture shall not show.
        top_k: Most adapters to take.

    Returns:
        The request.

    Raises:
        GenerationError: A value is not possible.
    """
    parsed: ParsedPrompt = parse_prompt(prompt)
    asked_size = size or (config.width, config.height)
    width, height = rounded_size(*asked_size)
    notes: tuple[str, ...] = ()
    if (width, height) != asked_size:
        notes = (f"The size {asked_size[0]}x{asked_size[1]} was rounded up to {width}x{height}.",)
    request = Request(
        typed=prompt,
        prompt=parsed.text,
        tags=parsed.loras,
        negative_prompt=check_text(negative_prompt, "The negative prompt").strip(),
        seed=seed,
        steps=config.steps if steps is None else steps,
        width=width,
        height=height,
        guidance=config.guidance if guidance is None else float(guidance),
        sigma_shift=config.sigma_shift,
        top_k=config.top_k if top_k is None else top_k,
        true_cfg=config.true_cfg,
        notes=notes,
    )
    for problem in (
        steps_problem(request.steps),
        size_problem(*asked_size),
        guidance_problem(request.guidance),
        top_k_problem(request.top_k),
        _seed_problem(seed),
    ):
        if problem:
            raise GenerationError(problem[0].upper() + problem[1:] + ".")
    return request


def asked_loras(pairs: Sequence[str | tuple[str, float] | AskedLoRA]) -> list[AskedLoRA]:
    """Read adapters that were asked for as names, or as pairs of name and strength.

    Raises:
        GenerationError: A strength is out of range.
    """
    asked = []
    for pair in pairs:
        if isinstance(pair, AskedLoRA):
            if pair.strength is not None:
                check_strength(pair.name, pair.strength)
            asked.append(pair)
        elif isinstance(pair, str):
            asked.append(AskedLoRA(pair))
        else:
            asked.append(AskedLoRA(pair[0], check_strength(pair[0], pair[1])))
    return asked


def parse_size(text: str) -> tuple[int, int]:
    """Read ``WIDTHxHEIGHT`` in pixels, or one number for a square.

    Raises:
        GenerationError: It is neither.
    """
    match = re.fullmatch(r"\s*([0-9]{1,6})(?:\s*[xX]\s*([0-9]{1,6}))?\s*", text)
    if match is None:
        raise GenerationError(
            f"Size {shown(text, 40)!r} is not understood; write WIDTHxHEIGHT, such as 128x128."
        )
    width, height = match.groups()
    return int(width), int(height or width)


def check_batch(batch: int) -> int:
    """Make sure that so many pictures can be drawn at once.

    Raises:
        GenerationError: They cannot.
    """
    if 1 <= batch <= MAX_BATCH:
        return batch
    raise GenerationError(f"Batch must be between 1 and {MAX_BATCH}, not {batch}.")


def _seed_problem(seed: int) -> str | None:
    if isinstance(seed, int) and 0 <= seed <= MAX_SEED:
        return None
    return f"seed must be a whole number between 0 and {MAX_SEED}, not {seed}"
