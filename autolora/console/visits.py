"""What each visitor made: the history that the page shows and restores from."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from autolora.console.pictures import Picture

MAX_VISITS = 500
MAX_ENTRIES = 200


@dataclass(frozen=True)
class Entry:
    """A picture of a visit with what was asked for.

    Attributes:
        picture: The picture.
        order: The settings that the form had, as plain data, with the seed that was used.
    """

    picture: Picture
    order: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return what the page needs."""
        picture = self.picture.to_dict()
        facts = ("id", "url", "label", "seed")
        return {**{name: picture[name] for name in facts}, "prompt": self.order["prompt"]}


class Visits:
    """Histories by visitor; the oldest ones are forgotten."""

    def __init__(self) -> None:
        self._visits: OrderedDict[str, list[Entry]] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, visit: str, entry: Entry) -> None:
        """Add a picture to a visitor's history."""
        with self._lock:
            entries = self._visits.setdefault(visit, [])
            entries.append(entry)
            del entries[:-MAX_ENTRIES]
            self._visits.move_to_end(visit)
            while len(self._visits) > MAX_VISITS:
                self._visits.popitem(last=False)

    def entries(self, visit: str) -> list[Entry]:
        """Return a visitor's history, latest first."""
        with self._lock:
            return list(reversed(self._visits.get(visit, ())))

    def find(self, visit: str, picture: str) -> Entry | None:
        """Find a picture in a visitor's own history."""
        return next((e for e in self.entries(visit) if e.picture.id == picture), None)
