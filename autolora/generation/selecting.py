"""Which adapters take part in a picture, at which strength, and why."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from autolora.errors import LoRAFormatError, PoolError, shown
from autolora.generation.identity import data_sha256
from autolora.generation.prompts import MAX_STRENGTH, AskedLoRA, add_triggers, has_phrase
from autolora.generation.report import UsedAdapter

if TYPE_CHECKING:
    from autolora.adapters import LoRA, Pool
    from autolora.adapters.metadata import Metadata
    from autolora.retrieval import Hit

MAX_TRIGGERS = 3
MAX_NOTES = 5


@dataclass
class Chosen:
    """An adapter that is going to take part.

    Attributes:
        lora: The adapter.
        strength: Its strength.
        why: Why it was taken.
        score: Score of the search; None where it was asked for by name.
        hit: What the search said; None where it was asked for by name.
        triggers: Trigger words of it that were added to the prompt.
    """

    lora: LoRA
    strength: float
    why: str
    score: float | None = None
    hit: Hit | None = None
    triggers: list[str] = field(default_factory=list)

    def to_report(self) -> UsedAdapter:
        """Return what the report says of it before the picture is made."""
        return UsedAdapter(
            name=self.lora.name,
            strength=self.strength,
            why=self.why,
            score=None if self.score is None else round(self.score, 4),
            sha256=self.lora.sha256,
            triggers=self.triggers,
            channels={}
            if self.hit is None
            else {name: round(value, 4) for name, value in self.hit.channels.items()},
            data_sha256="" if self.lora.path is None else data_sha256(self.lora.path),
        )


def load_asked(pool: Pool, asked: Iterable[AskedLoRA]) -> list[Chosen]:
    """Load adapters that were asked for by name.

    Raises:
        PoolError: No LoRA has such a name.
        LoRAFormatError: A file cannot be used.
    """
    chosen = []
    for entry in asked:
        lora = pool.load(entry.name)
        strength = preferred_strength(lora) if entry.strength is None else entry.strength
        chosen.append(Chosen(lora, strength, "asked for"))
    return chosen


def load_hits(pool: Pool, hits: Sequence[Hit], notes: list[str]) -> list[Chosen]:
    """Load adapters that the search found; one that cannot be used is left out with a note."""
    chosen = []
    for hit in hits:
        try:
            lora = pool.load(hit.name)
        except (PoolError, LoRAFormatError) as error:
            notes += left_out_notes({hit.name: str(error)}, pool.folder)
            continue
        chosen.append(Chosen(lora, preferred_strength(lora), hit.why, hit.score, hit))
    return chosen


def keep_fitting(
    chosen: Sequence[Chosen], shapes: Mapping[str, tuple[int, int]], notes: list[str]
) -> list[Chosen]:
    """Leave out retrieved adapters that are made for another base model.

    Raises:
        LoRAFormatError: One that was asked for does not fit.
    """
    fitting = []
    for entry in chosen:
        try:
            entry.lora.check_fits(shapes)
        except LoRAFormatError as error:
            if entry.hit is None:
                raise
            notes.append(f"Left out: {error}")
            continue
        fitting.append(entry)
    return fitting


def preferred_strength(lora: LoRA) -> float:
    """Return the strength that the adapter's author recommends, or 1."""
    return recommended_strength(lora.metadata)


def recommended_strength(metadata: Metadata) -> float:
    """Return the strength that an adapter's metadata recommends, or 1."""
    strength = metadata.preferred_strength
    if strength is None or strength == 0 or abs(strength) > MAX_STRENGTH:
        return 1.0
    bounds = metadata.strength_bounds
    if bounds is not None and bounds[0] <= bounds[1]:
        strength = min(max(strength, bounds[0]), bounds[1])
    return float(strength)


def with_triggers(prompt: str, chosen: Sequence[Chosen]) -> str:
    """Add the trigger words of adapters none of whose words the prompt has.

    An author's further words are alternatives more often than not, so the first few are enough.
    An adapter that is subtracted or turned off gets none: they would ask for what it is to take
    away. What was added is noted in each entry's ``triggers``.

    Returns:
        The prompt that the model reads.
    """
    text = prompt
    for entry in chosen:
        words = entry.lora.metadata.trigger_words
        entry.triggers = []
        if entry.strength > 0 and not any(has_phrase(text, word) for word in words):
            text, entry.triggers = add_triggers(text, words[:MAX_TRIGGERS])
    return text


def left_out_notes(left_out: Mapping[str, str], folder: Path) -> list[str]:
    """Say which files of the pool cannot be used, a few by name and the rest as a number.

    Args:
        left_out: Reason by name.
        folder: The pool. Its place is taken out of the reasons: notes go into pictures, and where
            files lie on somebody's disk is nobody else's business.
    """
    reasons = [reason.replace(f"{folder}{os.sep}", "") for reason in left_out.values()]
    notes = [f"Left out: {reason}" for reason in reasons[:MAX_NOTES]]
    more = len(left_out) - len(notes)
    if more > 0:
        notes.append(f"{more} more files were left out; `autolora pool check` lists them.")
    return [shown(note, 600) for note in notes]
