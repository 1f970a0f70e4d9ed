"""The search index of a pool, built when first needed and kept up to date.

Joins what the floors below must not know of each other: portraits come from the base model with an
adapter attached (``flux`` and ``fusion``), and are handed to the retriever as tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autolora.config import PipelineConfig
from autolora.errors import ConfigError, GenerationError
from autolora.families.detect import layer_table
from autolora.families.headers import HeaderSizes, model_sizes
from autolora.families.registry import find_family
from autolora.runtime.checkpoints import locate, locate_part

if TYPE_CHECKING:
    from torch import Tensor

    from autolora.lora import LoRA, Pool
    from autolora.retrieval import (
        Hit,
        Provenance,
        RefreshReport,
        Retriever,
        Searcher,
        TextEncoder,
    )

Progress = Callable[[int, int], None]
"""Called with files done and files in all."""


@dataclass
class IndexState:
    """An open index and what was last done to it."""

    searcher: Searcher
    report: RefreshReport
    seen: tuple[Any, ...]

    @property
    def size(self) -> int:
        """Number of LoRAs that can be found."""
        return len(self.searcher.index)

    @property
    def encoded(self) -> list[str]:
        """LoRAs that can be found and were opened for that; files left out do not count."""
        return [name for name in self.report.encoded if name not in self.report.left_out]

    @property
    def kept(self) -> int:
        """How many LoRAs that can be found were taken over, or are copies of one encoded now."""
        return self.size - len(self.encoded)


MORE_FOR_COPIES = 4


def rank(searcher: Searcher, prompt: str, k: int) -> list[Hit]:
    """Rank a pool for a prompt.

    Args:
        searcher: Its search.
        prompt: What is wanted.
        k: How many hits at most.

    Returns:
        Hits, best first; of copies of one file the first alone.

    Raises:
        RetrievalError: An empty prompt, or k below 1.
    """
    hits = searcher.search(prompt, MORE_FOR_COPIES * k)
    names = {hit.name for hit in hits}
    content = {r.name: r.sha256 or r.name for r in searcher.index.records if r.name in names}
    first: dict[str, Hit] = {}
    for hit in hits:
        first.setdefault(content[hit.name], hit)
    return list(first.values())[:k]


class PoolSearch:
    """Searches a pool; the base model is asked for only where a file must be encoded."""

    def __init__(self, config: PipelineConfig, pool: Pool, base: Callable[[], Any]) -> None:
        """Remember where things are; nothing is loaded.

        Args:
            config: Says where index and encoder are and how portraits are taken.
            pool: The pool.
            base: Gives the DiffSynth pipeline.
        """
        self.config = config
        self.pool = pool
        self._base = base
        self._state: IndexState | None = None
        self._portraits: Any = None
        self._shapes: dict[str, tuple[int, ...]] | None = None

    def search(self, prompt: str, k: int) -> list[Hit]:
        """Rank the pool for a prompt, best first; copies of one file take one place."""
        return rank(self.open().searcher, prompt, k)

    def choose(
        self, prompt: str, k: int, taken: Collection[str] = (), negative: str = ""
    ) -> list[Hit]:
        """Choose adapters that cover a prompt beside those that are taken anyway.

        What the prompt or the negative prompt asks to leave out is not among them.
        """
        from autolora.retrieval import choose

        if k < 1:
            return []
        return choose(self.open().searcher, prompt, k, taken=taken, negative=negative)

    def open(self, progress: Progress | None = None) -> IndexState:
        """Return the index, brought up to date where files of the pool changed.

        Raises:
            PoolError: The pool is missing or empty.
            RetrievalError: The encoder or the index folder cannot be used.
        """
        self.pool.refresh()
        seen = tuple(self.pool.entries)
        if self._state is None or self._state.seen != seen:
            return self.refresh(progress=progress)
        return self._state

    def refresh(self, rebuild: bool = False, progress: Progress | None = None) -> IndexState:
        """Bring the index up to date, also where only files beside the LoRAs changed.

        Args:
            rebuild: Encode every file again.
            progress: Called for every file.

        Returns:
            The index and what was done.

        Raises:
            PoolError: The pool is missing or empty.
            RetrievalError: The encoder or the index folder cannot be used.
        """
        from autolora.retrieval import Searcher, refresh_index

        index, report = refresh_index(
            self.config.index,
            self.pool,
            self._provenance(),
            self._text_encoder,
            self._encode,
            rebuild=rebuild,
            progress=progress,
        )
        searcher = Searcher(index, self._text_encoder, self._retriever)
        self._state = IndexState(searcher, report, tuple(self.pool.entries))
        return self._state

    def portrait(self, lora: LoRA) -> Tensor:
        """Take an adapter's portrait, ``[S, N, C, h, w]``; see `autolora.generate.portraits`."""
        from autolora.fusion import attached
        from autolora.generate.portraits import Portraits

        pipe = self._base()
        if self._portraits is None:
            self._portraits = Portraits(pipe, self.config.portrait)
            with attached(pipe.family.model(pipe), []):
                # The bare model's passes, whatever is attached at the moment.
                self._portraits.base()
        return self._portraits.take(attached(pipe.family.model(pipe), [(lora, 1.0)], "sum"))

    def _encode(self, lora: LoRA) -> Tensor | None:
        """Return the adapter's vector; an adapter for another model is an error."""
        retriever = self._retriever
        if self._shapes is None:
            self._shapes = self._base_shapes()
        lora.check_fits(self._shapes)
        if retriever is None:
            return None
        portrait = self.portrait(lora) if retriever.needs_portraits else None
        return retriever.encode(lora, portrait)

    def _base_shapes(self) -> dict[str, tuple[int, ...]]:
        """Linear layers of the base model; those of a checkpoint stand in its header."""
        family = find_family(self.config.kind)
        if family.packaged is None:
            located = locate(self.config, family.parts)
            sizes = family.sizes(located) if family.sizes else model_sizes(family, located)
            if sizes is not None and isinstance(sizes.denoiser, HeaderSizes):
                return layer_table(family.name).canonical(sizes.denoiser.weights)
            if sizes is not None:
                return dict(sizes.denoiser.linear_shapes())
        from autolora.fusion import layer_shapes

        pipe = self._base()
        return layer_shapes(family.model(pipe))

    @cached_property
    def _text_encoder(self) -> TextEncoder:
        from autolora.families.load import quiet

        if "/" in self.config.text:
            from autolora.retrieval.text import SentenceText

            return SentenceText(self.config.text)
        read = find_family(self.config.kind).read_text
        if self.config.text == "clip" and read is None:
            raise ConfigError(
                f"Base models of kind {self.config.kind} have no CLIP to search by; set text to "
                "auto or minilm."
            )
        if read is not None and self.config.text != "minilm":
            return self._clip(read)
        from autolora.minilm import shared_minilm
        from autolora.retrieval import MiniLMText

        with quiet():
            # Loaded here, as transformers shows a bar while it loads.
            shared_minilm()
        return MiniLMText()

    def _clip(self, read: Callable[[Any], tuple[Any, Any]]) -> TextEncoder:
        """CLIP of the checkpoint, loaded alone when it is first needed."""
        from autolora.families.load import quiet
        from autolora.retrieval.text import ClipText

        def load() -> tuple[Any, Any]:
            with quiet():
                return read(self.config)

        return ClipText(load)

    @cached_property
    def _retriever(self) -> Retriever | None:
        """Trained encoders; without them only metadata is searched."""
        from autolora.retrieval import Retriever

        # The shipped one was trained on vectors of MiniLM.
        shipped = None if "/" in self.config.text else shipped_encoder(self.config)
        path = self.config.encoder or shipped
        return None if path is None else Retriever.load(path)

    def _provenance(self) -> Provenance:
        """What vectors depend on: encoder, base model and portrait settings."""
        from autolora.retrieval import Provenance

        retriever, text = self._retriever, self._text_encoder
        if retriever is None:
            return Provenance("", 0, text.name, text.dim)
        made_with = [retriever.sha256]
        if retriever.needs_portraits:
            made_with += [_stamp(self.config), str(self.config.portrait)]
        digest = hashlib.sha256("\n".join(made_with).encode()).hexdigest()
        return Provenance(digest, retriever.dim, text.name, text.dim)


