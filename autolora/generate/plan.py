"""Plans a picture: which adapters take part and why, and everything else that its report says.

All that can go wrong is checked here, so that only drawing is left. Notes tell the user what
quietly has no effect.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autolora.config import PipelineConfig, top_k_problem
from autolora.errors import GenerationError, LoRAFormatError, PoolError, shown
from autolora.generate.active_adapters import Attachments, Chosen
from autolora.generate.report import Report
from autolora.generate.reproduce import identify_base, program_versions
from autolora.generate.search import PoolSearch, in_english
from autolora.lora import Pool
from autolora.lora.metadata import recommended_strength
from autolora.prompt_syntax import add_triggers, has_phrase, parse_prompt
from autolora.request import GenerateRequest, Request, settle
from autolora.styles import PLAIN, Style
from autolora.unit import MAX_STRENGTH, LoRAUnit, check_steps, matching_layers, merge_units

if TYPE_CHECKING:
    from autolora.fusion import GateBank, Strategy
    from autolora.generate.relevance import Relevance
    from autolora.lora import LoRA
    from autolora.lora.pool import AdapterCache
    from autolora.retrieval import Hit

MAX_TRIGGERS = 3
MAX_NOTES = 5


Find = Callable[[str, int, Collection[str], str], "list[Hit]"]
"""Searches: words, how many at most, the names of what takes part anyway, the negative prompt."""

WHY = {
    "prompt": "asked for",
    "asked": "asked for",
    "pinned": "pinned",
    "style": "part of the style",
    "model": "part of the base model's configuration",
    "attached": "attached",
    "found": "found",
}
"""What a report says of why an adapter was taken, by where it came from."""


@dataclass(frozen=True)
class Pick:
    """An adapter that a picture is going to take, before its file is read.

    Attributes:
        unit: Its strength, steps and layers.
        source: Where it comes from: a key of `WHY`.
        hit: What the search said; None where it was not asked or did not find it.
    """

    unit: LoRAUnit
    source: str
    hit: Hit | None = None

    @property
    def why(self) -> str:
        """Why it is taken, as reports say it."""
        return self.hit.why if self.source == "found" and self.hit else WHY[self.source]


def pick(
    asked: GenerateRequest,
    text: str,
    tags: Iterable[LoRAUnit],
    style: Style,
    config: PipelineConfig,
    find: Find,
    source: str = "asked",
    resolve: Callable[[str], str] = str,
) -> list[Pick]:
    """Choose the adapters of a picture: for every face, while somebody types and when it is made.

    A prompt's tag wins over a LoRA that is named in the request, that over the style's units, and
    these over the base model's. What is turned off or dropped is not taken, nor found.

    Args:
        asked: The request.
        text: The prompt without tags.
        tags: What the tags ask for.
        style: The style in force.
        config: The base model's configuration.
        find: The search.
        source: Where adapters that are named in the request come from: a key of `WHY`.
        resolve: Gives the pool's name for a name that somebody wrote.

    Returns:
        First those that were named, then what was found, best first.

    Raises:
        GenerationError: The number of adapters is not possible.
    """
    top_k = config.top_k if asked.top_k is None else asked.top_k
    if problem := top_k_problem(top_k):
        raise GenerationError(problem.sentence(), where="top_k")
    named = {unit.name: (unit, source) for unit in _resolved(asked.loras, resolve)}
    named |= {unit.name: (unit, "prompt") for unit in _resolved(tags, resolve)}
    for units, origin in ((style.loras, "style"), (config.loras, "model")):
        for unit in _resolved(units, resolve):
            kept = unit if unit.name not in asked.drop else replace(unit, enabled=False)
            named.setdefault(unit.name, (kept, origin))
    picks = [Pick(_set(unit, asked), origin) for unit, origin in named.values() if unit.enabled]
    off = {*asked.drop, *(unit.name for unit, _ in named.values() if not unit.enabled)}
    off -= {entry.unit.name for entry in picks}
    room = top_k - len(picks)
    if asked.retrieve and style.retrieve and text and room > 0:
        # Dropping one leaves its words unanswered: it is found, and passed over.
        taken = [entry.unit.name for entry in picks]
        negative = ", ".join(filter(None, (asked.negative_prompt.strip(), style.negative_prompt)))
        hits = find(text, room + len(off), taken, negative)
        # Equally good ones in an order that does not depend on the last digits of their scores.
        hits = sorted(hits, key=lambda hit: (-round(hit.score, 3), hit.name))
        fresh = [hit for hit in hits if hit.name not in off][:room]
        picks += [Pick(_set(LoRAUnit(hit.name), asked), "found", hit) for hit in fresh]
    return picks


def _resolved(units: Iterable[LoRAUnit], resolve: Callable[[str], str]) -> Iterator[LoRAUnit]:
    """Units under the names of the pool; one with a file of its own is called what it is called."""
    for unit in units:
        name = unit.name if unit.path is not None else resolve(unit.name)
        yield unit if name == unit.name else replace(unit, name=name)


def _set(unit: LoRAUnit, asked: GenerateRequest) -> LoRAUnit:
    """A unit with the strength that was set for it, where one was."""
    if unit.name not in asked.strengths:
        return unit
    return replace(unit, strength=asked.strengths[unit.name])


def _has_file(unit: LoRAUnit) -> bool:
    """Tell whether a unit brings a file of its own.

    Raises:
        PoolError: It says so, and there is none.
    """
    if unit.path is not None and not unit.path.is_file():
        raise PoolError(f"There is no LoRA file {shown(unit.path)}; check the path.")
    return unit.path is not None


def load_pick(pool: Callable[[], Pool], cache: AdapterCache, entry: Pick) -> Chosen:
    """Load an adapter of the pool or from a file of its own.

    Raises:
        PoolError: No LoRA has such a name, or there is no such file.
        LoRAFormatError: The file cannot be used.
        GenerationError: A pattern matches none of its layers.
    """
    unit, hit = entry.unit, entry.hit
    if unit.path is not None and _has_file(unit):
        lora = cache.load(unit.path, unit.name, unit.family)
    else:
        lora = pool().load(unit.name, unit.family)
    strength = preferred_strength(lora) if unit.strength is None else unit.strength
    if unit.layers:
        lora = lora.only(matching_layers(unit, lora.layers))
    return Chosen(
        lora,
        strength,
        entry.why,
        None if hit is None else hit.score,
        hit,
        steps=unit.steps,
        text_encoder=unit.text_encoder,
        patterns=unit.layers,
    )


def keep_fitting(
    chosen: Sequence[Chosen], shapes: Mapping[str, tuple[int, ...]], notes: list[str]
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
        if entry.acting > 0 and not any(has_phrase(text, word) for word in words):
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
    """Say how the base model was loaded, and what of a request it ignores.

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
    metadata, strength = entry.lora.metadata, entry.strength
    bounds, preferred = metadata.strength_bounds, metadata.preferred_strength
    if preferred and strength == recommended_strength(metadata) != preferred:
        return (
            f"{shown(entry.lora.name)} acts at strength {strength:g}: the {preferred:g} that its "
            f"author recommends is {_outside(bounds)}."
        )
    if bounds is not None and bounds[0] <= bounds[1]:
        if bounds[0] <= strength <= bounds[1]:
            return None
        advice = f"its author recommends {bounds[0]:g} to {bounds[1]:g}"
    elif abs(strength) > STRONG:
        advice = f"pictures often fall apart beyond {STRONG:g}"
    else:
        return None
    return f"{shown(entry.lora.name)} acts at strength {strength:g}; {advice}."


