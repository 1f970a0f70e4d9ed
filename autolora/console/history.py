"""Finished pictures in the output folder, and each visitor's history of them.

A picture is found by an id that cannot be guessed.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autolora.errors import GenerationError
from autolora.prompt_syntax import slug

if TYPE_CHECKING:
    from autolora.generate.report import Output

MAX_KNOWN = 5000
MAX_GATE_MAPS = 48


@dataclass(frozen=True)
class Picture:
    """A finished picture.

    Attributes:
        id: Stands for it in URLs.
        path: The PNG file.
        label: What it shows among others of its job, such as ``fused``; may be empty.
        report: How it was made, as plain data.
    """

    id: str
    path: Path
    label: str
    report: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for browsers and programs; the URL is relative to the server's root."""
        return {
            "id": self.id,
            "url": f"api/pictures/{self.id}.png",
            "file": self.path.name,
            "label": self.label,
            "seed": self.report["seed"],
            "report": self.report,
        }


class PictureStore:
    """Saves pictures and remembers the latest ones; older ones stay on disk only."""

    def __init__(self, folder: Path) -> None:
        """Use a folder, which is made with the first picture.

        Args:
            folder: Where pictures go; each day gets a folder of its own in it.
        """
        self.folder = folder
        self._known: OrderedDict[str, Picture] = OrderedDict()
        self._gates: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, output: Output, label: str = "") -> Picture:
        """Save a picture.

        Args:
            output: What the pipeline gave.
            label: What it shows among others of its job.

        Returns:
            The picture.

        Raises:
            GenerationError: It cannot be written.
        """
        report = output.report
        parts = [slug(report.used_prompt), str(report.seed)] + ([slug(label)] if label else [])
        target = self.folder / time.strftime("%Y-%m-%d") / f"{'-'.join(parts)}.png"
        path = output.save(target, overwrite=False)
        picture = Picture(secrets.token_urlsafe(12), path, label, report.to_dict())
        with self._lock:
            self._known[picture.id] = picture
            _trim(self._known, MAX_KNOWN)
            if output.gates is not None:
                self._gates[picture.id] = output.gates.to_dict()
                _trim(self._gates, MAX_GATE_MAPS)
        return picture

    def get(self, picture: str) -> Picture:
        """Find a picture by its id.

        Raises:
            GenerationError: There is none of this id, or no longer.
        """
        with self._lock:
            found = self._known.get(picture)
        if found is None or not found.path.is_file():
            raise GenerationError("There is no such picture, or its file is gone.")
        return found

    def gates(self, picture: str) -> dict[str, Any] | None:
        """Gates of a picture by adapter, layer and step; None where they are not known."""
        with self._lock:
            return self._gates.get(picture)


def _trim(entries: OrderedDict[str, Any], limit: int) -> None:
    while len(entries) > limit:
        entries.popitem(last=False)


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
