"""Captions of the tiny world, in three lengths per picture."""

from __future__ import annotations

import numpy as np

from train.tiny_world.styles import Style

PLAIN = (
    "{a} {subject} on {ac} {colour} background",
    "{a} {subject} on {ac} {colour} background",
    "{a} {subject} on {ac} {colour} background",
    "{a} {subject}, {colour} background",
    "a picture of {a} {subject} on {ac} {colour} background",
    "{colour} background with {a} {subject}",
    "{a} {subject}",
)
STYLED = (
    "{as_} {style} {subject} on {ac} {colour} background",
    "{as_} {style} {subject} on {ac} {colour} background",
    "{a} {subject} in {style} style on {ac} {colour} background",
    "{as_} {style} picture of {a} {subject}, {colour} background",
    "{as_} {style} {subject}",
)


def article(word: str) -> str:
    """The indefinite article that a word takes."""
    return "an" if word[:1] in "aeiou" and not word.startswith(("uni", "uk", "eu", "one-")) else "a"


def caption(subject: str, colour: str, rng: np.random.Generator, style: Style | None = None) -> str:
    """One training caption, drawn from the templates."""
    template = str(rng.choice(PLAIN if style is None else STYLED))
    look = "" if style is None else style.name
    return template.format(
        subject=subject,
        a=article(subject),
        colour=colour,
        ac=article(colour),
        style=look,
        as_=article(look),
    )


def prompt(subject: str, colour: str, style: str | None = None) -> str:
    """The plain form that evaluation uses: "a neon elephant on a blue background"."""
    thing = f"{style} {subject}" if style else subject
    return f"{article(thing)} {thing} on {article(colour)} {colour} background"


def cover_captions(
    subject: str, colour: str, rng: np.random.Generator, style: Style | None = None
) -> list[str]:
    """A long, a medium and a short caption of one cover picture."""
    if style is None:
        return [
            f"a simple colorful drawing of {article(subject)} {subject}, centered, "
            f"on {article(colour)} plain {colour} background",
            prompt(subject, colour),
            subject,
        ]
    words = str(rng.choice(style.words))
    return [
        f"{article(subject)} {subject} in {style.name} style, {words}, "
        f"on {article(colour)} {colour} background",
        prompt(subject, colour, style.name),
        f"{style.name} style",
    ]
