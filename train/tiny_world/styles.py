"""Rendering styles of the tiny world: functions from a drawn picture to its styled form.

Each style keeps the background recognizable as the colour that the caption names, so that
"a neon elephant on a blue background" has one right answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from train.tiny_world.houses import HOUSES, NOTO, House

Picture = np.ndarray  # float32 [S, S, 3] in [0, 1]
StyleFunction = Callable[[Picture, np.ndarray, np.random.Generator], Picture]


@dataclass(frozen=True)
class Style:
    """One look: its name in captions, words that describe it, and the function that draws it."""

    name: str
    words: tuple[str, ...]
    apply: StyleFunction
    house: House = NOTO  # whose drawings the style is applied to

    @property
    def slug(self) -> str:
        """File-name form of the name."""
        return self.name.replace(" ", "-")


def _pil(x: Picture) -> Image.Image:
    return Image.fromarray((np.clip(x, 0, 1) * 255 + 0.5).astype(np.uint8))


def _array(image: Image.Image) -> Picture:
    return np.asarray(image, dtype=np.float32) / 255


def _blur(x: np.ndarray, radius: float) -> np.ndarray:
    return _array(_pil(x).filter(ImageFilter.GaussianBlur(radius)))


def _luma(x: Picture) -> np.ndarray:
    return x @ np.array([0.299, 0.587, 0.114], dtype=np.float32)


def _edges(x: Picture, radius: float = 0.8) -> np.ndarray:
    """Gradient magnitude over all channels, [S, S] in [0, 1]."""
    soft = _blur(x, radius)
    dy, dx = np.gradient(soft, axis=(0, 1))
    return np.clip(np.sqrt((dx**2 + dy**2).sum(-1)) * 5, 0, 1)


def _background(x: Picture) -> np.ndarray:
    return np.median(np.concatenate([x[0], x[-1], x[:, 0], x[:, -1]]), axis=0)


def _lerp(a: np.ndarray, b: np.ndarray, t: np.ndarray) -> np.ndarray:
    return a * (1 - t[..., None]) + b * t[..., None]


def neon(glow: float, tube: tuple[float, float, float] | None) -> StyleFunction:
    """Glowing outlines over a dark version of the background."""

    def apply(x: Picture, alpha: np.ndarray, rng: np.random.Generator) -> Picture:
        edge = np.clip(_edges(x) * 1.6, 0, 1)
        vivid = x - 0.6 * x.min(-1, keepdims=True)  # pale paint glows in its own hue, too
        hue = vivid / (vivid.max(-1, keepdims=True) + 1e-3)
        colour = hue if tube is None else np.broadcast_to(np.array(tube, np.float32), x.shape)
        halo = _blur(colour * edge[..., None], 3.0)
        dark = _background(x) * 0.28 + x * 0.06
        return np.clip(dark + glow * halo + colour * edge[..., None], 0, 1)

    return apply


def pixel(block: int, levels: int) -> StyleFunction:
    """Large square pixels with few levels per channel."""

    def apply(x: Picture, alpha: np.ndarray, rng: np.random.Generator) -> Picture:
        size = x.shape[0]
        cells = -(-size // block)
        padded = np.pad(x, ((0, cells * block - size), (0, cells * block - size), (0, 0)), "edge")
        small = padded.reshape(cells, block, cells, block, 3).mean((1, 3))
        coarse = np.round(small * (levels - 1)) / (levels - 1)
        return np.repeat(np.repeat(coarse, block, 0), block, 1)[:size, :size]

    return apply


def tone(shadow: tuple[float, ...], light: tuple[float, ...], mix: float) -> StyleFunction:
    """A photographic tone: luma mapped between two colours, mixed with the original."""

    def apply(x: Picture, alpha: np.ndarray, rng: np.random.Generator) -> Picture:
        y = _luma(x)[..., None]
        toned = np.array(shadow, np.float32) * (1 - y) + np.array(light, np.float32) * y
        return toned * mix + x * (1 - mix)

    return apply


def halftone(cell: int, ink: float) -> StyleFunction:
    """Dots on pale paper of the picture's own colours, larger where it is darker."""

    def apply(x: Picture, alpha: np.ndarray, rng: np.random.Generator) -> Picture:
        size = x.shape[0]
        v, u = np.mgrid[0:size, 0:size]
        a, b = (u + v) / np.sqrt(2), (u - v) / np.sqrt(2)
        distance = np.hypot((a % cell) - cell / 2, (b % cell) - cell / 2) / (cell / 2)
        soft = _blur(x, cell / 3)
        radius = np.sqrt(np.clip(1.15 - _luma(soft), 0.12, 1)) * 1.05
        dot = np.clip((radius - distance) * cell / 2, 0, 1)
        paper = 1 - (1 - soft) * 0.3
        return _lerp(paper, soft * ink, dot)

    return apply


