"""Houses of drawings: sets of free icons that draw the same subjects, each in its own hand.

A house is an npm package of Iconify (one JSON file of SVG bodies). What is drawn is looked up by
code point, so a subject that is reserved in one house is reserved in all of them.
"""

from __future__ import annotations

import io
import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from autolora.errors import ConfigError

SIZE = 256  # side of the rasterized drawing, in pixels


@dataclass(frozen=True)
class House:
    """One set of drawings.

    Attributes:
        name: What captions call its hand, as in "a cat in flat emoji style".
        package: The npm package.
        licence: SPDX identifier; attribution is in NOTICE.
        names_from: The package whose table of code points names this one's icons.
    """

    name: str
    package: str
    licence: str
    names_from: str


NOTO = House("noto", "@iconify-json/noto", "Apache-2.0", "@iconify-json/noto")
HOUSES: tuple[House, ...] = (
    NOTO,
    House("blob emoji", "@iconify-json/noto-v1", "Apache-2.0", "@iconify-json/noto"),
    House(
        "flat emoji", "@iconify-json/fluent-emoji-flat", "MIT", "@iconify-json/fluent-emoji-flat"
    ),
    House("glossy emoji", "@iconify-json/fluent-emoji", "MIT", "@iconify-json/fluent-emoji-flat"),
    House("sticker", "@iconify-json/twemoji", "CC-BY-4.0", "@iconify-json/twemoji"),
)


def packages_folder() -> Path:
    """``node_modules`` with the icon packages: $AUTOLORA_ICONS, or the checkout's build/icons."""
    chosen = os.environ.get("AUTOLORA_ICONS")
    root = Path(__file__).resolve().parents[2]
    return Path(chosen) if chosen else root / "build" / "icons" / "node_modules"


def _read(package: str, file: str) -> Any:
    path = packages_folder() / package / file
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"The drawings of {package} are missing at {path.parent}; get them with: "
            f"npm install --prefix build/icons {package}"
        ) from error


@lru_cache(maxsize=len(HOUSES))
def _icons(house: House) -> tuple[dict[str, Any], dict[str, str], int]:
    """SVG bodies by icon name, icon names by code point, and the side of the view box."""
    icons = _read(house.package, "icons.json")
    bodies = dict(icons["icons"])
    for alias, entry in icons.get("aliases", {}).items():
        if entry.get("parent") in bodies:
            bodies.setdefault(alias, bodies[entry["parent"]])
    return bodies, _read(house.names_from, "chars.json"), int(icons.get("width", 16))


def draws(house: House, code: int) -> bool:
    """Whether the house has a drawing of the code point."""
    bodies, names, _ = _icons(house)
    return names.get(f"{code:x}") in bodies


@lru_cache(maxsize=4096)
def drawing(house: House, code: int) -> Image.Image:
    """The drawing as RGBA, its ink cropped, the longer side of the box :data:`SIZE` pixels.

    Raises:
        ConfigError: If the house does not draw it, or the packages are missing.
    """
    try:
        from resvg_py import svg_to_bytes
    except ImportError as error:
        raise ConfigError("Drawings need resvg-py; get it with: pip install resvg-py") from error
    if not draws(house, code):
        raise ConfigError(f"{house.package} has no drawing of U+{code:X}.")
    bodies, names, side = _icons(house)
    icon = bodies[names[f"{code:x}"]]
    width, height = icon.get("width", side), icon.get("height", side)
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}">{icon["body"]}</svg>'
    )
    png = svg_to_bytes(svg_string=svg, width=SIZE, skip_system_fonts=True)
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    return picture.crop(picture.getbbox() or (0, 0, 1, 1))
