"""A LoRA file that somebody sent: looked at outside the pool, then put into it whole."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path

from autolora.errors import AutoLoRAError, LoRAFormatError, PoolError, shown

SUFFIX = ".safetensors"
MAX_NAME = 150
_FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f]')


def check_upload_name(name: str) -> str:
    """Make sure that a file of this name can be put into the pool.

    Args:
        name: As the sender gave it.

    Returns:
        The name.

    Raises:
        PoolError: It has a folder in it, does not end in .safetensors, or no file can have it.
    """
    if not name or _FORBIDDEN.search(name) or name.startswith(".") or not name.isprintable():
        raise PoolError(
            f"A file cannot be added under the name {shown(name, 80)!r}; send a plain file name "
            "without folders, such as my-style.safetensors."
        )
    if not name.lower().endswith(SUFFIX) or len(name) > MAX_NAME:
        raise PoolError(
            f"{shown(name, 80)} is not a .safetensors file; only those can be added, under names "
            f"of at most {MAX_NAME} characters."
        )
    return name


async def receive_file(name: str, chunks: AsyncIterator[bytes], folder: Path) -> Path:
    """Write what is being sent into a folder of its own, outside any pool.

    Args:
        name: The checked name.
        chunks: The file.
        folder: Where to put it.

    Returns:
        The file.

    Raises:
        PoolError: The disk is full or the folder cannot be written.
    """
    path = folder / name
    try:
        with path.open("wb") as file:
            async for chunk in chunks:
                file.write(chunk)
    except OSError as error:
        raise PoolError(f"{shown(name)} cannot be received: {shown(error.strerror)}.") from error
    return path


def add_to_pool(file: Path, pool: Path) -> tuple[Path, tuple[str, ...]]:
    """Check a received file and put it into the pool, whole or not at all.

    Args:
        file: The file, outside the pool.
        pool: The pool's folder; made where it is missing.

    Returns:
        The file in the pool, and what the sender should know.

    Raises:
        LoRAFormatError: It is not a LoRA that can be used.
        PoolError: A file of that name, or with the same content, is in the pool already, or it
            cannot be written.
    """
    from autolora.lora.add import add_files

    try:
        added = add_files(pool, [file])[0]
    except LoRAFormatError as error:
        raise LoRAFormatError(_for_sender(error, file, pool)) from error
    except PoolError as error:
        raise PoolError(_for_sender(error, file, pool)) from error
    return added.path, added.notes


def _for_sender(error: AutoLoRAError, file: Path, pool: Path) -> str:
    """Say it to somebody who knows neither the server's folders nor the shell's options."""
    sentence = str(error)
    for path in (file, pool):
        for spelling in (shown(path), str(path)):
            sentence = sentence.replace(spelling, path.name)
    said, _, advice = sentence.partition(";")
    return (
        f"{said}; rename the file to add it."
        if "--name" in advice
        else (f"{said}." if "--" in advice else sentence)
    )
