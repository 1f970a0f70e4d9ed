"""Sentences about how exactly adapters act, for the notes of a report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from autolora.errors import shown

if TYPE_CHECKING:
    from autolora.adapters import LoRA

ROUNDING_WORTH_SAYING = 0.05
"""Mean share of the adapters' change that merging may lose before a note says so."""

APPROXIMATION_WORTH_SAYING = 1e-4
"""Relative error of a layer up to which a low-rank form counts as the layer itself."""

_ENCODER_NAMES = {"clip": "CLIP", "t5": "T5"}


def approximation_notes(lora: LoRA, errors: Mapping[str, float]) -> list[str]:
    """Say which of an adapter's changes act approximately or not at all while it is not merged.

    Args:
        lora: The adapter.
        errors: Relative error of each layer that was approximated.
    """
    notes = []
    lossy = [error for error in errors.values() if error > APPROXIMATION_WORTH_SAYING]
    if lossy:
        mean, most = sum(lossy) / len(lossy), max(lossy)
        notes.append(
            f"{shown(lora.name)} is not low-rank in {len(lossy)} layers, which are approximated "
            f"(relative error {mean:.2g} on average, {most:.2g} at most); the strategy merged is "
            "exact."
        )
    merged_only = len(lora.norms) + len(lora.bias_layers)
    if merged_only:
        notes.append(
            f"{shown(lora.name)} also changes {merged_only} biases or normalization weights, which "
            "act with the strategy merged only."
        )
    return notes


def rounding_note(rounding: Mapping[str, float]) -> str | None:
    """Say how much of the adapters the rounding of merged weights lost, where it is worth it.

    Args:
        rounding: By layer, as `autolora.fusion.MergeReport` says.
    """
    mean = sum(rounding.values()) / len(rounding) if rounding else 0.0
    if mean < ROUNDING_WORTH_SAYING:
        return None
    return (
        f"Rounding the merged weights to the base model's storage is an error of {mean:.0%} of "
        "what the adapters add, on average over the layers; un-merged strategies add it exactly."
    )


def text_note(name: str, which: str, layers: int, fits: bool) -> str:
    """Say what became of an adapter's part for a text encoder."""
    encoder = _ENCODER_NAMES.get(which, which)
    if fits:
        return f"{shown(name)} also acts on the text encoder {encoder} ({layers} layers)."
    return f"This base model has no {encoder}; that part of {shown(name)} is left out."
