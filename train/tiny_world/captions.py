"""The plain prompts that tables count with, and the captions of covers."""

from __future__ import annotations

import numpy as np

from train.tiny_world.styles import Style
from train.tiny_world.vocabulary import article, with_article


def prompt(subject: str, colour: str, style: str | None = None) -> str:
    """The plain form that evaluation uses: "a neon elephant on a blue background"."""
    thing = f"{article(style)} {style} {subject}" if style else with_article(subject)
    return f"{thing} on {article(colour)} {colour} background"


def cover_captions(
    subject: str, colour: str, rng: np.random.Generator, style: Style | None = None
) -> list[str]:
    """A long, a medium and a short caption of one cover picture."""
    if style is None:
        return [
            f"a simple colorful drawing of {with_article(subject)}, centered, "
            f"on {article(colour)} plain {colour} background",
            prompt(subject, colour),
            subject,
        ]
    words = str(rng.choice(style.words))
    return [
        f"{with_article(subject)} in {style.name} style, {words}, "
        f"on {article(colour)} {colour} background",
        prompt(subject, colour, style.name),
        f"{style.name} style",
    ]
