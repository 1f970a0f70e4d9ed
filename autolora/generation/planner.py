"""Chooses and checks everything for a picture, so that only the drawing is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from autolora.adapters import Pool
from autolora.errors import GenerationError
from autolora.flux.config import PipelineConfig
from autolora.flux.layers import linear_layers
from autolora.generation.advising import base_notes
from autolora.generation.applying import Attachments
from autolora.generation.planning import Clock, Plan, plan_report
from autolora.generation.prompts import AskedLoRA, merge_asked
from autolora.generation.request import Request, asked_loras, make_request
from autolora.generation.searching import PoolSearch
from autolora.generation.selecting import (
    Chosen,
    keep_fitting,
    left_out_notes,
    load_asked,
    load_hits,
    with_triggers,
)

if TYPE_CHECKING:
    from autolora.fusion import GateBank
    from autolora.retrieval import Hit


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
        from autolora.fusion import get_strategy

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
        chosen = keep_fitting(chosen, linear_layers(base.dit), notes)
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
