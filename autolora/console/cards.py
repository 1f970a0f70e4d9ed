"""Which adapters a picture would take, as cards: found by the search, pinned, or from a style.

The same function answers while somebody types and when the picture is made, so that the picture
takes what the cards showed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from autolora.config import top_k_problem
from autolora.console.catalog import Catalog, Item
from autolora.console.orders import Selection
from autolora.console.styles import Style
from autolora.errors import AutoLoRAError, PoolError
from autolora.request import ParsedPrompt, check_strength, parse_prompt

if TYPE_CHECKING:
    from autolora.generate.search import IndexState
    from autolora.retrieval import Hit

POOL_LOOK = 2.0
"""Seconds between two looks at the pool's folder while somebody types."""


@dataclass(frozen=True)
class Card:
    """An adapter that a picture would take.

    Attributes:
        item: The LoRA.
        strength: Its strength.
        source: ``prompt`` (a tag), ``pinned``, ``style`` or ``found``.
        hit: What the search said; None where it was not asked or did not find it.
    """

    item: Item
    strength: float
    source: str
    hit: Hit | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        hit = self.hit
        return {
            **self.item.to_dict(),
            "strength": self.strength,
            "usual": self.item.strength,
            "source": self.source,
            "score": None if hit is None else round(hit.score, 4),
            "why": "" if hit is None else hit.why,
            "channels": {} if hit is None else {n: round(p, 4) for n, p in hit.channels.items()},
            "concepts": [] if hit is None else list(hit.concepts),
        }


@dataclass(frozen=True)
class Plan:
    """What a picture would be made with.

    Attributes:
        typed: The prompt as it was typed.
        prompt: The prompt in its style, without tags; the trigger words come later.
        cards: The adapters, in order.
        strategy: How they are fused.
        negative_prompt: What the style adds to the negative prompt.
        notes: What the user should know, one sentence each.
    """

    typed: str
    prompt: str
    cards: list[Card]
    strategy: str
    negative_prompt: str = ""
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

    def choose(self, prompt: str, k: int, taken: Collection[str]) -> list[Hit]:
        """Choose adapters as the pipeline does, in its order.

        Args:
            prompt: What is wanted, without tags.
            k: How many at most.
            taken: Adapters that take part anyway.
        """
        from autolora.retrieval import choose

        state = self._state
        if state is None or k < 1 or not prompt:
            return []
        hits = choose(state.searcher, prompt, k, taken=taken)
        return sorted(hits, key=lambda hit: (-round(hit.score, 3), hit.name))

    def search(self, prompt: str, k: int) -> list[Hit]:
        """Rank the pool for a prompt without tags, best first."""
        state = self._state
        return [] if state is None or not prompt else state.searcher.search(prompt, k)

    def scores(self, prompt: str, names: Collection[str]) -> dict[str, Hit]:
        """What the search thinks of adapters that take part for another reason."""
        hits = self.search(prompt, 4 * len(names) + 16) if names else []
        return {hit.name: hit for hit in hits if hit.name in names}


def make_plan(
    desk: SearchDesk,
    catalog: Catalog,
    style: Style,
    prompt: str,
    selection: Selection,
    default_strategy: str,
    default_top_k: int,
    strategy: str | None = None,
) -> Plan:
    """Decide what a picture would be made with.

    Args:
        desk: The search.
        catalog: The pool.
        style: The style that the selection names.
        prompt: The prompt as it was typed; without one there are only adapters that were named.
        selection: Which adapters shall take part.
        default_strategy: Where neither the order nor the style says how to fuse.
        default_top_k: Most adapters, where the selection does not say.
        strategy: How to fuse, where the order says so.

    Returns:
        The plan.

    Raises:
        AutoLoRAError: A tag that is not understood, or a name that is not in the pool where
            somebody asked for it.
    """
    parsed = parse_prompt(prompt) if prompt.strip() else ParsedPrompt("", ())
    top_k = default_top_k if selection.top_k is None else selection.top_k
    if problem := top_k_problem(top_k):
        raise PoolError(f"{problem[0].upper()}{problem[1:]}.")
    notes: list[str] = []
    asked = _asked(parsed, selection, style)
    chosen: dict[str, Card] = {}
    for name, (strength, source) in asked.items():
        if name in selection.dropped and source == "style":
            continue
        card = _card(catalog, name, strength, source, selection, notes)
        if card is not None:
            chosen[name] = card
    if selection.automatic and style.automatic:
        found = _found(desk, parsed.text, top_k - len(chosen), chosen, selection.dropped)
        for hit in found:
            card = _card(catalog, hit.name, None, "found", selection, notes, hit)
            if card is not None:
                chosen[hit.name] = card
    cards = _with_scores(desk, parsed.text, chosen.values())
    return Plan(
        prompt,
        style.fill(parsed.text),
        cards,
        strategy or style.strategy or default_strategy,
        style.negative_prompt,
        notes,
    )


def _asked(
    parsed: ParsedPrompt, selection: Selection, style: Style
) -> dict[str, tuple[float | None, str]]:
    """Adapters that somebody named, with strength and source; a tag wins over a pin."""
    asked: dict[str, tuple[float | None, str]] = {}
    for lora in parsed.loras:
        asked[lora.name] = (lora.strength, "prompt")
    for name, strength in selection.pinned.items():
        asked.setdefault(name, (strength, "pinned"))
    for name, strength in style.adapters:
        asked.setdefault(name, (strength, "style"))
    return asked


def _found(
    desk: SearchDesk, prompt: str, k: int, taken: Collection[str], dropped: Sequence[str]
) -> list[Hit]:
    """What the search adds; one that was dropped leaves its words unanswered."""
    hits = desk.choose(prompt, k + len(dropped) if k > 0 else 0, list(taken))
    return [hit for hit in hits if hit.name not in dropped][: max(k, 0)]


def _card(
    catalog: Catalog,
    name: str,
    strength: float | None,
    source: str,
    selection: Selection,
    notes: list[str],
    hit: Hit | None = None,
) -> Card | None:
    """A card; what is not in the pool any more is an error only where a person named it."""
    try:
        item = catalog.item(name)
    except AutoLoRAError as error:
        if source in ("prompt", "pinned"):
            raise
        notes.append(f"Left out: {error}")
        return None
    value = selection.strengths.get(name, item.strength if strength is None else strength)
    return Card(item, check_strength(name, value), source, hit)


def _with_scores(desk: SearchDesk, prompt: str, cards: Iterable[Card]) -> list[Card]:
    """Say of named adapters, too, how well the search thinks that they fit."""
    listed = list(cards)
    unknown = {card.item.name for card in listed if card.hit is None}
    hits = desk.scores(prompt, unknown) if unknown else {}
    return [
        Card(card.item, card.strength, card.source, card.hit or hits.get(card.item.name))
        for card in listed
    ]
