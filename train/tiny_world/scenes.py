"""Backgrounds of the tiny world: plain colours, gradients and simple scenes.

Scenes are painted from a few shapes, so that no subject hides in them. A painter takes the side in
pixels and a generator and returns RGB, float32 [side, side, 3] in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Picture = np.ndarray
Painter = Callable[[int, np.random.Generator], Picture]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 48, 49),
    "orange": (240, 140, 50),
    "yellow": (250, 214, 80),
    "green": (70, 165, 85),
    "teal": (40, 160, 160),
    "blue": (60, 110, 220),
    "purple": (130, 75, 190),
    "pink": (245, 150, 190),
    "brown": (130, 85, 55),
    "black": (25, 25, 28),
    "gray": (140, 142, 148),
    "white": (248, 248, 246),
}
COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    "gray": ("gray", "grey"),
    "purple": ("purple", "violet"),
    "teal": ("teal", "turquoise"),
    "red": ("red", "crimson"),
}
"""What captions call a colour, where there is more than one word."""


@dataclass(frozen=True)
class Scene:
    """One kind of background.

    Attributes:
        name: As the world's tables call it.
        places: How captions say it behind a subject ("a cat at night").
        tags: How captions say it as a tag ("cat, night sky").
        paint: Draws it.
        ground: Height of the ground from the top, where subjects stand; None where they float.
    """

    name: str
    places: tuple[str, ...]
    tags: tuple[str, ...]
    paint: Painter
    ground: float | None = None


def _rgb(*stops: tuple[int, int, int]) -> np.ndarray:
    return np.array(stops, dtype=np.float32) / 255


def _vertical(side: int, stops: np.ndarray, at: list[float] | None = None) -> Picture:
    """Colours blended from top to bottom."""
    y = np.linspace(0, 1, side)
    at = list(np.linspace(0, 1, len(stops))) if at is None else at
    column = np.stack([np.interp(y, at, stops[:, c]) for c in range(3)], -1)
    return np.repeat(column[:, None], side, 1).astype(np.float32)


def _grid(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column coordinates in [0, 1], [side, side] each."""
    v, u = np.mgrid[0:side, 0:side]
    return (v + 0.5) / side, (u + 0.5) / side


def _disc(picture: Picture, at: tuple[float, float], radius: float, colour: np.ndarray) -> None:
    """Paints a disc with a soft rim of one pixel; ``at`` is row and column in [0, 1]."""
    side = picture.shape[0]
    v, u = _grid(side)
    cover = np.clip((radius - np.hypot(v - at[0], u - at[1])) * side + 0.5, 0, 1)[..., None]
    picture[:] = picture * (1 - cover) + colour * cover


def plain(colour: str, rng: np.random.Generator, side: int) -> Picture:
    """One colour, with a little jitter."""
    tint = np.clip(np.array(COLOURS[colour]) + rng.integers(-8, 9, 3), 0, 255) / 255
    return np.broadcast_to(tint.astype(np.float32), (side, side, 3)).copy()


def gradient(colours: tuple[str, str], side: int) -> Picture:
    """Two colours, blended from top to bottom."""
    return _vertical(side, _rgb(*(COLOURS[c] for c in colours)))


def _night(side: int, rng: np.random.Generator) -> Picture:
    picture = _vertical(side, _rgb((12, 16, 52), (34, 44, 96)))
    for _ in range(int(rng.integers(14, 22))):
        at = (float(rng.uniform(0.02, 0.98)), float(rng.uniform(0.02, 0.98)))
        _disc(picture, at, float(rng.uniform(0.006, 0.014)), _rgb((250, 246, 220))[0])
    return picture


def _space(side: int, rng: np.random.Generator) -> Picture:
    picture = np.zeros((side, side, 3), np.float32) + _rgb((8, 6, 18))[0]
    for _ in range(int(rng.integers(24, 34))):
        at = (float(rng.uniform(0, 1)), float(rng.uniform(0, 1)))
        hue = _rgb((255, 255, 255), (190, 210, 255), (255, 230, 190))[int(rng.integers(3))]
        _disc(picture, at, float(rng.uniform(0.005, 0.011)), hue)
    return picture


def _sea(side: int, rng: np.random.Generator) -> Picture:
    v, u = _grid(side)
    picture = _vertical(side, _rgb((150, 208, 246), (206, 234, 250)))
    water = _vertical(side, _rgb((28, 116, 190), (16, 78, 150)))
    phase = float(rng.uniform(0, 6.28))
    for n, top in enumerate((0.56, 0.70, 0.84)):
        crest = top + 0.012 * np.sin(u * 25 + phase + 2 * n)
        cover = np.clip((v - crest) * side + 0.5, 0, 1)[..., None]
        picture = picture * (1 - cover) + (water * (1.15 - 0.13 * n)) * cover
    return np.clip(picture, 0, 1).astype(np.float32)