def _outside(bounds: tuple[float, float] | None) -> str:
    if bounds is None:
        return f"beyond {MAX_STRENGTH:g}"
    return f"outside the bounds that they give, {bounds[0]:g} to {bounds[1]:g}"


def _two_passes(base: Any, request: Request) -> bool:
    scale = request.true_cfg if base.family.embeds_guidance(base) else request.guidance
    return scale != 1.0


class Planner:
    """Plans pictures. What it asks for is made when it is first needed.

    Args:
        config: The base model's configuration.
        pool: Gives the LoRA files.
        cache: Gives the adapters that are kept ready.
        base: Gives the DiffSynth pipeline.
        gates: Gives trained gates, or None.
        search: Gives the search.
        attachments: What stays attached from call to call.
    """

    def __init__(
        self,
        config: PipelineConfig,
        pool: Callable[[], Pool],
        cache: Callable[[], AdapterCache],
        base: Callable[[], Any],
        gates: Callable[[], GateBank | None],
        search: Callable[[], PoolSearch],
        attachments: Attachments,
    ) -> None:
        self._config = config
        self._pool, self._cache, self._base = pool, cache, base
        self._gates, self._search = gates, search
        self._attachments = attachments
        self._relevance: Relevance | None = None

    def plan(
        self,
        asked: GenerateRequest,
        style: Style = PLAIN,
        picks: Sequence[Pick] | None = None,
    ) -> Plan:
        """Plan a picture.

        Args:
            asked: The request.
            style: The style in force.
            picks: The adapters, where they have been chosen; None chooses them.

        Raises:
            AutoLoRAError: Something that was asked for is not possible.
        """
        from autolora.fusion import get_strategy, layer_shapes

        words = parse_prompt(asked.prompt)
        request = settle(self._config, style.apply(asked))
        check_steps((*style.loras, *self._config.loras), request.steps)
        standing = self._attachments
        usual = standing.strategy if standing.chosen else self._config.strategy
        wanted = (asked.strategy, style.strategy, usual)
        name = next(strategy for strategy in wanted if strategy is not None)
        strategy = get_strategy(name)
        uses_gates = strategy.uses_gates
        notes: list[str] = []
        clock = Clock()
        english = in_english(self._config, request.prompt, notes)
        if picks is None:
            picks = pick(
                asked,
                words.text,
                words.loras,
                style,
                self._config,
                self._find(notes),
                resolve=self._resolve,
            )
        chosen = self._load(picks, notes)
        if standing.chosen:
            names = {entry.lora.name for entry in chosen}
            chosen = [e for e in standing.chosen if e.lora.name not in names] + chosen
        clock.mark("retrieve")
        base = self._base()
        chosen = keep_fitting(chosen, layer_shapes(base.family.model(base)), notes)
        gated = bool(chosen) and uses_gates and self._gates() is not None
        if chosen and uses_gates and not gated and not strategy.chooses:
            notes.append("There are no trained gates for this base model; the adapters are summed.")
        if strategy.chooses:
            sources = {entry.unit.name: entry.source for entry in picks}
            chosen = self._judge(strategy, request.prompt, chosen, sources, asked.strategy)
        clock.mark("load")
        text = with_triggers(english, chosen) if asked.use_triggers else english
        if not text:
            raise GenerationError("The prompt has nothing but LoRA tags; add a few words to it.")
        notes += [*request.notes, *base_notes(base, request, chosen, text)]
        report = plan_report(request, text, self._config, name, chosen, notes, asked.text_encoders)
        return Plan(request, chosen, report, gated, clock)

    def _judge(
        self,
        strategy: Strategy,
        prompt: str,
        chosen: Sequence[Chosen],
        sources: Mapping[str, str],
        explicit: str | None,
    ) -> list[Chosen]:
        """Let a strategy silence what the prompt does not ask for.

        What was found may be silenced. What a person named in the call may be only where the call
        also chose the strategy; tags, pins and the LoRAs of a style or a configuration never.
        """
        from autolora.generate.relevance import judge, relevance_of

        judged = []
        for entry in chosen:
            source = sources.get(entry.lora.name, "attached")
            fixed = source in ("prompt", "pinned", "style", "model")
            free = source == "found" or (explicit is not None and not fixed)
            judged.append(replace(entry, optional=entry.optional or free))
        if not any(entry.optional for entry in judged):
            return judged
        if self._relevance is None:
            self._relevance = relevance_of(self._base(), self._config)
        return judge(self._relevance, strategy, prompt, judged)

    def choose(self, asked: GenerateRequest, style: Style = PLAIN) -> list[Hit]:
        """Search for adapters beside those that are named, in the order in which they are taken."""
        words = parse_prompt(asked.prompt)
        picks = pick(
            asked,
            words.text,
            words.loras,
            style,
            self._config,
            self._search().choose,
            resolve=self._resolve,
        )
        return [entry.hit for entry in picks if entry.hit is not None]

    def check(self, asked: GenerateRequest, style: Style = PLAIN) -> None:
        """Find what is wrong with a request before anything slow begins.

        Raises:
            AutoLoRAError: Something that was asked for is not possible.
        """
        request = settle(self._config, style.apply(asked))
        check_steps((*style.loras, *self._config.loras), request.steps)
        for unit in merge_units(asked.loras, request.tags):
            if unit.enabled and not _has_file(unit):
                self._pool().entry(unit.name)

    def _resolve(self, name: str) -> str:
        """The pool's name for one that somebody wrote; without a pool it stays."""
        try:
            return self._pool().resolve(name)
        except PoolError:
            return name

    def _find(self, notes: list[str]) -> Find:
        """The search, which also notes what it left out; nothing while adapters stay attached."""

        def find(text: str, k: int, taken: Collection[str], negative: str) -> list[Hit]:
            if self._attachments.chosen:
                return []
            hits = self._search().choose(text, k, taken, negative)
            notes.extend(left_out_notes(self._search().open().report.left_out, self._pool().folder))
            return hits

        return find

    def _load(self, picks: Sequence[Pick], notes: list[str]) -> list[Chosen]:
        """Load adapters; one that the search or a style brings and cannot be used is left out."""
        chosen = []
        for entry in picks:
            try:
                chosen.append(load_pick(self._pool, self._cache(), entry))
            except (PoolError, LoRAFormatError) as error:
                if entry.source not in ("found", "style"):
                    raise
                notes += left_out_notes({entry.unit.name: str(error)}, self._config.pool)
        return chosen
