"""The pool as people browse it: titles, trigger words, tags, formats and covers, page by page.

Files are read in the background, once and again when they change; what has not been read yet shows
its name only, so that a pool of thousands can be browsed at once. Covers are whatever people put
beside their files, so they are opened with care: only common kinds of pictures of a plausible size,
and what is served is always a new, small file, which is cached in a folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autolora.errors import AutoLoRAError, PoolError, shown
from autolora.files import replacing
from autolora.lora.metadata import Metadata

if TYPE_CHECKING:
    from PIL.Image import Image

    from autolora.lora import Pool
    from autolora.lora.pool import PoolEntry

PAGE = 60
MAX_FACETS = 40


@dataclass(frozen=True)
class Item:
    """A LoRA of the pool as people see it.

    Attributes:
        name: Its name in the pool.
        path: Its file.
        stamp: Size and time of the file; another stamp is another file.
        title: Name for people.
        triggers: Trigger words.
        tags: Topics.
        base_model: Base model as its source spells it.
        format: File format; empty when nothing is known of its keys.
        strength: Strength that is used where nobody says another one.
        bounds: Lowest and highest strength that its author recommends.
        covers: Example pictures beside the file.
        embedded: How many pictures the file itself holds.
        problem: Why it cannot be used; empty when nothing speaks against it.
        read: Whether its metadata has been read yet.
    """

    name: str
    path: Path
    stamp: tuple[int, int]
    title: str = ""
    triggers: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    base_model: str = ""
    format: str = ""
    strength: float = 1.0
    bounds: tuple[float, float] | None = None
    covers: tuple[Path, ...] = ()
    embedded: int = 0
    problem: str = ""
    read: bool = False

    @property
    def text(self) -> str:
        """What a search in the gallery looks at, folded."""
        words = (self.name, self.title, *self.triggers, *self.tags)
        return "\n".join(words).casefold()

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for browsers and programs; no paths of this machine are in it."""
        return {
            "name": self.name,
            "title": self.title or self.name,
            "triggers": list(self.triggers),
            "tags": list(self.tags),
            "base_model": self.base_model,
            "format": self.format,
            "size": self.stamp[0],
            "strength": self.strength,
            "bounds": None if self.bounds is None else list(self.bounds),
            "covers": len(self.covers) + self.embedded,
            "problem": self.problem,
            "version": f"{self.stamp[1]:x}",
        }


@dataclass(frozen=True)
class Page:
    """Some items of the pool, and what there is altogether.

    Attributes:
        items: The items of this page.
        total: How many match.
        pool: How many there are in the pool.
        tags: Most frequent tags of the pool with their counts.
        formats: Formats of the pool with their counts.
        reading: Whether files are still being read.
    """

    items: list[Item]
    total: int
    pool: int
    tags: dict[str, int] = field(default_factory=dict)
    formats: dict[str, int] = field(default_factory=dict)
    reading: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "items": [item.to_dict() for item in self.items],
            "total": self.total,
            "pool": self.pool,
            "tags": self.tags,
            "formats": self.formats,
            "reading": self.reading,
        }


