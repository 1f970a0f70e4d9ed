"""Writes PNG files with text in them, whole or not at all. Nothing here needs torch."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from autolora.errors import GenerationError, shown

if TYPE_CHECKING:
    from PIL.Image import Image


def check_png_name(path: Path) -> Path:
    """Make sure that a picture can have this name.

    Raises:
        GenerationError: It does not end in .png, or is a folder.
    """
    if path.suffix.lower() != ".png":
        raise GenerationError(f"{shown(path)} must end in .png; pictures are saved as PNG.")
    if os.path.isdir(path):
        raise GenerationError(f"{shown(path)} is a folder; name a file in it.")
    return path


def check_folder(path: Path) -> None:
    """Make sure that a file can be written, as far as that can be known before.

    Args:
        path: The file; folders on the way to it may be missing.

    Raises:
        GenerationError: The nearest folder that is there is none, or may not be written.
    """
    folder = path.parent
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    if not os.path.isdir(folder):
        raise GenerationError(f"{shown(path)} cannot be written: {shown(folder)} is no folder.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise GenerationError(
            f"{shown(path)} cannot be written: you may not write in {shown(folder)}."
        )


def encode_png(image: Image, texts: Mapping[str, str], file: BinaryIO) -> None:
    """Write a picture as PNG with text chunks.

    Args:
        image: The picture.
        texts: Text by chunk keyword; what Latin-1 lacks makes it a UTF-8 chunk (``iTXt``), and
            what Unicode forbids, single surrogates, is written as ``?``.
        file: Where to.
    """
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    for keyword, text in texts.items():
        chunks.add_text(keyword, text.encode("utf-8", "replace").decode())
    image.save(file, format="PNG", pnginfo=chunks)


def write_png(image: Image, texts: Mapping[str, str], path: Path, overwrite: bool = True) -> Path:
    """Write a picture to a file, which appears whole or not at all.

    Args:
        image: The picture.
        texts: Text by chunk keyword.
        path: The file; its folder is made where it is missing.
        overwrite: Whether to replace a file that is there; otherwise the next free name
            ``stem-2.png``, ``stem-3.png``, ... is taken.

    Returns:
        The file that was written.

    Raises:
        GenerationError: The name does not end in .png, or the file cannot be written.
    """
    target = check_png_name(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Made by open, unlike tempfile's, the file has the permissions that its owner's files have.
        temporary = target.with_name(f".{secrets.token_hex(8)}.part")
        try:
            with open(temporary, "xb") as file:
                encode_png(image, texts, file)
            return _place(temporary, target, overwrite)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
    except OSError as error:
        raise GenerationError(
            f"{shown(target)} cannot be written: {shown(error.strerror or error)}."
        ) from error


def _place(temporary: Path, target: Path, overwrite: bool) -> Path:
    """Give a finished file its name; a hard link never replaces what is there."""
    if overwrite:
        os.replace(temporary, target)
        return target
    for candidate in _free_names(target):
        try:
            os.link(temporary, candidate)
            return candidate
        except FileExistsError:
            continue
        except OSError:
            # A file system without hard links.
            if not candidate.exists():
                os.replace(temporary, candidate)
                return candidate
    raise AssertionError("names do not run out")


def _free_names(target: Path) -> Iterator[Path]:
    yield target
    number = 2
    while True:
        yield target.with_name(f"{target.stem}-{number}{target.suffix}")
        number += 1
