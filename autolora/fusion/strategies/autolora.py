"""Keep what the prompt asks for, silence the rest."""

from __future__ import annotations

from collections.abc import Mapping

from autolora.fusion.strategies.base import Response, register
from autolora.fusion.strategies.gated import Gated

SURE = 2.6
"""Relevance from which an adapter is kept unless another one claims its word far more."""
DOUBT = 2.0
"""Relevance below which one is silenced. Between the two it is kept unless another one claims the
word that it answers to."""
LEAD = 0.5
"""By how much another one must lead at that word to silence an adapter that is sure."""


@register
class AutoLoRA(Gated):
    """Adapters that the prompt asks for act in full, the others not at all.

    An adapter is judged by its relevance ``z``, the largest response of its text-side delta to the
    prompt's words as a standard score over neutral prompts (`autolora.generate.relevance`). It is
    kept where ``z >= SURE``, silenced where ``z < DOUBT``. At the word that it answers to most, the
    other adapters are looked at, too: whoever answers there to something that another one claims
    has only been touched by it. One whose name or trigger word is in the prompt, or of which
    the search is sure, is kept, and so is one that says nothing about texts.

    What is kept acts as under the plain sum or, where there are trained gates, through these; its
    strength is never lowered: wanted adapters lose more by a weaker strength than by a neighbour.
    """

    name = "autolora"
    summary = "silences adapters that the prompt does not ask for; the others act in full"
    chooses = True

    def choose(self, responses: Mapping[str, Response | None]) -> dict[str, bool]:
        """Tell by adapter whether the prompt asks for it."""
        return {name: _is_kept(name, responses) for name in responses}


def _is_kept(name: str, responses: Mapping[str, Response | None]) -> bool:
    own = responses[name]
    if own is None or own.named or not own.words:
        return True
    if own.value < DOUBT:
        return False
    word = own.words.index(own.value)
    others = [r.words[word] for n, r in responses.items() if n != name and r is not None]
    lead = max(others, default=own.value) - own.value
    return lead <= (LEAD if own.value >= SURE else 0.0)
