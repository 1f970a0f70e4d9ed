"""A prompt in, a picture and a report out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autolora.adapters import Pool
from autolora.errors import GenerationError
from autolora.flux.config import PipelineConfig, load_config
from autolora.flux.layers import linear_layers
from autolora.generation.prompts import AskedLoRA, merge_asked, parse_prompt
from autolora.generation.report import Output, Report
from autolora.generation.request import Request, asked_loras, make_request
from autolora.generation.searching import IndexState, PoolSearch
from autolora.generation.selecting import (
    Chosen,
    keep_fitting,
    left_out_notes,
    load_asked,
    load_hits,
    with_triggers,
)
from autolora.generation.versions import program_versions

if TYPE_CHECKING:
    from autolora.adapters import LoRA
    from autolora.fusion import AttachReport, GateBank
    from autolora.retrieval import Hit

Progress = Callable[[int, int], None]
"""Called with what is done and what there is in all."""


class AutoLoRAPipeline:
    """Finds adapters for a prompt, fuses them into the base model and generates.

    The pool, the search index and the base model are loaded when they are first needed; a search
    in an index that is up to date needs no base model. Calls from several threads take turns.
    """

    def __init__(self, config: PipelineConfig) -> None:
        """Make a pipeline; nothing is loaded yet.

        Args:
            config: The base model with its pool, index and defaults.
        """
        self.config = config
        self._lock = threading.RLock()
        self._attached: list[Chosen] = []
        self._attached_strategy = config.strategy

    @classmethod
    def from_config(
        cls, source: str | Path | PipelineConfig = "tiny", pool: str | Path | None = None
    ) -> AutoLoRAPipeline:
        """Make a pipeline from a configuration.

        Args:
            source: Name of a shipped configuration, path of a YAML file, or a configuration.
            pool: Folder of LoRAs to use in place of the configured one; its index is written
                beside the configured index.

        Raises:
            ConfigError: There is no such configuration, or something in it is wrong.
        """
        config = source if isinstance(source, PipelineConfig) else load_config(source)
        return cls(config if pool is None else config.with_pool(Path(pool)))

    @cached_property
    def pool(self) -> Pool:
        """The LoRA files."""
        return Pool(self.config.pool)

    @cached_property
    def base(self) -> Any:
        """The DiffSynth pipeline of the base model; loading it takes seconds."""
        from autolora.flux.loading import load_pipeline

        return load_pipeline(self.config)

    @cached_property
    def gates(self) -> GateBank | None:
        """Trained gates; None where there are none, so that adapters are summed."""
        from autolora.fusion import load_gates

        path = self.config.gate or shipped_gate(self.config)
        return None if path is None else load_gates(path)

    @cached_property
    def _search(self) -> PoolSearch:
        return PoolSearch(self.config, self.pool, lambda: self.base)

    def search(self, prompt: str, k: int = 5) -> list[Hit]:
        """Rank the pool for a prompt.

        Args:
            prompt: What is wanted; tags in it count as words.
            k: How many hits at most.

        Returns:
            Hits with name, score in [0, 1] and reason, best first.

        Raises:
            AutoLoRAError: An empty prompt, or a pool or index that cannot be used.
        """
        parsed = parse_prompt(prompt)
        words = parsed.text or " ".join(lora.name for lora in parsed.loras)
        with self._lock:
            return self._search.search(words, k)

    def choose(self, prompt: str, k: int | None = None) -> list[Hit]:
        """Choose the adapters that a call with this prompt would retrieve.

        Args:
            prompt: What is wanted; adapters that its tags ask for are not chosen again.
            k: Most adapters in all; None is the configured number.

        Returns:
            Hits that cover the prompt; empty where nothing fits.

        Raises:
            AutoLoRAError: An empty prompt, or a pool or index that cannot be used.
        """
        request = make_request(self.config, prompt, top_k=k)
        with self._lock:
            return self._retrieve(request, [lora.name for lora in request.tags])

    def index(self, rebuild: bool = False, progress: Progress | None = None) -> IndexState:
        """Build the search index or bring it up to date.

        Args:
            rebuild: Encode every file again.
            progress: Called with files done and files in all.

        Returns:
            The index, and in ``report`` what was done and which files were left out.

        Raises:
            AutoLoRAError: The pool is missing or empty, or the index cannot be written.
        """
        with self._lock:
            return self._search.refresh(rebuild, progress)

    def open_index(self, progress: Progress | None = None) -> IndexState:
        """Make sure that the search index is there and knows the pool's files.

        Args:
            progress: Called with files done and files in all, where there is something to do.

        Returns:
            As for `index`.

        Raises:
            AutoLoRAError: As for `index`.
        """
        with self._lock:
            return self._search.open(progress)

    def attach(
        self, adapters: Sequence[tuple[str | LoRA, float]], strategy: str | None = None
    ) -> AttachReport:
        """Attach adapters until `detach`; calls then use them and retrieve nothing.

        Args:
            adapters: Pairs of strength and name in the pool, or adapter, in the order
                ``(name, strength)``. They replace what was attached before.
            strategy: How they are fused; None is the configured one.

        Returns:
            Which layers each one was put into.

        Raises:
            AutoLoRAError: An unknown name, or an adapter or gates that do not fit the base model;
                what was attached before then stays.
        """
        from autolora.fusion import attach

        with self._lock:
            loras = [
                self.pool.load(lora) if isinstance(lora, str) else lora for lora, _ in adapters
            ]
            chosen = [
                Chosen(lora, strength, "attached")
                for lora, (_, strength) in zip(loras, adapters, strict=True)
            ]
            keep_fitting(chosen, linear_layers(self.base.dit), [])
            name = strategy or self.config.strategy
            report = attach(self.base.dit, _pairs(chosen), name, self.gates)
            self._attached, self._attached_strategy = chosen, name
            return report

    def detach(self) -> None:
        """Take all adapters out; the base model is then as it was loaded, to the bit."""
        from autolora.fusion import detach

        with self._lock:
            self._attached = []
            if "base" in self.__dict__:
                detach(self.base.dit)

    def __call__(
        self,
        prompt: str,
        seed: int = 0,
        *,
        loras: Sequence[str | tuple[str, float] | AskedLoRA] = (),
        retrieve: bool = True,
        top_k: int | None = None,
        strategy: str | None = None,
        steps: int | None = None,
        size: tuple[int, int] | None = None,
        guidance: float | None = None,
        negative_prompt: str = "",
        use_triggers: bool = True,
        planned: Callable[[Report], None] | None = None,
        progress: Progress | None = None,
    ) -> Output:
        """Generate a picture.

        What the prompt's ``<lora:name:0.8>`` tags and `loras` ask for is taken as asked, and
        retrieval fills the rest. While adapters are attached by `attach`, those stay in force
        beside what is asked for, and nothing is retrieved. The attachments are afterwards as they
        were before, also after an error.

        Args:
            prompt: What the picture shall show.
            seed: Seed of the noise.
            loras: Names in the pool, alone or with a strength; a tag of the same name wins.
            retrieve: Whether to search the pool at all.
            top_k: Most adapters in all; None, like the following, is the configured value.
            strategy: How they are fused.
            steps: Denoising steps.
            size: Width and height in pixels.
            guidance: Guidance scale.
            negative_prompt: What the picture shall not show.
            use_triggers: Whether to add missing trigger words to the prompt.
            planned: Called once before the first step, with all of the report but how it went.
            progress: Called with steps done and steps in all; what it raises ends the call.

        Returns:
            Picture, hits, the prompt that the model read, and the report.

        Raises:
            AutoLoRAError: Something that was asked for is not possible.
        """
        request = make_request(
            self.config,
            prompt,
            seed=seed,
            steps=steps,
            size=size,
            guidance=guidance,
            negative_prompt=negative_prompt,
            top_k=top_k,
        )
        asked = merge_asked(asked_loras(loras), request.tags)
        with self._lock:
            plan = self._plan(request, asked, retrieve, strategy, use_triggers)
            if planned is not None:
                planned(plan.report)
            return self._generate(plan, progress)

    def _generate(self, plan: _Plan, progress: Progress | None) -> Output:
        from autolora.fusion import attached, record_gates
        from autolora.generation.denoise import denoise

        dit, report, clock = self.base.dit, plan.report, plan.clock
        with attached(dit, _pairs(plan.chosen), report.strategy, self.gates) as attachment:
            clock.mark("attach")
            with record_gates(dit) if plan.gated else nullcontext() as records:
                image, parts = denoise(self.base, plan.request, report.used_prompt, progress)
            gates = records.by_adapter() if records is not None else {}
        layers = {entry.name: len(entry.layers) for entry in attachment.adapters}
        for used in report.adapters:
            used.layers, used.gate = layers[used.name], gates.get(used.name)
        report.timings = {**clock.seconds, **vars(parts), "total": clock.total()}
        hits = [entry.hit for entry in plan.chosen if entry.hit is not None]
        return Output(image, hits, report.used_prompt, report)

    def _plan(
        self,
        request: Request,
        asked: list[AskedLoRA],
        retrieve: bool,
        strategy: str | None,
        use_triggers: bool,
    ) -> _Plan:
        """Choose and check everything, so that only the picture is left to be made."""
        from autolora.fusion import get_strategy

        name = strategy or (self._attached_strategy if self._attached else self.config.strategy)
        uses_gates = get_strategy(name).uses_gates
        notes: list[str] = []
        clock = _Clock()
        chosen = self._select(request, asked, retrieve, notes)
        clock.mark("retrieve")
        chosen = keep_fitting(chosen, linear_layers(self.base.dit), notes)
        gated = bool(chosen) and uses_gates and self.gates is not None
        if chosen and uses_gates and not gated:
            notes.append("There are no trained gates for this base model; the adapters are summed.")
        clock.mark("load")
        prompt = with_triggers(request.prompt, chosen) if use_triggers else request.prompt
        if not prompt:
            raise GenerationError("The prompt has nothing but LoRA tags; add a few words to it.")
        report = _report(request, prompt, self.config.name, name)
        report.adapters = [entry.to_report() for entry in chosen]
        report.notes = notes
        return _Plan(request, chosen, report, gated, clock)

    def _select(
        self, request: Request, asked: list[AskedLoRA], retrieve: bool, notes: list[str]
    ) -> list[Chosen]:
        """Adapters in the order attached, asked for, retrieved."""
        named = load_asked(self.pool, asked) if asked else []
        names = {entry.lora.name for entry in named}
        standing = [entry for entry in self._attached if entry.lora.name not in names]
        if self._attached or not retrieve or len(named) >= request.top_k:
            return standing + named
        hits = self._retrieve(request, [entry.lora.name for entry in named])
        notes += left_out_notes(self._search.open().report.left_out)
        return named + load_hits(self.pool, hits, notes)

    def _retrieve(self, request: Request, taken: Sequence[str]) -> list[Hit]:
        if not request.prompt:
            return []
        hits = self._search.choose(request.prompt, request.top_k - len(taken), taken)
        # Equally good ones in an order that does not hang on the last digits of their scores.
        return sorted(hits, key=lambda hit: (-round(hit.score, 3), hit.name))


class _Clock:
    """Seconds between marks."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def mark(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self.last = now - self.last, now

    def total(self) -> float:
        return time.perf_counter() - self.start


@dataclass
class _Plan:
    """A picture that is ready to be made."""

    request: Request
    chosen: list[Chosen]
    report: Report
    gated: bool
    clock: _Clock


def shipped_gate(config: PipelineConfig) -> Path | None:
    """The gates that the package ships for its own base model, where it does."""
    path = Path(__file__).parent / "flux" / "tiny" / "weights" / "gate.safetensors"
    return path if config.uses_shipped_weights and path.is_file() else None


def _pairs(chosen: Sequence[Chosen]) -> list[tuple[LoRA, float]]:
    """Pairs to attach, by name, so that the order of asking cannot change a picture's bytes."""
    ordered = sorted(chosen, key=lambda entry: entry.lora.name)
    return [(entry.lora, entry.strength) for entry in ordered]


def _report(request: Request, used_prompt: str, model: str, strategy: str) -> Report:
    return Report(
        prompt=request.typed,
        used_prompt=used_prompt,
        negative_prompt=request.negative_prompt,
        model=model,
        strategy=strategy,
        seed=request.seed,
        steps=request.steps,
        width=request.width,
        height=request.height,
        guidance=request.guidance,
        sigma_shift=request.sigma_shift,
        versions=program_versions(),
    )