def in_english(config: PipelineConfig, prompt: str, notes: list[str]) -> str:
    """A prompt as the embedded model's text encoder can read it.

    Args:
        config: The base model; the encoders of checkpoints are left to read what they can.
        prompt: In any language.
        notes: Given a sentence about words that are not understood, in the prompt's language.

    Raises:
        GenerationError: Nothing of the prompt is understood.
    """
    from autolora.retrieval.languages import understand

    if find_family(config.kind).packaged is None or not prompt:
        return prompt
    understood = understand(prompt)
    if understood.problem and not understood.text:
        raise GenerationError(understood.problem)
    if understood.problem:
        notes.append(understood.problem)
    return understood.text


def shipped_encoder(config: PipelineConfig) -> Path | None:
    """The encoder that the package ships for its own base model, where it does."""
    if not config.uses_shipped_weights:
        return None
    folder = Path(__file__).resolve().parents[1] / "retrieval" / "weights"
    return next(iter(sorted(folder.glob("*.safetensors"))), None)


def _stamp(config: PipelineConfig) -> str:
    """Tell base models apart without hashing checkpoints of many gigabytes."""
    family = find_family(config.kind)
    if family.packaged is not None:
        paths: tuple[Path, ...] = (config.weights or family.packaged,)
    else:
        paths = locate_part(config, "transformer", family.parts).paths
    words = [config.kind, config.storage]
    for path in paths:
        try:
            stat = path.stat()
        except OSError:
            words.append(path.name)
        else:
            words.append(f"{path.name} {stat.st_size} {stat.st_mtime_ns}")
    return " ".join(words)
