"""Which adapters a picture would take, as cards: found by the search, pinned, or from a style.

The planner that answers while somebody types also makes the picture, so that the picture takes
what the cards showed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from autolora.config import PipelineConfig
from autolora.console.catalog import Catalog, Item
from autolora.errors import AutoLoRAError
from autolora.generate.plan import Pick, pick
from autolora.prompt_syntax import ParsedPrompt, parse_prompt
from autolora.request import GenerateRequest
from autolora.styles import Style

if TYPE_CHECKING:
    from autolora.generate.search import IndexState
    from autolora.retrieval import Hit

POOL_LOOK = 2.0
"""Seconds between two looks at the pool's folder while somebody types."""


@dataclass(frozen=True)
class Card:
    """An adapter that a picture would take: a view of what the planner picked.

    Attributes:
        item: The LoRA.
        strength: Its strength.
        pick: What the planner says of it.
        hit: What the search said; None where it was not asked or did not find it.
    """

    item: Item
    strength: float
    pick: Pick
    hit: Hit | None = None

    @property
    def source(self) -> str:
        """``prompt`` (a tag), ``pinned``, ``style``, ``model`` or ``found``."""
        return self.pick.source

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        hit = self.hit
        return {
            **self.item.to_dict(),
            "strength": self.strength,
            "usual": self.item.strength,
            "source": self.source,
            "unit": {} if self.pick.unit.bare else self.pick.unit.to_dict(),
            "score": None if hit is None else round(hit.score, 4),
            "why": "" if hit is None else hit.why,
            "channels": {} if hit is None else {n: round(p, 4) for n, p in hit.channels.items()},
            "concepts": [] if hit is None else list(hit.concepts),
        }


@dataclass(frozen=True)
class Plan:
    """What a picture would be made with.

    Attributes:
        asked: The request.
        style: The style in force.
        prompt: The prompt in its style, without tags; the trigger words come later.
        cards: The adapters, in order.
        strategy: How they are fused.
        notes: What the user should know, one sentence each.
    """

    asked: GenerateRequest
    style: Style
    prompt: str
    cards: list[Card]
    strategy: str
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "prompt": self.prompt,
            "cards": [card.to_dict() for card in self.cards],
            "strategy": self.strategy,
            "notes": self.notes,
        }


class SearchDesk:
    """Answers which adapters fit, beside whatever the pipeline is busy with.

    The pipeline's own search waits while a picture is made; this one only reads the index that was
    opened last. Where the pool has changed since then, `stale` is called, and the old index
    answers until the new one is there.
    """

    def __init__(self, catalog: Catalog, stale: Callable[[], None]) -> None:
        """Find nothing until an index is given.

        Args:
            catalog: Knows the pool.
            stale: Called when the pool's files are not those of the index.
        """
        self._catalog = catalog
        self._stale = stale
        self._state: IndexState | None = None
        self._looked = 0.0
        self._lock = threading.Lock()

    @property
    def ready(self) -> bool:
        """Whether there is an index."""
        return self._state is not None

    def use(self, state: IndexState) -> None:
        """Answer from this index from now on."""
        self._state = state

    def look(self, force: bool = False) -> None:
        """See whether the pool's files changed, at most every `POOL_LOOK` seconds.

        Raises:
            PoolError: The pool is missing or empty.
        """
        now = time.monotonic()
        with self._lock:
            if not force and now - self._looked < POOL_LOOK:
                return
            self._looked = now
        self._catalog.refresh()
        state = self._state
        if state is None or tuple(state.seen) != tuple(self._catalog.entries):
            self._stale()

    def choose(self, prompt: str, k: int, taken: Collection[str], negative: str = "") -> list[Hit]:
        """Choose adapters as the pipeline does.

        Args:
            prompt: What is wanted, without tags.
            k: How many at most.
            taken: Adapters that take part anyway.
            negative: What the picture shall not show.
        """
        from autolora.retrieval import choose

        state = self._state
        if state is None or k < 1 or not prompt:
            return []
        return choose(state.searcher, prompt, k, taken=taken, negative=negative)

    def search(self, prompt: str, k: int) -> list[Hit]:
        """Rank the pool for a prompt without tags, best first; copies take one place."""
        from autolora.generate.search import rank

        state = self._state
        return [] if state is None or not prompt else rank(state.searcher, prompt, k)

    def scores(self, prompt: str, names: Collection[str]) -> dict[str, Hit]:
        """What the search thinks of adapters that take part for another reason."""
        state = self._state
        if state is None or not prompt or not names:
            return {}
        hits = state.searcher.search(prompt, 4 * len(names) + 16)
        return {hit.name: hit for hit in hits if hit.name in names}


def make_plan(
    desk: SearchDesk,
    catalog: Catalog,
    style: Style,
    asked: GenerateRequest,
    config: PipelineConfig,
) -> Plan:
    """Decide what a picture would be made with.

    Args:
        desk: The search.
        catalog: The pool.
        style: The style that the request names.
        asked: The request; without a prompt there are only adapters that were named.
        config: The base model's configuration.

    Returns:
        The plan.

    Raises:
        AutoLoRAError: A tag that is not understood, or a name that is not in the pool where
            somebody asked for it.
    """
    words = parse_prompt(asked.prompt) if asked.prompt.strip() else ParsedPrompt("", ())
    picks = pick(
        asked, words.text, words.loras, style, config, desk.choose, "pinned", catalog.resolve
    )
    notes: list[str] = list(words.notes)
    cards = []
    for entry in picks:
        try:
            item = catalog.item(entry.unit.name)
        except AutoLoRAError as error:
            if entry.source not in ("style", "found"):
                raise
            notes.append(f"Left out: {error}")
            continue
        wanted = entry.unit.strength
        cards.append(Card(item, item.strength if wanted is None else wanted, entry, entry.hit))
    unknown = {card.item.name for card in cards if card.hit is None}
    hits = desk.scores(words.text, unknown) if unknown else {}
    cards = [replace(card, hit=card.hit or hits.get(card.item.name)) for card in cards]
    strategies = (asked.strategy, style.strategy, config.strategy)
    strategy = next(name for name in strategies if name is not None)
    return Plan(asked, style, style.fill(words.text), cards, strategy, notes)
