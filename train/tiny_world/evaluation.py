"""Counts what generated pictures show: both judges, shares with 95 % intervals, sharpness.

Shape legend: H W sides in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor

from autolora import Pool
from autolora.errors import ConfigError
from autolora.fusion import GateBank, attached
from train.tiny_world.captions import prompt
from train.tiny_world.compositions import bare_name
from train.tiny_world.export import draw
from train.tiny_world.probes import PLAIN, Judge, efficientnet_features, name_of
from train.tiny_world.scenes import COLOURS
from train.tiny_world.subjects import Subject


def interval(right: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson, 1927)."""
    if total == 0:
        return 0.0, 1.0
    z, p = 1.96, right / total
    middle = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total**2))
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass
class Count:
    """How many pictures were right, by question and judge."""

    total: int = 0
    right: dict[tuple[str, str], int] = field(default_factory=dict)

    def add(self, judge: str, **answers: bool) -> None:
        """Adds one judge's answers about one picture."""
        for question, answer in answers.items():
            self.right[question, judge] = self.right.get((question, judge), 0) + bool(answer)

    def shares(self) -> dict[str, Any]:
        """Share and interval of each question by each judge, rounded to three digits."""
        rows: dict[str, Any] = {"pictures": self.total}
        for (question, judge), right in self.right.items():
            low, high = interval(right, self.total)
            share = right / max(1, self.total)
            rows.setdefault(question, {})[judge] = [round(v, 3) for v in (share, low, high)]
        return rows


@dataclass(frozen=True)
class Case:
    """One picture to draw and what it must show.

    Attributes:
        text: The prompt.
        subjects: Names of the subjects that must be visible.
        style: The style that must be visible, or "plain".
        adapters: File stems of the LoRAs to attach.
    """

    text: str
    subjects: tuple[str, ...]
    style: str
    adapters: tuple[str, ...]


def case(
    subject: Subject, colour: str, style: str | None = None, adapters: Sequence[str] = ()
) -> Case:
    """The plain sentence for one subject, with or without a style."""
    text = prompt(bare_name(subject), colour, style)
    return Case(text, (subject.name,), style or PLAIN, tuple(adapters))


def pair_case(first: Subject, second: Subject, adapters: Sequence[str]) -> Case:
    """Two subjects side by side."""
    text = f"{prompt(bare_name(first), 'white').removesuffix(' on a white background')} and "
    text += prompt(bare_name(second), "white")
    return Case(text, (first.name, second.name), PLAIN, tuple(adapters))


class Scorer:
    """Draws pictures with adapters attached and asks the judges what they show."""

    def __init__(
        self, pipe: Any, pool: Pool, judges: dict[str, Judge], gates: GateBank | None
    ) -> None:
        self.pipe, self.pool, self.judges, self.gates = pipe, pool, judges, gates

    def picture(self, text: str, names: Iterable[str], strategy: str, seed: int) -> Image.Image:
        """One picture with the named adapters at strength 1."""
        adapters = [(self.pool.load(name), 1.0) for name in names]
        with attached(self.pipe.dit, adapters, strategy=strategy, gates=self.gates):
            return draw(self.pipe, text, seed)

    def count(self, cases: Sequence[Case], strategy: str) -> dict[str, Any]:
        """Draws all cases, one seed each, and counts what is right."""
        return self.judge_all(
            cases, lambda case, seed: self.picture(case.text, case.adapters, strategy, seed)
        )

    def judge_all(
        self, cases: Sequence[Case], make: Callable[[Case, int], Image.Image]
    ) -> dict[str, Any]:
        """Counts what the pictures that ``make`` gives for each case show."""
        count = Count()
        for seed, one in enumerate(cases):
            picture = to_tensor(make(one, seed))
            count.total += 1
            for name, judge in self.judges.items():
                seen, style = name_of(judge, picture, windows=len(one.subjects) > 1)
                subject, look = set(one.subjects) <= seen, style == one.style
                count.add(name, subject=subject, style=look, both=subject and look)
        return count.shares()


def to_tensor(picture: Image.Image) -> Tensor:
    """A picture as [3, H, W] in [-1, 1]."""
    array = np.asarray(picture.convert("RGB")).copy()
    return torch.from_numpy(array).permute(2, 0, 1).float() / 127.5 - 1


def colours(count: int, seed: int) -> list[str]:
    """Background colours in a fixed sequence."""
    rng = np.random.default_rng(seed)
    return [str(c) for c in rng.choice(list(COLOURS), count)]


def read_people_prompts(path: Path) -> list[Case]:
    """The list of prompts as people type them.

    Raises:
        ConfigError: If an entry lacks its prompt or what it shows.
    """
    cases = []
    for entry in yaml.safe_load(path.read_text(encoding="utf-8")):
        if not {"prompt", "shows"} <= set(entry):
            raise ConfigError(f"{path}: every entry needs `prompt` and `shows`, not {entry}.")
        style = entry.get("style", PLAIN)
        cases.append(Case(entry["prompt"], tuple(entry["shows"]), style, ()))
    return cases


def high_frequencies(pictures: Tensor) -> float:
    """Mean energy above half the Nyquist frequency of luma, pictures [B, 3, H, W]."""
    luma = (pictures * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1)
    spectrum = torch.fft.fft2(luma, norm="ortho").abs() ** 2
    rows = torch.fft.fftfreq(luma.shape[-2]).abs()[:, None]
    columns = torch.fft.fftfreq(luma.shape[-1]).abs()[None]
    return float(spectrum[:, torch.maximum(rows, columns) > 0.25].mean())


@torch.no_grad()
def sharpness(drawn: Tensor, renders: Tensor) -> dict[str, float]:
    """How sharp generated pictures are beside renders of the same subjects.

    Returns:
        ``energy``: high-frequency energy over that of the renders; ``distance``: mean distance of
        EfficientNet features between a picture and the render of its subject.
    """
    features = efficientnet_features(drawn) - efficientnet_features(renders)
    return {
        "energy": round(high_frequencies(drawn) / high_frequencies(renders), 3),
        "distance": round(float(features.norm(dim=1).mean()), 3),
    }