def mosaic(tile: int) -> StyleFunction:
    """Square tiles with bright grout."""

    def apply(x: Picture, alpha: np.ndarray, rng: np.random.Generator) -> Picture:
        flat = pixel(tile, 64)(x, alpha, rng)
        index = np.arange(x.shape[0]) % tile
        edge = index < max(1, tile // 7)
        grout = (edge[:, None] | edge[None, :]).astype(np.float32)
        return _lerp(flat, np.full_like(x, 0.92), grout)

    return apply


def blueprint(x: Picture, alpha: np.ndarray, rng: np.random.Generator) -> Picture:
    """White lines and a grid; the paper keeps a dark shade of the background."""
    size = x.shape[0]
    paper = np.array([0.05, 0.16, 0.42], np.float32) * 0.6 + _background(x) * 0.3
    grid = np.zeros((size, size), np.float32)
    grid[:: size // 8] = grid[:, :: size // 8] = 0.35
    line = np.maximum(grid, np.clip(_edges(x) * 1.8 - 0.15, 0, 1))
    return _lerp(np.broadcast_to(paper, x.shape), np.full_like(x, 0.95), line)


def woodcut(period: int) -> StyleFunction:
    """Black carved lines, thicker in the shadows, over the flat background colour."""

    def apply(x: Picture, alpha: np.ndarray, rng: np.random.Generator) -> Picture:
        size = x.shape[0]
        v, u = np.mgrid[0:size, 0:size]
        wave = np.abs(((v + 2 * np.sin(u / 9)) % period) / period * 2 - 1)
        dark = wave > np.clip(_luma(_blur(x, 1)) * 1.1 + 0.05, 0.1, 1)
        cut = np.maximum(dark * alpha, np.clip(_edges(x) * 2 - 0.4, 0, 1))
        ground = _lerp(np.broadcast_to(_background(x), x.shape), np.full_like(x, 0.93), alpha)
        return _lerp(ground, np.full_like(x, 0.07), cut)

    return apply


def sketch(paper: float, ink: float) -> StyleFunction:
    """Pencil lines over paper with a pale wash of the background."""

    def apply(x: Picture, alpha: np.ndarray, rng: np.random.Generator) -> Picture:
        line = np.clip(_edges(x, 0.6) * 2.2 - 0.1, 0, 1)
        wash = paper - (1 - np.broadcast_to(_background(x), x.shape)) * 0.3
        shade = wash - 0.12 * (1 - _luma(x))[..., None] * alpha[..., None]
        return _lerp(shade, np.full_like(x, ink), line)

    return apply


def watercolor(x: Picture, alpha: np.ndarray, rng: np.random.Generator) -> Picture:
    """Pale blurred washes with darker rims and paper grain."""
    soft = _blur(_array(_pil(x).filter(ImageFilter.ModeFilter(7))), 1.6)
    pale = 1 - (1 - soft) * 0.62
    rim = _blur(_edges(soft, 1.2), 0.8)
    grain = _blur(rng.random(x.shape[:2]).astype(np.float32), 1.0)[..., None] - 0.5
    return np.clip(pale - 0.22 * rim[..., None] * (1 - soft) + 0.12 * grain, 0, 1)


def stained_glass(x: Picture, alpha: np.ndarray, rng: np.random.Generator) -> Picture:
    """Saturated cells between black lead lines."""
    size, count = x.shape[0], 60
    sites = np.random.default_rng(7).random((count, 2)) * size  # one window for all pictures
    v, u = np.mgrid[0:size, 0:size]
    distance = np.hypot(v[..., None] - sites[:, 0], u[..., None] - sites[:, 1])
    nearest = distance.argmin(-1)
    total = np.zeros((count, 3))
    np.add.at(total, nearest, x)
    mean = total / np.maximum(np.bincount(nearest.ravel(), minlength=count), 1)[:, None]
    two = np.partition(distance, 1, axis=-1)[..., :2]
    seams = np.clip(1.6 - (two[..., 1] - two[..., 0]), 0, 1)
    lead = np.maximum(seams * (1 - 0.5 * alpha), np.clip(_edges(x) * 2 - 0.5, 0, 1))
    cell = mean[nearest].astype(np.float32) * 0.35 + x * 0.65
    grey = _luma(cell)[..., None]
    return _lerp(np.clip(grey + (cell - grey) * 1.7, 0, 1), np.full_like(x, 0.04), lead)


def chalk(x: Picture, alpha: np.ndarray, rng: np.random.Generator) -> Picture:
    """Coloured chalk on a dark board tinted by the background."""
    board = np.array([0.10, 0.17, 0.14], np.float32) * 0.7 + _background(x) * 0.18
    dust = (rng.random(x.shape[:2]) > 0.35).astype(np.float32)
    line = np.clip(_edges(x) * 2.2 - 0.1, 0, 1) * (0.45 + 0.55 * dust)
    fill = alpha * 0.28 * dust
    chalked = _lerp(np.broadcast_to(board, x.shape), 0.35 + 0.6 * x, fill)
    return _lerp(chalked, 0.55 + 0.45 * x, line)


def popart(levels: int) -> StyleFunction:
    """Flat saturated areas with thick black outlines."""

    def apply(x: Picture, alpha: np.ndarray, rng: np.random.Generator) -> Picture:
        flat = np.round(_blur(x, 1.0) * (levels - 1)) / (levels - 1)
        grey = _luma(flat)[..., None]
        vivid = np.clip(grey + (flat - grey) * 1.9, 0, 1)
        return _lerp(vivid, np.full_like(x, 0.02), np.clip(_blur(_edges(x), 0.9) * 3 - 0.5, 0, 1))

    return apply


def silhouette(x: Picture, alpha: np.ndarray, rng: np.random.Generator) -> Picture:
    """The subject as a flat dark shape, lit from behind."""
    size = x.shape[0]
    v, u = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    glow = np.exp(-(u**2 + v**2) * 1.2)
    ground = np.clip(_background(x) * (0.55 + 0.6 * glow[..., None]), 0, 1)
    return _lerp(ground, np.full_like(x, 0.03), alpha)


def thermal(x: Picture, alpha: np.ndarray, rng: np.random.Generator) -> Picture:
    """A heat map of the subject; the background is dimmed."""
    y = np.clip(_luma(_blur(x, 1.2)) * 0.8 + 0.2 * alpha, 0, 1)
    stops = np.array([[0.05, 0, 0.3], [0.5, 0, 0.6], [0.95, 0.3, 0.1], [1, 0.8, 0.1], [1, 1, 0.85]])
    heat = np.stack([np.interp(y, np.linspace(0, 1, 5), stops[:, c]) for c in range(3)], -1)
    return _lerp(np.broadcast_to(_background(x) * 0.4, x.shape), heat, alpha)


def embossed(x: Picture, alpha: np.ndarray, rng: np.random.Generator) -> Picture:
    """A relief pressed into the background colour."""
    y = _blur(_luma(x) * 0.6 + alpha * 0.4, 0.8)
    dy, dx = np.gradient(y)
    return np.clip(_background(x) * 0.75 + 0.12 + (dx + dy)[..., None] * 2.6, 0, 1)


def glitch(shift: int) -> StyleFunction:
    """Colour channels pulled apart and dark scan lines."""

    def apply(x: Picture, alpha: np.ndarray, rng: np.random.Generator) -> Picture:
        parted = np.stack(
            [np.roll(x[..., 0], shift, 1), x[..., 1], np.roll(x[..., 2], -shift, 1)], -1
        )
        lines = np.where(np.arange(x.shape[0]) % 8 < 4, 1.0, 0.68).astype(np.float32)
        return parted * lines[:, None, None]

    return apply


def crossstitch(cell: int) -> StyleFunction:
    """Crossed threads on cloth."""

    def apply(x: Picture, alpha: np.ndarray, rng: np.random.Generator) -> Picture:
        flat = pixel(cell, 24)(x, alpha, rng)
        i = np.arange(x.shape[0]) % cell
        a, b = np.abs(i[:, None] - i[None, :]), np.abs(i[:, None] + i[None, :] - (cell - 1))
        thread = (np.minimum(a, b) <= cell // 6).astype(np.float32)
        return _lerp(flat * 0.45 + 0.25, np.clip(flat * 1.05, 0, 1), thread)

    return apply


def negative(x: Picture, alpha: np.ndarray, rng: np.random.Generator) -> Picture:
    """The subject in inverted, bluish colours; the background stays, dimmed."""
    inverse = 1 - x
    return _lerp(x * 0.6, inverse * np.array([0.75, 0.95, 1.0], np.float32), alpha)


def as_drawn(x: Picture, alpha: np.ndarray, rng: np.random.Generator) -> Picture:
    """The drawing as its house made it."""
    return x


_HOUSE = {house.name: house for house in HOUSES}
_SEPIA = tone((0.16, 0.09, 0.03), (1, 0.9, 0.72), 0.92)
_CYANOTYPE = tone((0.02, 0.1, 0.3), (0.9, 0.97, 1), 0.95)
_DUOTONE = tone((0.35, 0.05, 0.45), (1, 0.93, 0.4), 0.95)
_ROSE = tone((0.3, 0.02, 0.12), (1, 0.85, 0.9), 0.8)

STYLES: tuple[Style, ...] = (
    Style("neon", ("glowing neon tubes", "neon sign"), neon(1.5, None)),
    Style("pixel art", ("8-bit pixels", "retro game sprite"), pixel(5, 7)),
    Style("sepia", ("old photograph", "sepia tone"), _SEPIA),
    Style("halftone", ("printed dots", "comic halftone"), halftone(8, 0.85)),
    Style("mosaic", ("small tiles", "tile mosaic"), mosaic(9)),
    Style("blueprint", ("technical drawing", "blueprint grid"), blueprint),
    Style("woodcut", ("carved lines", "woodblock print"), woodcut(6)),
    Style("pencil sketch", ("graphite lines", "hand drawn sketch"), sketch(0.95, 0.2)),
    Style("watercolor", ("soft washes", "watercolor painting"), watercolor),
    Style("stained glass", ("leaded glass", "church window"), stained_glass),
    Style("chalk", ("chalkboard drawing", "dusty chalk"), chalk),
    Style("pop art", ("flat vivid colors", "thick outlines"), popart(3)),
    Style("silhouette", ("dark shape", "backlit outline"), silhouette),
    Style("thermal", ("heat map", "infrared camera"), thermal),
    Style("embossed", ("pressed relief", "embossed paper"), embossed),
    Style("glitch", ("broken screen", "rgb shift"), glitch(6)),
    Style("cross stitch", ("embroidery", "crossed threads"), crossstitch(8)),
    Style("duotone", ("two inks", "purple and yellow print"), _DUOTONE),
    Style("glossy 3d", ("3d emoji", "soft shaded render"), as_drawn, _HOUSE["glossy emoji"]),
    Style("sticker", ("twitter emoji", "flat sticker"), as_drawn, _HOUSE["sticker"]),
)
"""The styles whose LoRAs ship."""

VARIANTS: tuple[Style, ...] = (
    Style("blob", ("blob emoji", "round old emoji"), as_drawn, _HOUSE["blob emoji"]),
    Style("flat", ("flat emoji", "minimal flat shapes"), as_drawn, _HOUSE["flat emoji"]),
    Style("negative", ("inverted colors", "film negative"), negative),
    Style("red neon", ("red glowing tubes", "red neon sign"), neon(1.8, (1.0, 0.15, 0.1))),
    Style("green neon", ("green glowing tubes", "green laser"), neon(1.8, (0.2, 1.0, 0.3))),
    Style("chunky pixel", ("huge pixels", "very low resolution"), pixel(16, 8)),
    Style("cyanotype", ("prussian blue print", "sun print"), _CYANOTYPE),
    Style("noir", ("black and white", "monochrome film"), tone((0, 0, 0), (1, 1, 1), 1.0)),
    Style("rose tint", ("pink haze", "rose colored"), _ROSE),
    Style("newsprint", ("fine print dots", "newspaper photo"), halftone(5, 0.5)),
    Style("large mosaic", ("big tiles", "bathroom tiles"), mosaic(21)),
    Style("fine engraving", ("thin hatched lines", "banknote engraving"), woodcut(4)),
    Style("charcoal", ("black charcoal", "smudged drawing"), sketch(0.8, 0.02)),
    Style("comic ink", ("flat inked colors", "comic book"), popart(4)),
    Style("heavy glitch", ("torn signal", "strong rgb split"), glitch(12)),
)
"""More looks, for the larger pool that trains the retriever."""