class Catalog:
    """Reads and keeps what is known about the files of a pool."""

    def __init__(self, pool: Callable[[], Pool]) -> None:
        """Read nothing yet.

        Args:
            pool: Gives the pool; may raise `PoolError` as long as there is none.
        """
        self._pool = pool
        self._items: dict[str, Item] = {}
        self._facets: tuple[dict[str, int], dict[str, int]] = ({}, {})
        self._lock = threading.Lock()
        self._reader: threading.Thread | None = None
        self.entries: tuple[PoolEntry, ...] = ()

    def refresh(self, wait: bool = False) -> bool:
        """List the pool again, and read new and changed files in the background.

        Args:
            wait: Return only when all of them are read.

        Returns:
            Whether files were added, removed or changed since the last time.

        Raises:
            PoolError: The pool is missing or empty.
        """
        pool = self._pool()
        try:
            pool.refresh()
            entries = tuple(pool.entries)
        except PoolError:
            self._replace({})
            self.entries = ()
            raise
        changed = entries != self.entries
        if changed:
            self.entries = entries
            self._replace({entry.name: self._known(entry) for entry in entries})
        self._start_reading()
        reader = self._reader
        if wait and reader is not None:
            reader.join()
        return changed

    @property
    def reading(self) -> bool:
        """Whether files are being read."""
        return self._reader is not None and self._reader.is_alive()

    def item(self, name: str) -> Item:
        """Look a LoRA up, reading its file where that has not happened yet.

        Raises:
            PoolError: No LoRA has this name; the message suggests some that have a like one.
        """
        found = self._items.get(name)
        if found is None:
            name = self._pool().entry(name).name
            found = self._items.get(name)
        if found is None:
            raise PoolError(f"{shown(name)!r} is new in the pool; try again in a moment.")
        if not found.read:
            found = _read(found)
            with self._lock:
                if name in self._items:
                    self._items[name] = found
        return found

    def resolve(self, name: str) -> str:
        """The pool's name for what a name means; the name itself where that is not clear."""
        if name in self._items:
            return name
        try:
            return self._pool().resolve(name)
        except PoolError:
            return name  # there is no pool yet

    def page(
        self, text: str = "", tag: str = "", format: str = "", start: int = 0, count: int = PAGE
    ) -> Page:
        """Find items for the gallery.

        Args:
            text: Words that name, title, trigger words or tags must all have.
            tag: Only items with this tag.
            format: Only items in this file format.
            start: How many to skip.
            count: How many at most.

        Returns:
            The page, sorted by title.
        """
        words = text.casefold().split()
        matching = [
            item
            for item in self._items.values()
            if all(word in item.text for word in words)
            and (not tag or tag in item.tags)
            and (not format or format == item.format)
        ]
        matching.sort(key=lambda item: ((item.title or item.name).casefold(), item.name))
        count = max(1, min(count, 4 * PAGE))
        return Page(
            matching[max(0, start) :][:count],
            len(matching),
            len(self._items),
            *self._facets,
            self.reading,
        )

    def _known(self, entry: PoolEntry) -> Item:
        """What was known of a file, when it is still the same."""
        before = self._items.get(entry.name)
        stamp = (entry.size, entry.mtime_ns)
        if before is not None and before.stamp == stamp and before.path == entry.path:
            return before
        return Item(entry.name, entry.path, stamp)

    def _replace(self, items: dict[str, Item]) -> None:
        with self._lock:
            self._items = items
            self._count()

    def _count(self) -> None:
        items = self._items.values()
        self._facets = (
            _frequent(tag for item in items for tag in item.tags),
            _frequent(item.format for item in items if item.format),
        )

    def _start_reading(self) -> None:
        with self._lock:
            unread = [item for item in self._items.values() if not item.read]
            if not unread or self.reading:
                return
            self._reader = threading.Thread(
                target=self._read_all, args=(unread,), name="catalog", daemon=True
            )
            self._reader.start()

    def _read_all(self, unread: list[Item]) -> None:
        for item in unread:
            known = _read(item)
            with self._lock:
                if self._items.get(item.name) is item:
                    self._items[item.name] = known
        with self._lock:
            self._count()


def _frequent(words: Iterable[str]) -> dict[str, int]:
    counts = Counter(words)
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return dict(ordered[:MAX_FACETS])


def _read(item: Item) -> Item:
    """Read metadata and format of a file; nothing in it can do harm here."""
    try:
        metadata = Metadata.read(item.path)
        file_format, problem = _format(item.path)
    except (AutoLoRAError, OSError) as error:
        metadata, file_format, problem = Metadata(), "", str(error)
    return Item(
        item.name,
        item.path,
        item.stamp,
        title=metadata.title or item.name,
        triggers=tuple(metadata.trigger_words),
        tags=tuple(metadata.tags),
        base_model=metadata.base_model,
        format=file_format,
        strength=_strength(metadata),
        bounds=metadata.strength_bounds,
        covers=tuple(metadata.covers),
        embedded=metadata.embedded_covers,
        problem=problem,
        read=True,
    )


def _strength(metadata: Metadata) -> float:
    from autolora.lora.metadata import recommended_strength

    return recommended_strength(metadata)


def _format(path: Path) -> tuple[str, str]:
    """Name the file format by the header alone, or say why the file cannot be used."""
    from autolora.lora.formats import describe_file

    found = describe_file(path)
    return found.format, found.problem


SIZES = (96, 256, 768)
MAX_PIXELS = 36_000_000
"""Largest cover that is decoded; at most 8 bytes a pixel are held meanwhile."""
LARGE_PIXELS = 4_000_000
"""Pictures above this are decoded one at a time, whoever asks."""
DECODERS = 2
"""Threads that decode pictures, apart from those that answer."""
_large = threading.Lock()
MAX_COVER_BYTES = 64 << 20
MEMORY = 600
_KINDS = ("PNG", "JPEG", "WEBP", "GIF")


