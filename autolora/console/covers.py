"""Covers of LoRAs as small pictures, kept in a folder so that a gallery stays smooth.

A cover is whatever people put beside their files, so it is opened with care: only as a picture of
a common kind and of a size that can be meant, and what is handed out is always a new file made by
us.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from autolora.console.catalog import Item
from autolora.errors import AutoLoRAError, PoolError, shown
from autolora.files import replacing

if TYPE_CHECKING:
    from PIL.Image import Image

SIZES = (96, 256, 768)
MAX_PIXELS = 100_000_000
MAX_COVER_BYTES = 64 << 20
MEMORY = 600
_KINDS = ("PNG", "JPEG", "WEBP")


class Covers:
    """Makes and keeps small covers."""

    def __init__(self, folder: Path) -> None:
        """Use a folder, which is made with the first cover.

        Args:
            folder: Where small covers are kept; safe to delete.
        """
        self.folder = folder
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
            PoolError: There is no such cover, or it is no picture that can be shown.
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
            picture.draft("RGB", (side, side))
            small = _on_paper(ImageOps.exif_transpose(picture))
            small.thumbnail((side, side))
            out = io.BytesIO()
            small.save(out, format="WEBP", quality=86, method=2)
            return out.getvalue()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise PoolError(f"The picture of {shown(name)!r} is none that can be shown.") from error


def _on_paper(picture: Image) -> Image:
    """Put a picture that may be transparent on white; what hides below is not meant to be seen."""
    from PIL import Image

    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
