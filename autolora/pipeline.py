"""A prompt in, a picture and a report out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autolora.config import PipelineConfig, load_config
from autolora.files import follow_links
from autolora.generate.active_adapters import Attachments, Chosen, by_step
from autolora.generate.plan import Pick, Plan, Planner, keep_fitting, load_pick
from autolora.generate.report import Output, Report
from autolora.generate.reproduce import shipped_gate
from autolora.generate.search import IndexState, PoolSearch
from autolora.lora import Pool
from autolora.lora.pool import AdapterCache
from autolora.prompt_syntax import parse_prompt
from autolora.request import GenerateRequest, check_batch, check_seed, read_request
from autolora.styles import Style, Styles, own_styles, shipped_styles
from autolora.unit import LoRAUnit, read_units

if TYPE_CHECKING:
    from torch import nn

    from autolora.fusion import AttachReport, GateBank
    from autolora.generate.sample import Preview
    from autolora.lora import LoRA
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
        self._attachments = Attachments(
            config, lambda: self.base, lambda: self.gates, lambda: self.cache
        )
        self._planner = Planner(
            config,
            lambda: self.pool,
            lambda: self.cache,
            lambda: self.base,
            lambda: self.gates,
            lambda: self._search,
            self._attachments,
        )

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
        follow_links(self.config.follow_links)
        pool = Pool(self.config.pool)
        pool.cache = self.cache
        return pool

    @cached_property
    def cache(self) -> AdapterCache:
        """The adapters that are kept ready."""
        return AdapterCache(int(self.config.adapters.cache_gb * 2**30))

    @cached_property
    def styles(self) -> Styles:
        """The styles that a request may name."""
        return Styles([shipped_styles()], own_styles(), files=True)

    @cached_property
    def base(self) -> Any:
        """The DiffSynth pipeline of the base model; loading it takes seconds."""
        from autolora.families.load import load_pipeline

        return load_pipeline(self.config)

    @property
    def _denoiser(self) -> nn.Module:
        model: nn.Module = self.base.family.model(self.base)
        return model

    @cached_property
    def gates(self) -> GateBank | None:
        """Trained gates; None without any, so that adapters are summed."""
        from autolora.fusion import load_gates

        path = self.config.gate or shipped_gate(self.config)
        return None if path is None else load_gates(path)

    @cached_property
    def _search(self) -> PoolSearch:
        return PoolSearch(self.config, self.pool, self._attachments.bare_base)

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

    def choose(self, prompt: str, k: int | None = None, negative_prompt: str = "") -> list[Hit]:
        """Choose the adapters that a call with this prompt would retrieve.

        Args:
            prompt: What is wanted; adapters that its tags ask for are not chosen again.
            k: Most adapters in all; None is the configured number.
            negative_prompt: What the picture shall not show; it is never chosen.

        Returns:
            Hits that cover the prompt; empty where nothing fits.

        Raises:
            AutoLoRAError: An empty prompt, or a pool or index that cannot be used.
        """
        asked = read_request({"prompt": prompt, "top_k": k, "negative_prompt": negative_prompt})
        with self._lock:
            return self._planner.choose(asked)

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
        self,
        adapters: Sequence[tuple[str | Path | LoRA, float] | LoRAUnit | str],
        strategy: str | None = None,
    ) -> AttachReport:
        """Attach adapters until `detach`; calls then use them and retrieve nothing.

        Layers that keep their adapters are not touched, so that going from one set to another
        costs what differs.

        Args:
            adapters: Pairs ``(adapter, strength)``, the adapter by its name in the pool, by the
                path of its file, or as a `LoRA`; or LoRA units. They replace what was attached
                before.
            strategy: How they are fused; None is the configured one. ``merged`` changes the weights
                themselves until `detach`, which restores them to the bit; ``autolora``, where it is
                named here, silences in every picture those that the prompt does not ask for.

        Returns:
            Which layers each one was put into.

        Raises:
            AutoLoRAError: An unknown name, or an adapter or gates that do not fit the base model;
                what was attached before then stays.
        """
        from autolora.fusion import layer_shapes

        with self._lock:
            chosen = [self._to_attach(entry) for entry in adapters]
            keep_fitting(chosen, layer_shapes(self._denoiser), [])
            for entry in chosen:
                entry.optional = strategy is not None
            return self._attachments.attach(chosen, strategy or self.config.strategy)

    def _to_attach(self, entry: tuple[str | Path | LoRA, float] | LoRAUnit | str) -> Chosen:
        if isinstance(entry, tuple) and not isinstance(entry[0], (str, Path)):
            return Chosen(entry[0], entry[1], "attached")
        (unit,) = read_units([entry])
        return load_pick(lambda: self.pool, self.cache, Pick(unit, "attached"))

    def set_strengths(self, strengths: Mapping[str, float]) -> None:
        """Change how strongly attached adapters act; the others keep their strength.

        Args:
            strengths: Strength by name.

        Raises:
            FusionError: A name is not attached, or a strength is not a finite number; nothing is
                changed then.
        """
        with self._lock:
            self._attachments.set_strengths(strengths)

    @property
    def attached(self) -> dict[str, float]:
        """Strength by name of the adapters that `attach` attached, in the order of asking."""
        return self._attachments.strengths

    def detach(self, name: str | None = None) -> None:
        """Take one adapter out, or all; the base model is then as it was loaded, to the bit.

        Args:
            name: The adapter; the others stay as they are. None is all.

        Raises:
            FusionError: No adapter of this name is attached.
        """
        with self._lock:
            if name is not None:
                self._attachments.detach(name)
            else:
                self._attachments.clear(self._denoiser if "base" in self.__dict__ else None)

    def __call__(
        self,
        prompt: str | GenerateRequest,
        seed: int = 0,
        *,
        planned: Callable[[Report], None] | None = None,
        progress: Progress | None = None,
        preview: Preview | None = None,
        preview_every: int = 1,
        **fields: Any,
    ) -> Output:
        """Generate a picture.

        What the prompt's ``<lora:name:0.8>`` tags and `loras` ask for is taken as asked, and
        retrieval fills the rest. While adapters are attached by `attach`, those stay in force
        beside what is asked for, and nothing is retrieved. The attachments are afterwards as they
        were before, also after an error.

        Args:
            prompt: What the picture should show, or a whole request.
            seed: Seed of the noise.
            planned: Called once before the first step, with all of the report but how it went.
            progress: Called with steps done and steps in all; what it raises ends the call.
            preview: Called with steps done and the model's guess of the finished picture; what
                it raises ends the call.
            preview_every: Steps from one preview to the next.
            **fields: Fields of `autolora.request.GenerateRequest`, such as ``loras``, ``steps`` or
                ``size=(width, height)``.

        Returns:
            Picture, hits, the prompt that the model read, and the report.

        Raises:
            AutoLoRAError: Something that was asked for is not possible.
        """
        seed = prompt.seed if isinstance(prompt, GenerateRequest) else seed
        watching: dict[str, Any] = {"progress": progress, "preview": preview, "planned": planned}
        return self.generate_many(
            prompt, [seed], **watching, preview_every=preview_every, **fields
        )[0]

    def generate_many(
        self,
        prompt: str | GenerateRequest,
        seeds: Sequence[int],
        *,
        batch: int = 1,
        drawn: Callable[[Output], None] | None = None,
        planned: Callable[[Report], None] | None = None,
        progress: Progress | None = None,
        preview: Preview | None = None,
        preview_every: int = 1,
        picks: Sequence[Pick] | None = None,
        **fields: Any,
    ) -> list[Output]:
        """Generate several pictures that differ in their seeds only.

        The pool is searched, adapters are attached and the prompt is read once.

        Args:
            prompt: What the pictures should show, or a whole request.
            seeds: Seeds of the noises.
            batch: Pictures to draw at once. With 1 every picture is the same to the byte as one
                that is drawn alone; with more, single pixels may differ by a grey level, and each
                report names the seeds of its batch.
            drawn: Given every picture as soon as it is there, in the order of the seeds; what it
                raises ends the call.
            planned: Called once before the first step, with the first picture's report.
            progress: Called with steps done and steps in all, over all pictures.
            preview: As for a call; of a batch the first picture is shown.
            preview_every: Steps from one preview to the next.
            picks: The adapters, where they have been chosen already.
            **fields: As for a call.

        Returns:
            One output per seed, in their order; none where `drawn` was given them.

        Raises:
            AutoLoRAError: Something that was asked for is not possible.
        """
        if not seeds:
            return []
        check_batch(batch)
        asked = self._asked(prompt, fields).changed(seed=seeds[0])
        for seed in seeds:
            check_seed(seed)
        with self._lock:
            plan = self._planner.plan(asked, self._style(asked), picks)
            if planned is not None:
                planned(plan.report)
            return self._make(plan, seeds, progress, preview, preview_every, batch, drawn)

    def check(self, asked: GenerateRequest) -> None:
        """Find what is wrong with a request before anything slow begins.

        Raises:
            AutoLoRAError: Something that was asked for is not possible.
        """
        self._planner.check(asked, self._style(asked))

    def _style(self, asked: GenerateRequest) -> Style:
        return self.styles.get(asked.style)

    def _asked(self, prompt: str | GenerateRequest, fields: dict[str, Any]) -> GenerateRequest:
        if isinstance(prompt, GenerateRequest):
            return prompt.changed(**fields) if fields else prompt
        return read_request({"prompt": prompt, **fields})

    def _make(
        self,
        plan: Plan,
        seeds: Sequence[int],
        progress: Progress | None,
        preview: Preview | None,
        preview_every: int,
        batch: int = 1,
        drawn: Callable[[Output], None] | None = None,
    ) -> list[Output]:
        from autolora.generate.sample import Watch, make_pictures

        report = plan.report
        acting = self._attachments.in_force(
            plan.chosen, report.strategy, report.notes, report.text_encoders
        )
        follow = by_step(self._denoiser, plan.chosen, plan.request.steps)
        watch = Watch(_both(follow, progress), preview, preview_every)
        return make_pictures(self.base, plan, acting, seeds, watch, batch, drawn)


def _both(first: Progress | None, then: Progress | None) -> Progress | None:
    """Call two where there are two."""
    if first is None or then is None:
        return first or then

    def both(done: int, total: int) -> None:
        first(done, total)
        then(done, total)

    return both
