"""PNG files: text of any kind comes back; what is no picture is refused in one sentence."""

import os
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from autolora.errors import GenerationError
from autolora.generate.picture_texts import MAX_PIXELS, read_texts
from autolora.generate.png import check_folder, write_png
from autolora.generate.report import read_report

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


def test_pictures_have_the_permissions_of_new_files(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    path = write_png(IMAGE, {}, tmp_path / "a.png")
    assert path.stat().st_mode == plain.stat().st_mode
    before = os.umask(0o077)
    try:
        private = write_png(IMAGE, {}, tmp_path / "b.png")
    finally:
        os.umask(before)
    assert private.stat().st_mode & 0o777 == 0o600


def test_texts_are_standard_chunks(tmp_path: Path) -> None:
    texts = {"parameters": "a cat, é", "other": "猫 🐈", "lone": "a\udcffb"}
    path = write_png(IMAGE, texts, tmp_path / "a.png")
    by_kind = {kind: data for kind, data in chunks(path.read_bytes()) if kind in (b"tEXt", b"iTXt")}
    assert by_kind[b"iTXt"] == b"other\0\0\0\0\0" + "猫 🐈".encode()
    assert read_texts(path) == {"parameters": "a cat, é", "other": "猫 🐈", "lone": "a?b"}


def big_header(path: Path, side: int) -> None:
    """A PNG that claims far too many pixels, in a few bytes."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in parts:
        content += struct.pack(">I", len(data)) + kind + data
        content += struct.pack(">I", zlib.crc32(kind + data))
    path.write_bytes(content)


@pytest.mark.parametrize(
    "kind", ["missing", "folder", "text", "gif", "truncated", "empty", "huge", "far too huge"]
)
def test_what_cannot_be_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.png"
    if kind == "folder":
        path.mkdir()
    if kind == "text":
        path.write_text("<html>")
    if kind == "gif":
        IMAGE.save(path, format="GIF")
    if kind == "truncated":
        Image.effect_noise((64, 64), 50).save(path)
        path.write_bytes(path.read_bytes()[:2000])
    if kind == "empty":
        path.touch()
    if kind == "huge":
        big_header(path, int(MAX_PIXELS**0.5) + 1)
    if kind == "far too huge":
        big_header(path, 100_000)
    with pytest.raises(
        GenerationError, match="cannot be read as a PNG, JPEG or WebP picture"
    ) as caught:
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


def test_folders_that_cannot_be_written_are_told_early(tmp_path: Path, monkeypatch) -> None:
    check_folder(tmp_path / "new" / "newer" / "a.png")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(GenerationError, match="file is no folder"):
        check_folder(tmp_path / "file" / "new" / "a.png")
    monkeypatch.setattr(os, "access", lambda folder, mode: Path(folder) != tmp_path)
    with pytest.raises(GenerationError, match="you may not write in"):
        check_folder(tmp_path / "new" / "a.png")
