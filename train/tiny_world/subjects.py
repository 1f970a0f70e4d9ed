"""Which emoji are subjects of the tiny world, and how they are split.

A subject is a single-code-point emoji that Noto Color Emoji draws and whose Unicode name is a
thing a person would ask for. Signs, arrows, clock faces, plain shapes, hand signs and the hundred
near-identical yellow faces are left out by rule. Code points with remainder 3 modulo 7 are reserved
for outside evaluation and never used here.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONT_PATH = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
FONT_SIZE = 109  # the only size of the bitmaps in the font
RESERVED_MODULUS, RESERVED_REMAINDER = 7, 3

_NOT_A_THING = re.compile(
    r"sign\b|symbol|arrow|square|triangle|\bcircle\b|circled|squared|ideograph|clock face|"
    r"regional|modifier|component|keycap|letter [a-z]$|mark\b|marks\b|button|heavy|medium|"
    r"diamond\b|moon symbol|moon with face|dash|curly|vertical bar|speaker|brightness|"
    r"input|above|pointing|hand\b|hands|fist|finger|index|speech|thought|couple|family|"
    r"person|people|man and|women|two men|\bman\b|\bmen|\bwoman\b|womens|mens|adult|"
    r"pedestrian|passport|customs|baggage|left luggage|heart\b|hearts\b|flag|accept|"
    r"banknote|no |non-|prohibit|cloud with|sun behind|sun with small|bust|silhouette|"
    r"combining|information|card index|calendar|chart|mailbox with|envelope with|tear-off|"
    r"oncoming|globe|medal|clock\b|busts|biting|lip$|deaf|kneeling|infinity|potable|"
    r"children crossing|restroom|alternation|kiss|massage|haircut|shrug|selfie|breast|"
    r"mirror ball|part alternation|twisted|repeat|with cancellation|musical note|emblem|"
    r"wheelchair|hands?$|x-ray|identification|placard|label|radio button"
)
_FACE_BLOCKS = ((0x1F600, 0x1F64F), (0x1F910, 0x1F92F), (0x1F970, 0x1F97A), (0x1FAE0, 0x1FAE6))
_OTHER_BLOCKS = ((0x2648, 0x2653), (0x1F7E0, 0x1F7F0), (0x1F1E6, 0x1F1FF), (0x1F442, 0x1F450))
_SCANNED = ((0x2300, 0x2C00), (0x1F000, 0x1FB00))
_RENAMED = {  # Unicode's names where nobody would type them
    "black sun with rays": "sun",
    "aubergine": "eggplant",
    "ear of maize": "corn cob",
    "ear of rice": "rice plant",
    "extraterrestrial alien": "alien",
    "alien monster": "space invader",
    "automobile": "car",
    "recreational vehicle": "suv",
    "electric light bulb": "light bulb",
    "electric torch": "flashlight",
    "hocho": "kitchen knife",
    "wrapped present": "gift box",
    "father christmas": "santa claus",
    "mother christmas": "mrs claus",
    "spouting whale": "whale spouting water",
    "black scissors": "scissors",
    "black telephone": "telephone",
    "left-pointing magnifying glass": "magnifying glass",
    "lower left crayon": "crayon",
    "lower left paintbrush": "paintbrush",
    "lower left ballpoint pen": "ballpoint pen",
    "lower left fountain pen": "fountain pen",
    "three button mouse": "computer mouse",
    "white medium star": "star",
    "lady beetle": "ladybug",
    "sauropod": "long-necked dinosaur",
    "t-rex": "tyrannosaurus",
    "moyai": "stone head statue",
    "hot beverage": "hot coffee",
    "high voltage": "lightning bolt",
}


@dataclass(frozen=True)
class Subject:
    """One drawable thing: its code point and the name captions use."""

    code: int
    name: str

    @property
    def slug(self) -> str:
        """File-name form of the name, e.g. ``steam-locomotive``."""
        return re.sub(r"[^a-z0-9]+", "-", self.name).strip("-")


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    try:
        return ImageFont.truetype(FONT_PATH, FONT_SIZE)
    except OSError as error:
        raise SystemExit(
            f"The emoji font is missing at {FONT_PATH}; "
            "install it with: apt-get install fonts-noto-color-emoji"
        ) from error


@lru_cache(maxsize=2048)
def glyph(code: int) -> Image.Image:
    """The emoji as an RGBA picture cropped to its ink."""
    canvas = Image.new("RGBA", (160, 150))
    ImageDraw.Draw(canvas).text((8, 8), chr(code), font=_font(), embedded_color=True)
    return canvas.crop(canvas.getbbox() or (0, 0, 1, 1))


def is_reserved(code: int) -> bool:
    """Whether the code point is kept for outside evaluation."""
    return code % RESERVED_MODULUS == RESERVED_REMAINDER


def reserved_words() -> set[str]:
    """Words of the names of all reserved code points, for lists of words to leave out."""
    return {
        word
        for low, high in _SCANNED
        for code in range(low, high)
        if is_reserved(code)
        for word in re.findall(r"[a-z]+", unicodedata.name(chr(code), "").lower())
    }


def _drawable(code: int, missing: bytes) -> bool:
    picture = glyph(code)
    ink = int((np.asarray(picture)[..., 3] > 0).sum())
    return ink > 1500 and picture.tobytes() != missing


@lru_cache(maxsize=1)
def all_subjects() -> tuple[Subject, ...]:
    """Every usable subject, in code-point order, without the reserved ones."""
    missing = glyph(0x10FFFD).tobytes()
    found: list[Subject] = []
    for low, high in _SCANNED:
        for code in range(low, high):
            name = unicodedata.name(chr(code), "").lower()
            if not name or is_reserved(code) or _NOT_A_THING.search(name):
                continue
            if any(a <= code <= b for a, b in (*_FACE_BLOCKS, *_OTHER_BLOCKS)):
                continue
            if _drawable(code, missing):
                found.append(Subject(code, _RENAMED.get(name, name)))
    return tuple(found)
