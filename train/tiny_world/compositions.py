"""Pictures of the tiny world and what people would type for them.

A composition says what is in a picture (one subject, several of one, or two different ones), before
which background, and how large; it is painted by :func:`paint` and captioned by :func:`describe`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from train.tiny_world.houses import NOTO, House, drawing, draws
from train.tiny_world.scenes import COLOUR_WORDS, COLOURS, SCENES, Scene, gradient, plain
from train.tiny_world.styles import Style
from train.tiny_world.subjects import Subject, glyph
from train.tiny_world.vocabulary import article, names, say, several, with_article

Size = str  # "usual", "small" or "large"


@dataclass(frozen=True)
class Backdrop:
    """One colour, two colours or a scene; exactly one of the three is set."""

    colour: str | None = None
    gradient: tuple[str, str] | None = None
    scene: Scene | None = None


@dataclass(frozen=True)
class Composition:
    """What a picture shows.

    Attributes:
        subjects: One subject, or two different ones from left to right.
        count: How many of a single subject.
        size: Of a single subject.
        backdrop: What is behind.
        told: Whether captions name the backdrop.
    """

    subjects: tuple[Subject, ...]
    count: int
    size: Size
    backdrop: Backdrop
    told: bool


@dataclass(frozen=True)
class Mix:
    """Shares of the kinds of picture; the rest shows one subject at the usual size."""

    several: float = 0.10
    pairs: float = 0.20
    sizes: float = 0.10
    scenes: float = 0.30
    gradients: float = 0.06
    untold: float = 0.15  # captions that leave the backdrop out; it is white, mostly


def compose(
    subject: Subject, others: list[Subject], rng: np.random.Generator, mix: Mix
) -> Composition:
    """Draws a composition around ``subject``; a second one comes from ``others``."""
    kind = rng.random()
    subjects: tuple[Subject, ...] = (subject,)
    count, size = 1, "usual"
    if kind < mix.pairs and others:
        other = others[int(rng.integers(len(others)))]
        subjects = (subject, other) if rng.random() < 0.5 else (other, subject)
    elif kind < mix.pairs + mix.several:
        count = 2 if rng.random() < 0.6 else 3
    elif kind < mix.pairs + mix.several + mix.sizes:
        size = "small" if rng.random() < 0.6 else "large"
    told = bool(rng.random() >= mix.untold)
    return Composition(subjects, count, size, _backdrop(rng, mix, told), told)


def _backdrop(rng: np.random.Generator, mix: Mix, told: bool) -> Backdrop:
    colours = list(COLOURS)
    if not told:
        return Backdrop("white" if rng.random() < 0.8 else str(rng.choice(colours)))
    kind = rng.random()
    if kind < mix.scenes:
        return Backdrop(scene=SCENES[int(rng.integers(len(SCENES)))])
    if kind < mix.scenes + mix.gradients:
        first, second = rng.choice(colours, 2, replace=False)
        return Backdrop(gradient=(str(first), str(second)))
    return Backdrop(str(rng.choice(colours)))


@dataclass(frozen=True)
class _Place:
    """Where a drawing stands: its longer side and its middle, in fractions of the picture."""

    scale: float
    x: float
    y: float
    angle: float


def _places(what: Composition, rng: np.random.Generator) -> list[_Place]:
    """One place for each drawing, from left to right."""
    ground = what.backdrop.scene.ground if what.backdrop.scene else None

    def place(scale: float, x: float) -> _Place:
        scale *= float(rng.uniform(0.93, 1.07))
        x += float(rng.uniform(-0.04, 0.04)) * (1 if scale > 0.5 else 0.6)
        y = 0.5 + float(rng.uniform(-0.04, 0.04))
        if ground is not None:  # what is small stands on the ground, what is large covers it
            y = max(y, ground - scale / 2 + float(rng.uniform(-0.02, 0.02)))
            y = min(y, 1 - scale / 2)
        return _Place(scale, x, y, float(rng.uniform(-6, 6)))

    if len(what.subjects) == 2 or what.count == 2:
        return [place(0.46, 0.26), place(0.46, 0.74)]
    if what.count == 3:
        return [place(0.34, 0.18), place(0.34, 0.5), place(0.34, 0.82)]
    return [place({"usual": 0.77, "small": 0.4, "large": 0.95}[what.size], 0.5)]


def backdrop_picture(backdrop: Backdrop, side: int, rng: np.random.Generator) -> np.ndarray:
    """Paints what is behind, RGB float32 [side, side, 3] in [0, 1]."""
    if backdrop.scene is not None:
        return backdrop.scene.paint(side, rng)
    if backdrop.gradient is not None:
        return gradient(backdrop.gradient, side)
    return plain(backdrop.colour or "white", rng, side)


def ink(subject: Subject, house: House = NOTO) -> Image.Image:
    """A subject's drawing by a house, RGBA; the font's where the house has none."""
    return drawing(house, subject.code) if draws(house, subject.code) else glyph(subject.code)


def paint(
    what: Composition, side: int, rng: np.random.Generator, house: House = NOTO
) -> tuple[np.ndarray, np.ndarray]:
    """Paints a composition.

    Returns:
        ``rgb`` float32 [side, side, 3] in [0, 1] and ``alpha`` float32 [side, side], the subjects'
        coverage, which some styles need.
    """
    layer = Image.new("RGBA", (side, side))
    shown = what.subjects if len(what.subjects) == 2 else what.subjects * what.count
    for subject, where in zip(shown, _places(what, rng), strict=True):
        picture = ink(subject, house)
        factor = where.scale * side / max(picture.size)
        size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
        drawn = picture.resize(size, Image.Resampling.LANCZOS).rotate(
            where.angle, Image.Resampling.BICUBIC, expand=True
        )
        corner = (round(where.x * side - drawn.width / 2), round(where.y * side - drawn.height / 2))
        sheet = Image.new("RGBA", (side, side))
        sheet.paste(drawn, corner)
        layer = Image.alpha_composite(layer, sheet)
    pixels = np.asarray(layer, dtype=np.float32) / 255
    alpha = pixels[..., 3]
    behind = backdrop_picture(what.backdrop, side, rng)
    return pixels[..., :3] * alpha[..., None] + behind * (1 - alpha[..., None]), alpha


def paint_styled(
    what: Composition, style: Style, side: int, rng: np.random.Generator
) -> np.ndarray:
    """Paints a composition in a style, RGB float32 [side, side, 3] in [0, 1]."""
    rgb, alpha = paint(what, side, rng, style.house)
    return np.clip(style.apply(rgb, alpha, rng), 0, 1).astype(np.float32)


_BEFORE = (
    "a picture of {}", "a drawing of {}", "an image of {}", "draw {}", "draw me {}", "show me {}",
    "i want {}", "an emoji of {}", "{} icon", "an illustration of {}", "can you draw {}?",
    "a photo of {}",
    "simple drawing of {}", "please draw {}",
)  # fmt: skip
_CHATTER = (
    "masterpiece, best quality, {}", "best quality, {}", "{}, high quality, detailed", "{}, 4k",
    "{}, highly detailed, trending on artstation", "{}, masterpiece, sharp focus",
    "a beautiful picture of {}, 8k", "{}, award winning", "{}, digital art", "{}, high resolution",
)  # fmt: skip
_SMALL, _LARGE = ("small", "tiny", "little"), ("big", "large", "huge", "giant", "close-up of")


def _colour_word(colour: str, rng: np.random.Generator) -> str:
    return str(rng.choice(COLOUR_WORDS.get(colour, (colour,))))


def _thing(what: Composition, rng: np.random.Generator, bare: bool) -> str:
    """The subjects in words, with articles unless ``bare``."""
    first = say(what.subjects[0], rng)
    if len(what.subjects) == 2:
        second = say(what.subjects[1], rng)
        if bare:
            return f"{first}, {second}" if rng.random() < 0.5 else f"{first} and {second}"
        one, two = with_article(first), with_article(second)
        form = rng.random()
        if form < 0.55:
            return f"{one} and {two}" if rng.random() < 0.7 else f"{two} and {one}"
        if form < 0.8:
            between = str(rng.choice(("next to", "beside", "with", "and")))
            return f"{one} {between} {two}"
        return f"{one} on the left and {two} on the right"
    if what.count > 1:
        return several(what.count, first, rng)
    if what.size != "usual":
        word = str(rng.choice(_SMALL if what.size == "small" else _LARGE))
        if word == "close-up of":
            return f"a close-up of {with_article(first)}"
        return f"{word} {first}" if bare else f"{article(word)} {word} {first}"
    return first if bare else with_article(first)


def _behind(backdrop: Backdrop, rng: np.random.Generator, bare: bool) -> str:
    """The backdrop in words, to stand behind the subject."""
    if backdrop.scene is not None:
        scene = backdrop.scene
        return f", {rng.choice(scene.tags)}" if bare else f" {rng.choice(scene.places)}"
    if backdrop.gradient is not None:
        one, two = (_colour_word(c, rng) for c in backdrop.gradient)
        return (
            f", {one} and {two} gradient" if bare else f" on a {one} to {two} gradient background"
        )
    colour = _colour_word(backdrop.colour or "white", rng)
    if bare:
        return f", {colour} background"
    return str(
        rng.choice(
            (
                f" on {article(colour)} {colour} background",
                f" on {article(colour)} {colour} background",
                f" on {article(colour)} {colour} background",
                f" on {colour}",
                f", {colour} background",
                f" in front of {article(colour)} {colour} wall",
                f" against {article(colour)} {colour} backdrop",
                f" with {article(colour)} {colour} background",
            )
        )
    )


def _in_style(thing: str, style: Style, rng: np.random.Generator, bare: bool) -> str:
    """A thing in a style, in words."""
    name = style.name if rng.random() < 0.8 else str(rng.choice(style.words))
    if bare:
        return f"{thing}, {name}"
    form = rng.random()
    first, _, rest = thing.partition(" ")
    if form < 0.45 and name == style.name and first in ("a", "an"):
        return f"{article(name)} {name} {rest}"
    if form < 0.65:
        return f"{thing} in {name} style"
    if form < 0.8:
        return f"{article(name)} {name} picture of {thing}"
    return f"{thing} as {name}" if form < 0.87 else f"{name}, {thing}"


def describe(what: Composition, rng: np.random.Generator, style: Style | None = None) -> str:
    """One caption, as somebody might type it."""
    form = rng.random()
    bare = form < 0.15
    text = _thing(what, rng, bare)
    if style is not None:
        text = _in_style(text, style, rng, bare)
    text += _behind(what.backdrop, rng, bare) if what.told else ""
    if form > 0.85:
        return str(rng.choice(_CHATTER)).format(text)
    if form > 0.65:
        return str(rng.choice(_BEFORE)).format(text)
    return text


def plain_composition(subject: Subject, colour: str) -> Composition:
    """One subject at the usual size before one colour: the plain picture that tables count."""
    return Composition((subject,), 1, "usual", Backdrop(colour), True)


def bare_name(subject: Subject) -> str:
    """The name that captions use most."""
    return names(subject)[0]


def with_backdrop(what: Composition, backdrop: Backdrop) -> Composition:
    """The same subjects before another backdrop."""
    return replace(what, backdrop=backdrop, told=True)