class Covers:
    """Makes and keeps small covers."""

    def __init__(self, folder: Path) -> None:
        """Use a folder, which is made with the first cover.

        Args:
            folder: Where small covers are kept; safe to delete.
        """
        self.folder = folder
        self.threads = ThreadPoolExecutor(DECODERS, thread_name_prefix="covers")
        self._memory: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, item: Item, number: int = 0, size: int = SIZES[1]) -> bytes:
        """Return a cover as a small WebP picture.

        Args:
            item: The LoRA.
            number: Which of its covers, from 0.
            size: Longest side in pixels; the next of `SIZES` is taken.

        Returns:
            The file.

        Raises:
            PoolError: There is no such cover, or it cannot be shown as a picture.
        """
        side = next((known for known in SIZES if known >= size), SIZES[-1])
        return self._kept(
            self._key(item, number, side), lambda: _small(_source(item, number), side, item.name)
        )

    def of_picture(self, path: Path, side: int = SIZES[1]) -> bytes:
        """Return a picture that was made here as a small WebP picture.

        Args:
            path: The PNG file.
            side: Longest side in pixels.

        Raises:
            PoolError: It is gone, or no picture.
        """
        try:
            stat = path.stat()
            stamp = f"{path}\n{stat.st_size}\n{stat.st_mtime_ns}\n{side}"
            return self._kept(_digest(stamp), lambda: _small(path.read_bytes(), side, path.name))
        except OSError as error:
            raise PoolError(f"The picture {shown(path.name)} is gone.") from error

    def _kept(self, key: str, make: Callable[[], bytes]) -> bytes:
        """A small picture from memory, from the folder, or made now."""
        with self._lock:
            if key in self._memory:
                self._memory.move_to_end(key)
                return self._memory[key]
        file = self.folder / f"{key}.webp"
        try:
            data = file.read_bytes()
        except OSError:
            data = make()
            # A full or read-only disk only costs time.
            with contextlib.suppress(OSError), replacing(file) as temporary:
                temporary.write_bytes(data)
        with self._lock:
            self._memory[key] = data
            while len(self._memory) > MEMORY:
                self._memory.popitem(last=False)
        return data

    def _key(self, item: Item, number: int, side: int) -> str:
        stamp = f"{item.path}\n{item.stamp}\n{number}\n{side}"
        if 0 <= number < len(item.covers):
            with contextlib.suppress(OSError):
                stat = item.covers[number].stat()
                stamp += f"\n{item.covers[number].name}\n{stat.st_size}\n{stat.st_mtime_ns}"
        return _digest(stamp)


def _digest(stamp: str) -> str:
    return hashlib.sha256(stamp.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _source(item: Item, number: int) -> bytes:
    """Bytes of a cover, from beside the file or from inside it."""
    from autolora.lora.covers import read_embedded_covers

    missing = PoolError(f"{shown(item.name)!r} has no cover number {number}.")
    if number < 0:
        raise missing
    try:
        if number < len(item.covers):
            path = item.covers[number]
            if path.stat().st_size > MAX_COVER_BYTES:
                raise PoolError(f"The cover {shown(path.name)} is too large to be shown.")
            return path.read_bytes()
        return read_embedded_covers(item.path)[number - len(item.covers)]
    except (OSError, IndexError) as error:
        raise missing from error
    except AutoLoRAError as error:
        raise PoolError(str(error)) from error


def _small(data: bytes, side: int, name: str) -> bytes:
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data), formats=_KINDS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise PoolError(f"The picture of {shown(name)!r} has too many pixels to be shown.")
            # JPEG is decoded at the size that is needed; others are shrunk before they are copied.
            picture.draft("RGB", (side, side))
            large = picture.width * picture.height > LARGE_PIXELS
            with _large if large else contextlib.nullcontext():
                small = _shrunk(picture, side)
            small = _on_paper(ImageOps.exif_transpose(small))
            out = io.BytesIO()
            small.save(out, format="WEBP", quality=86, method=2)
            return out.getvalue()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise PoolError(f"The picture of {shown(name)!r} is none that can be shown.") from error


def _shrunk(picture: Image, side: int) -> Image:
    """The first frame of a picture, small, with its own colours and transparency."""
    if picture.mode not in ("RGB", "RGBA", "L", "LA"):
        picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    picture.thumbnail((side, side))
    return picture


def _on_paper(picture: Image) -> Image:
    """Put a picture that may be transparent on white; what hides below is not meant to be seen."""
    from PIL import Image

    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