def _grass(side: int, rng: np.random.Generator) -> Picture:
    v, u = _grid(side)
    picture = _vertical(side, _rgb((122, 196, 248), (200, 232, 252)))
    hill = 0.64 + 0.03 * np.sin(u * 5 + float(rng.uniform(0, 6.28)))
    cover = np.clip((v - hill) * side + 0.5, 0, 1)[..., None]
    return (
        picture * (1 - cover) + _vertical(side, _rgb((120, 200, 84), (66, 150, 58))) * cover
    ).astype(np.float32)


def _snow(side: int, rng: np.random.Generator) -> Picture:
    v, u = _grid(side)
    picture = _vertical(side, _rgb((150, 176, 206), (196, 212, 230)))
    hill = 0.68 + 0.03 * np.sin(u * 4 + float(rng.uniform(0, 6.28)))
    cover = np.clip((v - hill) * side + 0.5, 0, 1)[..., None]
    picture = picture * (1 - cover) + _rgb((244, 248, 252))[0] * cover
    for _ in range(int(rng.integers(16, 24))):
        at = (float(rng.uniform(0, 0.95)), float(rng.uniform(0, 1)))
        _disc(picture, at, float(rng.uniform(0.008, 0.016)), _rgb((252, 254, 255))[0])
    return picture.astype(np.float32)


def _room(side: int, rng: np.random.Generator) -> Picture:
    v, u = _grid(side)
    wall = _rgb((236, 222, 196), (206, 222, 214), (222, 208, 226))[int(rng.integers(3))]
    picture = np.zeros((side, side, 3), np.float32) + wall
    floor = np.clip((v - 0.72) * side + 0.5, 0, 1)[..., None]
    boards = np.where(((u - 0.5) / (v - 0.35).clip(0.05) * 3 % 1) < 0.06, 0.86, 1.0)[..., None]
    picture = picture * (1 - floor) + _rgb((178, 124, 76))[0] * boards * floor
    skirting = ((v > 0.70) & (v < 0.72))[..., None]
    return np.where(skirting, _rgb((250, 248, 242))[0], picture).astype(np.float32)


def _sunset(side: int, rng: np.random.Generator) -> Picture:
    picture = _vertical(side, _rgb((70, 42, 120), (226, 88, 84), (252, 186, 92)), [0, 0.5, 0.72])
    _disc(picture, (0.68, float(rng.uniform(0.3, 0.7))), 0.13, _rgb((255, 236, 150))[0])
    v, _ = _grid(side)
    cover = np.clip((v - 0.74) * side + 0.5, 0, 1)[..., None]
    return (picture * (1 - cover) + _rgb((58, 34, 66))[0] * cover).astype(np.float32)


def _beach(side: int, rng: np.random.Generator) -> Picture:
    v, u = _grid(side)
    picture = _vertical(side, _rgb((118, 196, 246), (190, 228, 250)))
    water = np.clip((v - 0.5) * side + 0.5, 0, 1)[..., None]
    picture = picture * (1 - water) + _rgb((40, 150, 200))[0] * water
    shore = 0.66 + 0.02 * np.sin(u * 7 + float(rng.uniform(0, 6.28)))
    foam = np.clip((v - shore) * side + 2.5, 0, 1)[..., None]
    sand = np.clip((v - shore) * side + 0.5, 0, 1)[..., None]
    picture = picture * (1 - foam) + foam
    return (picture * (1 - sand) + _rgb((240, 212, 150))[0] * sand).astype(np.float32)


SCENES: tuple[Scene, ...] = (
    Scene(
        "night",
        ("at night", "in the night sky", "under the stars"),
        ("night", "starry night"),
        _night,
    ),
    Scene("space", ("in space", "in outer space"), ("space", "outer space"), _space),
    Scene("sea", ("at sea", "in the sea", "on the ocean"), ("sea", "ocean"), _sea, 0.8),
    Scene(
        "grass",
        ("on the grass", "in a meadow", "in a green field", "in the park"),
        ("grass", "green meadow"),
        _grass,
        0.86,
    ),
    Scene("snow", ("in the snow", "in winter", "on a snowy day"), ("snow", "winter"), _snow, 0.88),
    Scene("room", ("in a room", "indoors", "at home"), ("room", "indoors"), _room, 0.9),
    Scene(
        "sunset",
        ("at sunset", "in front of a sunset", "in the evening sun"),
        ("sunset", "evening"),
        _sunset,
        0.88,
    ),
    Scene(
        "beach",
        ("on the beach", "at the beach", "by the sea"),
        ("beach", "sandy beach"),
        _beach,
        0.9,
    ),
)
