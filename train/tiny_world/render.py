"""Draws a subject on a coloured background, as RGB arrays for the tiny world."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from train.tiny_world.subjects import Subject, glyph

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


@dataclass(frozen=True)
class View:
    """How a subject stands in the picture: fractions of the side, degrees, colour."""

    scale: float
    shift: tuple[float, float]
    angle: float
    colour: str
    tint: tuple[int, int, int]  # the background as painted: the colour with a little jitter


def random_view(rng: np.random.Generator, colour: str | None = None) -> View:
    """Draws a view; poses vary little, so that shapes are learned before poses."""
    colour = colour or str(rng.choice(list(COLOURS)))
    jitter = rng.integers(-8, 9, 3)
    tint = tuple(int(v) for v in np.clip(np.array(COLOURS[colour]) + jitter, 0, 255))
    shift = (float(rng.uniform(-0.05, 0.05)), float(rng.uniform(-0.05, 0.05)))
    return View(float(rng.uniform(0.72, 0.84)), shift, float(rng.uniform(-6, 6)), colour, tint)  # type: ignore[arg-type]


def render(subject: Subject, view: View, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Paints one view.

    Returns:
        ``rgb`` float32 [size, size, 3] in [0, 1] and ``alpha`` float32 [size, size], the
        subject's coverage, which some styles need.
    """
    ink = glyph(subject.code)
    factor = view.scale * size / max(ink.size)
    ink = ink.resize(
        (max(1, round(ink.width * factor)), max(1, round(ink.height * factor))),
        Image.Resampling.LANCZOS,
    ).rotate(view.angle, Image.Resampling.BICUBIC, expand=True)
    layer = Image.new("RGBA", (size, size))
    x = round((size - ink.width) / 2 + view.shift[0] * size)
    y = round((size - ink.height) / 2 + view.shift[1] * size)
    layer.paste(ink, (x, y))
    pixels = np.asarray(layer, dtype=np.float32) / 255
    alpha = pixels[..., 3]
    background = np.array(view.tint, dtype=np.float32) / 255
    return pixels[..., :3] * alpha[..., None] + background * (1 - alpha[..., None]), alpha
