"""A prompt in, a picture and a report out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autolora.adapters import LoRA, Pool
from autolora.errors import AutoLoRAError, GenerationError, LoRAFormatError, PoolError
from autolora.flux.config import PipelineConfig, load_config
from autolora.flux.layers import linear_layers
from autolora.generation.prompts import AskedLoRA, add_triggers, merge_asked
from autolora.generation.report import Output, Report, UsedAdapter
from autolora.generation.request import Request, asked_loras, make_request
from autolora.generation.searching import IndexState, PoolSearch
from autolora.generation.versions import program_versions

if TYPE_CHECKING:
    from autolora.fusion import AttachReport, GateBank
    from autolora.retrieval import Hit

Progress = Callable[[int, int], None]
"""Called with steps done and steps in all."""


class AutoLoRAPipeline:
    """Finds adapters for a prompt, fuses them into the base model and generates.

    The pool, the search index and the base model are loaded when they are first needed; a search
    with an index that is up to date needs no base model. Calls from several threads take turns.
    """

    def __init__(self, config: PipelineConfig) -> None:
        """Make a pipeline; nothing heavy is loaded yet.

        Args:
            config: The base model with its pool, index and defaults.
        """
        self.config = config
        self._lock = threading.RLock()
        self._attached: list[AskedLoRA | tuple[LoRA, float]] = []
        self._attached_strategy = config.strategy

    @classmethod
    def from_config(
        cls, source: str | Path | PipelineConfig = "tiny", pool: str | Path | None = None
    ) -> AutoLoRAPipeline:
        """Make a pipeline from a configuration.

        Args:
            source: Name of a shipped configuration, path of a YAML file, or a configuration.
            pool: Folder of LoRAs to use in place of the configured one; its index goes to a folder
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
        return PoolSearch(self.config, self.pool, self._bare_base)

    def search(self, prompt: str, k: int = 5) -> list[Hit]:
        """Rank the pool for a prompt.

        Args:
            prompt: What is wanted; tags in it are left out.
            k: How many hits at most.

        Returns:
            Hits with name, score in [0, 1] and reason, best first.

        Raises:
            AutoLoRAError: An empty prompt, or a pool or index that cannot be used.
        """
        with self._lock:
            return self._search.search(_words(prompt), k)

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

    def index(
        self, rebuild: bool = False, progress: Callable[[int, int], None] | None = None
    ) -> IndexState:
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

    def attach(
        self, adapters: Sequence[tuple[str | LoRA, float]], strategy: str | None = None
    ) -> AttachReport:
        """Attach adapters until `detach`; calls then use them and retrieve nothing.

        Args:
            adapters: Pairs of name in the pool, or adapter, and strength. They replace what was
                attached before.
            strategy: How they are fused; None is the configured one.

        Returns:
            Which layers each one was put into.

        Raises:
            AutoLoRAError: An unknown name, or an adapter or gates that do not fit the base model.
                What was attached before stays.
        """
        from autolora.fusion import attach

        with self._lock:
            loras = [
                (self.pool.load(lora) if isinstance(lora, str) else lora, strength)
                for lora, strength in adapters
            ]
            chosen = strategy or self.config.strategy
            self._check_fits([lora for lora, _ in loras])
            report = attach(self.base.dit, loras, chosen, self.gates)
            self._attached, self._attached_strategy = list(loras), chosen
            return report

    def detach(self) -> None:
        """Take all adapters out; the base model is then as it was loaded, to the bit."""
        from autolora.fusion import detach

        with self._lock:
            self._attached = []
            if "base" in self.__dict__:
                detach(self.base.dit)
