"""What a picture is asked for with, checked before anything heavy is loaded.

Prompts: ``<lora:name:0.8>`` tags, trigger words, and names for files.

The tag is that of A1111 and Forge. Nothing here needs torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from autolora.config import (
    SIZE_MULTIPLE,
    PipelineConfig,
    guidance_problem,
    rounded_size,
    size_problem,
    steps_problem,
    top_k_problem,
)
from autolora.errors import GenerationError, shown
from autolora.images import GivenImages
from autolora.lora.metadata import MAX_STRENGTH

MAX_PROMPT = 10_000
"""Most characters of a prompt."""
_TAG = re.compile(r"<lora:([^<>]*)>", re.IGNORECASE)
_SPACES = re.compile(r"\s+")


@dataclass(frozen=True)
class AskedLoRA:
    """An adapter that was asked for by name.

    Attributes:
        name: Its name in the pool.
        strength: The strength asked for; None leaves it to the adapter's author, or else 1.
    """

    name: str
    strength: float | None = None


@dataclass(frozen=True)
class ParsedPrompt:
    """A prompt and what it asked for.

    Attributes:
        text: The prompt without tags.
        loras: What the tags asked for, in order.
    """

    text: str
    loras: tuple[AskedLoRA, ...]


def parse_prompt(prompt: str) -> ParsedPrompt:
    """Take the tags out of a prompt.

    Args:
        prompt: Text, with any number of ``<lora:name>`` or ``<lora:name:strength>``. Where there
            are two strengths, as A1111 allows, the second is the transformer's.

    Returns:
        The text and the adapters.

    Raises:
        GenerationError: The prompt is empty or far too long, or a tag is not understood.
    """
    if not isinstance(prompt, str) or not prompt.strip():
        raise GenerationError("The prompt is empty; say what the picture shall show.")
    check_text(prompt, "The prompt")
    loras = tuple(_parse_tag(match.group(1)) for match in _TAG.finditer(prompt))
    return ParsedPrompt(_tidy(_TAG.sub(" ", prompt)), loras)


def check_text(text: str, what: str) -> str:
    """Make sure that a text can be read by a text encoder.

    Args:
        text: A prompt or negative prompt.
        what: What a message calls it.

    Raises:
        GenerationError: It is far too long, or has bytes that are no UTF-8.
    """
    if len(text) > MAX_PROMPT:
        raise GenerationError(
            f"{what} has {len(text)} characters; at most {MAX_PROMPT} are possible."
        )
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise GenerationError(f"{what} is not valid text; save or type it as UTF-8.")
    return text


def parse_lora(text: str) -> AskedLoRA:
    """Read ``NAME`` or ``NAME:STRENGTH``; a name may itself have colons.

    Raises:
        GenerationError: The name is empty or the strength is not a number in range.
    """
    name, colon, strength = text.rpartition(":")
    if not colon:
        return _asked(text, None)
    return _asked(name, strength)


def _parse_tag(inside: str) -> AskedLoRA:
    parts = inside.split(":")
    if len(parts) > 3:
        raise GenerationError(
            f"The tag <lora:{shown(inside, 60)}> is not understood; write <lora:name:strength>."
        )
    return _asked(parts[0], parts[-1] if len(parts) > 1 else None)


def _asked(name: str, strength: str | None) -> AskedLoRA:
    if not name.strip():
        raise GenerationError("A LoRA was asked for without a name; write NAME or NAME:STRENGTH.")
    if strength is None:
        return AskedLoRA(name.strip())
    try:
        value = float(strength)
    except ValueError:
        raise GenerationError(
            f"The strength {shown(strength, 40)!r} of LoRA {shown(name.strip(), 60)!r} "
            "is not a number; write for example 0.8."
        ) from None
    return AskedLoRA(name.strip(), check_strength(name.strip(), value))


def check_strength(name: str, strength: float) -> float:
    """Make sure that a strength can be used.

    Raises:
        GenerationError: It is not finite or is out of range.
    """
    if not math.isfinite(strength) or abs(strength) > MAX_STRENGTH:
        raise GenerationError(
            f"The strength {strength:g} of LoRA {shown(name, 60)!r} is out of range; "
            f"use -{MAX_STRENGTH:g} to {MAX_STRENGTH:g}, commonly 0.5 to 1."
        )
    return float(strength)


def merge_asked(*groups: Iterable[AskedLoRA]) -> list[AskedLoRA]:
    """Join lists of adapters; a name that comes again takes the later strength."""
    merged: dict[str, AskedLoRA] = {}
    for lora in (lora for group in groups for lora in group):
        merged[lora.name] = lora
    return list(merged.values())


def add_triggers(text: str, triggers: Sequence[str]) -> tuple[str, list[str]]:
    """Add trigger words that a prompt does not have yet.

    A word counts as there when the prompt has it as whole words, in any case.

    Args:
        text: The prompt without tags.
        triggers: Words or phrases in the order to add them.

    Returns:
        The prompt with the missing ones after a comma, and those that were added.
    """
    added: list[str] = []
    for trigger in triggers:
        phrase = _tidy(_TAG.sub(" ", trigger)).strip(" ,")
        if phrase and not has_phrase(", ".join([text, *added]), phrase):
            added.append(phrase)
    return ", ".join(part for part in (text, *added) if part), added


def has_phrase(text: str, phrase: str) -> bool:
    """Tell whether a text has a phrase as whole words, in any case."""
    words = r"\s+".join(re.escape(word) for word in phrase.split())
    return re.search(rf"(?<!\w){words}(?!\w)", text, re.IGNORECASE) is not None


def slug(prompt: str, limit: int = 48) -> str:
    """Make a file name from a prompt: lower-case words of it joined by dashes."""
    text = _TAG.sub(" ", prompt).lower()
    words = re.sub(r"[^\w]+", "-", text).strip("-_")
    return words[:limit].strip("-_") or "picture"


def _tidy(text: str) -> str:
    """Join what the removed tags left apart."""
    joined = _SPACES.sub(" ", text)
    joined = re.sub(r" (?=[,.;])", "", joined)
    return re.sub(r"(,)(?:\s*,)+", r"\1", joined).strip(" ,")


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
        images: Pictures to start from.
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
    images: GivenImages = field(default_factory=GivenImages)


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
    images: GivenImages | None = None,
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
        images: Pictures to start from; a picture to redraw gives the size where none is asked for.

    Returns:
        The request.

    Raises:
        GenerationError: A value is not possible.
    """
    parsed: ParsedPrompt = parse_prompt(prompt)
    images = images or GivenImages()
    size = images.size(SIZE_MULTIPLE, size)
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
        images=images,
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
