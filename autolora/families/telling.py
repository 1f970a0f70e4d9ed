"""What a file's header may call a base model, beside what its tensors say."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from autolora.families.layers import LayerTable


@dataclass(frozen=True)
class Telling:
    """How headers and people name a base model.

    Attributes:
        title: What to call it in a sentence.
        words: Regular expressions for what headers call it, in lower case.
    """

    title: str
    words: tuple[str, ...] = ()

    @cached_property
    def _patterns(self) -> tuple[re.Pattern[str], ...]:
        return tuple(map(re.compile, self.words))

    def named_in(self, text: str) -> bool:
        """Whether a header entry in lower case names it."""
        return any(pattern.search(text) for pattern in self._patterns)


@dataclass(frozen=True)
class Other:
    """A base model that is named and left out.

    Attributes:
        telling: How it is named.
        table: The layers that it shares names with a family by.
        header_only: Whether names and shapes are those of a family, so that only a header tells.
    """

    telling: Telling
    table: LayerTable
    header_only: bool = False
