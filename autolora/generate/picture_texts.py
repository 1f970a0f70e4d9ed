"""Text that programs write into pictures: PNG chunks, EXIF of JPEG and WebP. No pixel is decoded.

The chunks are those of the PNG specification (``tEXt``, ``zTXt``, ``iTXt``, ``eXIf``); in EXIF it
is ``UserComment``, whose first eight bytes name its characters (Exif 2.32, 4.6.5), and the tags of
the camera, where ComfyUI's nodes put ``prompt:`` and ``workflow:``. Nothing here needs torch.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from autolora.errors import GenerationError, shown

if TYPE_CHECKING:
    from PIL.Image import Exif

MAX_PIXELS = 1 << 26
"""Largest picture that is opened for its text, far above what any base model draws."""
MAX_BYTES = 1 << 28
"""Largest file (256 MiB) that is read for its text."""
MAX_TEXT = 1 << 24
"""Most bytes of text in all, after unpacking; whole workflows have one or two million."""

PARAMETERS_CHUNK = "parameters"
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_EXIF_IFD = 0x8769
_USER_COMMENT, _DESCRIPTION, _MAKE, _MODEL = 0x9286, 0x010E, 0x010F, 0x0110
_NAMED = re.compile(r"(prompt|workflow)\s*:\s*(?=\{)", re.IGNORECASE)


def read_texts(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the texts in a picture.

    Args:
        path: A PNG, JPEG or WebP file.

    Returns:
        Text by keyword of its chunk; a comment in EXIF counts as ``parameters``, where A1111 and
        its kin put it.

    Raises:
        GenerationError: The file cannot be read, is no such picture, or is damaged.
    """
    try:
        data = _read(Path(path))
        return _png_texts(data) if data.startswith(_SIGNATURE) else _exif_texts(path)
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error) as error:
        raise GenerationError(
            "{} cannot be read as a PNG, JPEG or WebP picture: {}.",
            shown(path),
            shown(getattr(error, "strerror", None) or error),
        ) from error


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES} bytes")
        return file.read(MAX_BYTES)


def _png_texts(data: bytes) -> dict[str, str]:
    texts: dict[str, str] = {}
    left = MAX_TEXT
    for kind, content in _chunks(data):
        if kind == b"IHDR":
            width, height = struct.unpack(">II", content[:8])
            if width * height > MAX_PIXELS:
                raise ValueError(f"it has {width}x{height} pixels")
        elif kind in _READERS:
            keyword, _, rest = content.partition(b"\0")
            text = _READERS[kind](rest, left)
            left -= len(text)
            texts[keyword.decode("latin-1")] = text
        elif kind == b"eXIf":
            for name, text in _texts_of_exif(_exif(content)).items():
                texts.setdefault(name, text)
    return texts


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Go through a PNG's chunks to its end.

    Raises:
        ValueError: It ends too early, or a sum is wrong.
    """
    place, kind = len(_SIGNATURE), b""
    while kind != b"IEND":
        if place + 12 > len(data):
            raise ValueError("it ends too early")
        (length,) = struct.unpack_from(">I", data, place)
        kind = data[place + 4 : place + 8]
        end = place + 8 + length
        if end + 4 > len(data):
            raise ValueError("it ends too early")
        (checksum,) = struct.unpack_from(">I", data, end)
        if checksum != zlib.crc32(memoryview(data)[place + 4 : end]):
            raise ValueError("it is damaged")
        yield kind, b"" if kind == b"IDAT" else data[place + 8 : end]
        place = end + 4


def _plain(content: bytes, left: int) -> str:
    """Text of ``tEXt``: Latin-1, though some programs write UTF-8."""
    _check_size(len(content), left)
    with contextlib.suppress(UnicodeDecodeError):
        return content.decode("utf-8")
    return content.decode("latin-1")


def _packed(content: bytes, left: int) -> str:
    return _unpacked(content[1:], left).decode("latin-1")


def _international(content: bytes, left: int) -> str:
    flag, rest = content[:1], content[2:]
    _, _, rest = rest.partition(b"\0")  # language
    _, _, rest = rest.partition(b"\0")  # the keyword in that language
    if flag == b"\1":
        rest = _unpacked(rest, left)
    _check_size(len(rest), left)
    return rest.decode("utf-8", "replace")


def _unpacked(content: bytes, left: int) -> bytes:
    unpacker = zlib.decompressobj()
    text = unpacker.decompress(content, left + 1)
    _check_size(len(text), left)
    return text


def _check_size(size: int, left: int) -> None:
    if size > left:
        raise ValueError(f"it holds more than {MAX_TEXT} bytes of text")


_READERS = {b"tEXt": _plain, b"zTXt": _packed, b"iTXt": _international}


def _exif_texts(path: str | os.PathLike[str]) -> dict[str, str]:
    from PIL import Image

    try:
        # Pillow's warnings of odd EXIF are no business of whoever reads a picture.
        with warnings.catch_warnings(), Image.open(path, formats=["JPEG", "WEBP"]) as image:
            warnings.simplefilter("ignore")
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"it has {image.width}x{image.height} pixels")
            return _texts_of_exif(image.getexif())
    except Image.DecompressionBombError as error:
        raise ValueError("it has too many pixels") from error


def _exif(content: bytes) -> Exif:
    from PIL import Image

    exif = Image.Exif()
    exif.load(b"Exif\0\0" + content)
    return exif


def _texts_of_exif(exif: Exif) -> dict[str, str]:
    inner: Mapping[int, object] = {}
    # People's files hold anything, and Pillow then raises anything.
    with contextlib.suppress(Exception):
        inner = exif.get_ifd(_EXIF_IFD)
    comments = [inner.get(_USER_COMMENT), exif.get(_USER_COMMENT)]
    comments += [exif.get(tag) for tag in (_DESCRIPTION, _MAKE, _MODEL)]
    texts: dict[str, str] = {}
    for position, value in enumerate(comments):
        text = _comment(value)
        if named := _NAMED.match(text):
            texts.setdefault(named.group(1).lower(), text[named.end() :])
        elif text and position < 3:
            texts.setdefault(PARAMETERS_CHUNK, text)
    return texts


def _comment(value: object) -> str:
    """Decode a comment by the code that it begins with, whichever way round its bytes are."""
    if isinstance(value, str):
        return value.strip("\0 ")
    if not isinstance(value, bytes) or len(value) > MAX_TEXT:
        return ""
    code, body = value[:8], value[8:]
    if code == b"UNICODE\0":
        return _utf16(body)
    if code not in (b"ASCII\0\0\0", b"\0" * 8):
        body = value
    return body.decode("utf-8", "replace").strip("\0 ")


def _utf16(body: bytes) -> str:
    if body[:2] in (b"\xfe\xff", b"\xff\xfe"):
        return body.decode("utf-16", "replace").strip("\0 ")
    high, low = body[0::2].count(0), body[1::2].count(0)
    return body.decode("utf-16-le" if low > high else "utf-16-be", "replace").strip("\0 ")
