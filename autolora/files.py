"""Files on disk: written whole or not at all, and kept apart from links and names that mislead."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path

from autolora.errors import printable


@contextlib.contextmanager
def replacing(target: Path, suffix: str = ".part") -> Iterator[Path]:
    """Give a temporary file beside the target, which takes its place when all went well.

    Args:
        target: The file; one of this name is replaced. Its folder is made where it is missing.
        suffix: Of the temporary file's name, for programs that go by it.

    Yields:
        The temporary file, empty.

    Raises:
        OSError: It cannot be written; nothing is left behind, and a file that was there stays.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.stem[:40]}.{secrets.token_hex(8)}{suffix}")
    temporary.touch(exist_ok=False)
    permissions = temporary.stat().st_mode  # those that its owner's files have
    try:
        yield temporary
        temporary.chmod(permissions)  # safetensors makes files private to their owner
        temporary.replace(target)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


_followed: set[Path] = set()


def follow_links(roots: Iterable[Path]) -> None:
    """Let links lead into these folders, too, in this process: somebody made them on purpose.

    Args:
        roots: Folders, such as one on another drive, or a cache of the Hugging Face hub.
    """
    for root in roots:
        with contextlib.suppress(OSError, RuntimeError):
            _followed.add(root.expanduser().resolve())


def is_followed(target: Path) -> bool:
    """Tell whether links may lead to a place: see `follow_links`.

    Args:
        target: The place, resolved.
    """
    return any(target.is_relative_to(root) for root in _followed)


def leaves(link: Path, root: Path) -> bool:
    """Tell whether a link leads out of a folder, and not where links may lead.

    Args:
        link: A symbolic link.
        root: The folder, resolved.

    Returns:
        True as well where the link leads nowhere or round in a circle.
    """
    try:
        target = link.resolve(strict=True)
    except (OSError, RuntimeError):
        return True
    return not target.is_relative_to(root) and not is_followed(target)


def is_own_file(path: Path) -> bool:
    """Tell whether a path is a file of its folder: no link out of it, no pipe, no device.

    Args:
        path: The path, which need not exist.

    Returns:
        True for a regular file.
    """
    try:
        if not path.is_file():
            return False
        return not path.is_symlink() or not leaves(path, path.parent.resolve())
    except (OSError, ValueError):
        return False


def is_plain_name(name: str) -> bool:
    """Tell whether a file name can be shown, typed and stored unchanged.

    Args:
        name: Name of a file.

    Returns:
        False for control characters, line breaks, marks that turn the writing direction around,
        and bytes that are no UTF-8.
    """
    return name.isprintable() or (printable(name) == name and len(name.splitlines()) == 1)
