"""PNG files: text of any kind comes back; what is no picture is refused in one sentence."""

import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from autolora.errors import GenerationError
from autolora.generation.png import MAX_PIXELS, read_texts, write_png
from autolora.generation.report import read_report

IMAGE = Image.new("RGB", (8, 4), "red")


def chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    """Read a PNG's chunks by the format's definition, checking each sum."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    found, place = [], 8
    while place < len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        kind, data = content[place + 4 : place + 8], content[place + 8 : place + 8 + length]
        (checksum,) = struct.unpack(">I", content[place + 8 + length : place + 12 + length])
        assert checksum == zlib.crc32(kind + data)
        found.append((kind, data))
        place += 12 + length
    return found


def test_texts_are_standard_chunks(tmp_path: Path) -> None:
    texts = {"parameters": "a cat, é", "other": "猫 🐈", "lone": "a\udcffb"}
    path = write_png(IMAGE, texts, tmp_path / "a.png")
    by_kind = {kind: data for kind, data in chunks(path.read_bytes()) if kind in (b"tEXt", b"iTXt")}
    assert by_kind[b"iTXt"] == b"other\0\0\0\0\0" + "猫 🐈".encode()
    assert read_texts(path) == {"parameters": "a cat, é", "other": "猫 🐈", "lone": "a?b"}


def big_header(path: Path) -> None:
    """A PNG that claims far too many pixels, in a few bytes."""
    side = int(MAX_PIXELS**0.5) + 1
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in parts:
        content += struct.pack(">I", len(data)) + kind + data
        content += struct.pack(">I", zlib.crc32(kind + data))
    path.write_bytes(content)


@pytest.mark.parametrize(
    "kind", ["missing", "folder", "text", "jpeg", "truncated", "empty", "huge"]
)
def test_what_cannot_be_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.png"
    if kind == "folder":
        path.mkdir()
    if kind == "text":
        path.write_text("<html>")
    if kind == "jpeg":
        IMAGE.save(path, format="JPEG")
    if kind == "truncated":
        Image.effect_noise((64, 64), 50).save(path)
        path.write_bytes(path.read_bytes()[:2000])
    if kind == "empty":
        path.touch()
    if kind == "huge":
        big_header(path)
    with pytest.raises(GenerationError, match="cannot be read as a PNG picture") as caught:
        read_texts(path)
    assert "a.png" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "no report"),
        ("[1]", "no report"),
        ("[" * 100_000, "no report"),
        ('{"version": 2}', "newer AutoLoRA"),
        ('{"version": "x"}', "newer AutoLoRA"),
    ],
)
def test_reports_that_cannot_be_used(tmp_path: Path, text: str, words: str) -> None:
    path = write_png(IMAGE, {"autolora": text}, tmp_path / "a.png")
    with pytest.raises(GenerationError, match=words):
        read_report(path)
