"""Example pictures of a LoRA: beside its file, named by its model card, or inside its header."""

import base64
import binascii
from collections.abc import Iterable, Mapping
from pathlib import Path

from autolora.errors import shown
from autolora.files import is_own_file
from autolora.lora.fields import decode_json
from autolora.safetensors_io import read_header

COVER_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
MAX_EMBEDDED = 20
"""Most pictures that are taken from a header."""

_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", ".png"),
    (b"\xff\xd8\xff", ".jpg"),
    (b"RIFF", ".webp"),
    (b"GIF87a", ".gif"),
    (b"GIF89a", ".gif"),
)


def find_covers(path: Path) -> list[Path]:
    """Find the pictures that belong to a LoRA file.

    Only names that follow from the file's are looked at, so that the cost does not grow with the
    folder.

    Args:
        path: The LoRA file.

    Returns:
        ``<stem>.png`` and the like, ``<stem>.preview.*``, then ``<stem>.cover-0.*`` and following.
    """
    covers = list(_existing(path, path.stem))
    covers += _existing(path, path.stem + ".preview")
    number = 0
    while numbered := list(_existing(path, f"{path.stem}.cover-{number}")):
        covers += numbered
        number += 1
    return covers


def card_covers(folder: Path, names: Iterable[str]) -> list[Path]:
    """Find pictures that a model card names.

    Args:
        folder: The card's folder; nothing outside it is taken.
        names: Paths as the card gives them.

    Returns:
        Those that are pictures on this disk, in order.
    """
    root = folder.resolve()
    found: dict[Path, None] = {}
    for name in names:
        try:
            picture = folder / name
            if (
                picture.suffix.lower() in COVER_SUFFIXES
                and picture.resolve().is_relative_to(root)
                and picture.is_file()
            ):
                found[picture] = None
        except (OSError, ValueError, RuntimeError):
            # Web addresses and names that no file can have.
            continue
    return list(found)


def embedded_covers(metadata: Mapping[str, str]) -> tuple[list[bytes], list[str]]:
    """Decode the pictures in a safetensors header.

    ``ssmd_cover_images`` (sd-webui-additional-networks) is a JSON list of pictures in base64;
    ``modelspec.thumbnail`` (Stability AI's ModelSpec) one picture as a ``data:`` address. Addresses
    of other kinds are not followed.

    Args:
        metadata: The header's text entries.

    Returns:
        PNG, JPEG or WebP files, and a sentence for each entry that is none.
    """
    listed = decode_json(metadata.get("ssmd_cover_images"))
    encoded = [("ssmd_cover_images", item) for item in listed] if isinstance(listed, list) else []
    if metadata.get("ssmd_cover_images") and not isinstance(listed, list):
        encoded.append(("ssmd_cover_images", None))
    if thumbnail := metadata.get("modelspec.thumbnail"):
        encoded.append(("modelspec.thumbnail", thumbnail))
    pictures: list[bytes] = []
    problems: list[str] = []
    for name, item in encoded[:MAX_EMBEDDED]:
        picture = _decode_picture(item)
        if picture is None:
            problems.append(f"{name} holds no PNG, JPEG, WebP or GIF picture; not used.")
        elif picture not in pictures:
            pictures.append(picture)
    return pictures, list(dict.fromkeys(problems))


def read_embedded_covers(path: Path) -> list[bytes]:
    """Read the pictures in the header of a LoRA file.

    Args:
        path: The ``.safetensors`` file.

    Returns:
        PNG, JPEG or WebP files; empty where it carries none.

    Raises:
        LoRAFormatError: The file cannot be read.
    """
    return embedded_covers(read_header(path).metadata)[0]


def picture_suffix(picture: bytes) -> str:
    """Tell the kind of a picture by its first bytes.

    Args:
        picture: Bytes of a file.

    Returns:
        ``.png``, ``.jpg``, ``.webp`` or ``.gif``; empty for anything else.
    """
    for magic, suffix in _MAGIC:
        if picture.startswith(magic) and (suffix != ".webp" or picture[8:12] == b"WEBP"):
            return suffix
    return ""


def check_picture(path: Path) -> str:
    """Tell why a cover cannot be shown.

    Args:
        path: The picture.

    Returns:
        One sentence, or nothing when its first bytes are those of a picture.
    """
    try:
        with path.open("rb") as file:
            start = file.read(12)
    except OSError as error:
        return f"{shown(path.name)} cannot be read: {shown(error.strerror)}."
    return (
        "" if picture_suffix(start) else f"{shown(path.name)} is no PNG, JPEG, WebP or GIF picture."
    )


def _decode_picture(item: object) -> bytes | None:
    if not isinstance(item, str):
        return None
    if item.startswith("data:"):
        kind, _, item = item.partition(",")
        if not kind.endswith(";base64"):
            return None
    try:
        picture = base64.b64decode("".join(item.split()), validate=True)
    except (ValueError, binascii.Error):
        return None
    return picture if picture_suffix(picture) else None


def _existing(path: Path, stem: str) -> Iterable[Path]:
    for suffix in COVER_SUFFIXES:
        lower, upper = (path.with_name(stem + kind) for kind in (suffix, suffix.upper()))
        found = is_own_file(lower)
        if found:
            yield lower
        # On some file systems both are one file.
        if is_own_file(upper) and not (found and upper.samefile(lower)):
            yield upper
