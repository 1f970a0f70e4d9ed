"""Chooses and checks everything for a picture, so that only the drawing is left.

Which adapters take part in a picture, at which strength, and why.

A picture that is planned: what takes part, and what the report says before it is made.

What a user should know of a picture before it is made: things that quietly have no effect.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autolora.config import PipelineConfig
from autolora.errors import GenerationError, LoRAFormatError, PoolError, shown
from autolora.generate.active_adapters import Attachments, Chosen
from autolora.generate.report import Report
from autolora.generate.reproduce import identify_base, program_versions
from autolora.generate.search import PoolSearch
from autolora.lora import Pool
from autolora.lora.metadata import recommended_strength
from autolora.request import (
    AskedLoRA,
    Request,
    add_triggers,
    asked_loras,
    has_phrase,
    make_request,
    merge_asked,
)

if TYPE_CHECKING:
    from autolora.fusion import GateBank
    from autolora.lora import LoRA
    from autolora.retrieval import Hit

MAX_TRIGGERS = 3
MAX_NOTES = 5


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
        images=request.images.facts(),
    )


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
        embedded = base.family.embeds_guidance(base)
        key = "true_cfg in the configuration" if embedded else "guidance"
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
    scale = request.true_cfg if base.family.embeds_guidance(base) else request.guidance
    return scale != 1.0


class Planner:
    """Plans pictures. What it asks for is made when it is first needed.

    Args:
        config: The base model's configuration.
        pool: Gives the LoRA files.
        base: Gives the DiffSynth pipeline.
        gates: Gives trained gates, or None.
        search: Gives the search.
        attachments: What stays attached from call to call.
    """

    def __init__(
        self,
        config: PipelineConfig,
        pool: Callable[[], Pool],
        base: Callable[[], Any],
        gates: Callable[[], GateBank | None],
        search: Callable[[], PoolSearch],
        attachments: Attachments,
    ) -> None:
        self._config = config
        self._pool, self._base, self._gates, self._search = pool, base, gates, search
        self._attachments = attachments

    def plan(
        self,
        prompt: str,
        seed: int,
        *,
        loras: Sequence[str | tuple[str, float] | AskedLoRA] = (),
        retrieve: bool = True,
        strategy: str | None = None,
        use_triggers: bool = True,
        text_encoders: bool | None = None,
        **wanted: Any,
    ) -> Plan:
        """Plan a picture.

        Args:
            prompt: As typed.
            seed: Seed of the noise.
            loras: What is asked for beside the prompt's tags.
            retrieve: Whether to search the pool.
            strategy: How adapters are fused; None is the configured way.
            use_triggers: Whether to add missing trigger words to the prompt.
            text_encoders: Whether adapters act on text encoders; None is the configured choice.
            **wanted: The further arguments of `make_request`.

        Raises:
            AutoLoRAError: Something that was asked for is not possible.
        """
        from autolora.fusion import get_strategy, linear_shapes

        request = make_request(self._config, prompt, seed=seed, **wanted)
        asked = merge_asked(asked_loras(loras), request.tags)
        standing = self._attachments
        usual = standing.strategy if standing.chosen else self._config.strategy
        name = usual if strategy is None else strategy
        uses_gates = get_strategy(name).uses_gates
        notes: list[str] = []
        clock = Clock()
        chosen = self._select(request, asked, retrieve, notes)
        clock.mark("retrieve")
        base = self._base()
        chosen = keep_fitting(chosen, linear_shapes(base.family.model(base)), notes)
        gated = bool(chosen) and uses_gates and self._gates() is not None
        if chosen and uses_gates and not gated:
            notes.append("There are no trained gates for this base model; the adapters are summed.")
        clock.mark("load")
        text = with_triggers(request.prompt, chosen) if use_triggers else request.prompt
        if not text:
            raise GenerationError("The prompt has nothing but LoRA tags; add a few words to it.")
        notes += [*request.notes, *base_notes(base, request, chosen, text)]
        report = plan_report(request, text, self._config, name, chosen, notes, text_encoders)
        return Plan(request, chosen, report, gated, clock)

    def retrieve(self, request: Request, taken: Sequence[str]) -> list[Hit]:
        """Choose adapters for a prompt beside those that are taken anyway."""
        if not request.prompt:
            return []
        hits = self._search().choose(request.prompt, request.top_k - len(taken), taken)
        # Equally good ones in an order that does not hang on the last digits of their scores.
        return sorted(hits, key=lambda hit: (-round(hit.score, 3), hit.name))

    def _select(
        self, request: Request, asked: list[AskedLoRA], retrieve: bool, notes: list[str]
    ) -> list[Chosen]:
        """Adapters in the order attached, asked for, retrieved."""
        # The pool is only opened where something is taken from it.
        named = load_asked(self._pool(), asked) if asked else []
        names = {entry.lora.name for entry in named}
        attached = self._attachments.chosen
        standing = [entry for entry in attached if entry.lora.name not in names]
        if attached or not retrieve or len(named) >= request.top_k:
            return standing + named
        hits = self.retrieve(request, [entry.lora.name for entry in named])
        notes += left_out_notes(self._search().open().report.left_out, self._pool().folder)
        return named + load_hits(self._pool(), hits, notes)
