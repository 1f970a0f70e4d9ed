"""What a user should know of a picture before it is made: things that quietly have no effect."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from autolora.errors import shown

if TYPE_CHECKING:
    from autolora.generation.request import Request
    from autolora.generation.selecting import Chosen

STRONG = 2.0
"""Strength above which pictures often fall apart; sliders of other programs end here."""

_MADE_FOR = {
    # Civitai writes "Flux.1 S", modelspec "flux-1-schnell/lora", the hubs the repository's name.
    "schnell": re.compile(r"schnell|flux[ ._-]*1[ ._-]*s\b", re.IGNORECASE),
    "dev": re.compile(r"(?<![a-z])dev(?![a-z])|flux[ ._-]*1[ ._-]*d\b|krea|kontext", re.IGNORECASE),
}


def made_for(base_model: str) -> str | None:
    """Tell which variant of FLUX.1 an adapter was trained on.

    Args:
        base_model: What its metadata say.

    Returns:
        ``dev``, ``schnell``, or None where that is not said.
    """
    found = [variant for variant, pattern in _MADE_FOR.items() if pattern.search(base_model)]
    return found[0] if len(found) == 1 else None


def base_notes(base: Any, request: Request, chosen: Sequence[Chosen], prompt: str) -> list[str]:
    """Say how the base model was loaded, and what of a request it does not heed.

    Args:
        base: The DiffSynth pipeline.
        request: The request.
        chosen: The adapters that take part.
        prompt: What the model is going to read.

    Returns:
        One sentence each.
    """
    notes = [*getattr(base, "notes", ())]
    variant = getattr(base, "variant", None)
    for entry in chosen:
        other = made_for(entry.lora.metadata.base_model)
        if variant is not None and other not in (None, variant):
            notes.append(
                f"{shown(entry.lora.name)} was made for FLUX.1 {other} "
                f"({shown(entry.lora.metadata.base_model, 60)}), and this base model is a "
                f"{variant} model: expect it to act weaker or differently."
            )
        if note := _strength_note(entry):
            notes.append(note)
    if request.negative_prompt and not _two_passes(base, request):
        key = "guidance" if base.dit.guidance_embedder is None else "true_cfg in the configuration"
        notes.append(f"The negative prompt has no effect: it needs {key} other than 1.")
    length = getattr(base, "text_length", None)
    if length is not None and len(base.tokenizer_2(prompt).input_ids) > length:
        notes.append(f"The prompt is longer than {length} tokens; the rest of it is not read.")
    return notes


def _strength_note(entry: Chosen) -> str | None:
    """Say that an adapter acts more strongly, or weakly, than it is meant to."""
    bounds, strength = entry.lora.metadata.strength_bounds, entry.strength
    if bounds is not None and bounds[0] <= bounds[1]:
        if bounds[0] <= strength <= bounds[1]:
            return None
        advice = f"its author recommends {bounds[0]:g} to {bounds[1]:g}"
    elif abs(strength) > STRONG:
        advice = f"pictures often fall apart beyond {STRONG:g}"
    else:
        return None
    return f"{shown(entry.lora.name)} acts at strength {strength:g}; {advice}."


def _two_passes(base: Any, request: Request) -> bool:
    scale = request.guidance if base.dit.guidance_embedder is None else request.true_cfg
    return scale != 1.0
