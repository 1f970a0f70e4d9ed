"""LoRAs of a pool by the names that people and other programs give them.

Names are compared as strictly as leads to one file: as they are, without suffix and with either
slash, in one Unicode form, in any case, and at last as generation parameters carry them, where
commas and colons cannot stand.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autolora.lora.pool import PoolEntry

_SUFFIX = ".safetensors"
_NOT_IN_PARAMETERS = re.compile(r'[:,<>"\\\s]+')


def parameter_name(name: str) -> str:
    """Take out of a name what ends a tag or a pair of A1111, which has no way to escape it."""
    kept = "".join(char if char.isprintable() else " " for char in name)
    return _NOT_IN_PARAMETERS.sub(" ", kept).strip()


def plain_path(name: str) -> str:
    """A name as a path: slashes, no suffix, no blanks at the ends of its parts."""
    parts = [part.strip() for part in name.replace("\\", "/").split("/")]
    path = "/".join(part for part in parts if part and part != ".")
    if path.lower().endswith(_SUFFIX):
        path = path[: -len(_SUFFIX)].rstrip()
    return path


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", plain_path(name))


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", _composed(name).casefold())


def _parameter(name: str) -> str:
    return "/".join(parameter_name(part) for part in _folded(name).split("/"))


def _bare(name: str) -> str:
    """As A1111 itself writes names into hashes: without colons and commas."""
    return _parameter(re.sub(r"[:,]", "", name))


_FORMS: Sequence[Callable[[str], str]] = (plain_path, _composed, _folded, _parameter, _bare)


class NameIndex:
    """Finds the LoRAs of a pool that a name may mean."""

    def __init__(self, folder: Path, entries: Iterable[PoolEntry]) -> None:
        """Index names.

        Args:
            folder: The pool's folder.
            entries: Its files.
        """
        self._paths: list[dict[str, list[PoolEntry]]] = []
        self._stems: list[dict[str, list[PoolEntry]]] = []
        listed = [(entry, entry.path.relative_to(folder).as_posix()) for entry in entries]
        for form in _FORMS:
            paths: dict[str, list[PoolEntry]] = {}
            stems: dict[str, list[PoolEntry]] = {}
            for entry, path in listed:
                inside = form(path)
                paths.setdefault(inside, []).append(entry)
                stems.setdefault(inside.rpartition("/")[2], []).append(entry)
            self._paths.append(paths)
            self._stems.append(stems)

    def find(self, name: str) -> list[PoolEntry]:
        """Find what a name may mean.

        Args:
            name: A stem, or a path inside this or another folder, with either slash, with or
                without suffix.

        Returns:
            The files that fit it most strictly: the whole path first, then the stem alone.
        """
        for form, paths in zip(_FORMS, self._paths, strict=True):
            if found := paths.get(form(name)):
                return found
        for form, stems in zip(_FORMS, self._stems, strict=True):
            wanted = form(name)
            if found := stems.get(wanted.rpartition("/")[2]):
                # Folders that a path names tell files of one stem apart.
                inner = [e for e in found if f"/{form(e.path.as_posix())}".endswith(f"/{wanted}")]
                return inner or found
        return []
