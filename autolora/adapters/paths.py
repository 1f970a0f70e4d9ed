"""Which paths of a folder of people's files are taken: links that leave it and names that lie."""

from pathlib import Path

from autolora.adapters.fields import printable


def leaves(link: Path, root: Path) -> bool:
    """Tell whether a link leads out of a folder.

    Args:
        link: A symbolic link.
        root: The folder, resolved.

    Returns:
        True as well where the link leads nowhere or round in a circle.
    """
    try:
        return not link.resolve(strict=True).is_relative_to(root)
    except (OSError, RuntimeError):
        return True


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
    """Tell whether a file name can be shown, typed and stored as it is.

    Args:
        name: Name of a file.

    Returns:
        False for control characters, line breaks, marks that turn the writing direction around,
        and bytes that are no UTF-8.
    """
    return name.isprintable() or (printable(name) == name and len(name.splitlines()) == 1)
