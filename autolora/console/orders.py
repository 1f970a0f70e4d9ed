"""What is asked for, from the page or over HTTP: checked once, in one place."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from autolora.errors import GenerationError, shown
from autolora.request import MAX_SEED, check_strength, parse_prompt

MAX_STEPS = 50
MAX_PICTURES = 20
MAX_NAMES = 64
RANDOM_SEED = -1
RANDOM_SEEDS = 2**31


@dataclass(frozen=True)
class Selection:
    """Which adapters shall take part.

    Attributes:
        style: Name of a style; empty for none.
        automatic: Whether the search adds adapters that fit the prompt.
        pinned: Strength by name of adapters that take part in any case; None is the author's.
        dropped: Names that shall not take part although they fit.
        strengths: Strengths by name of adapters that take part for another reason.
        top_k: Most adapters in all; None is the configured number.
        use_triggers: Whether to add trigger words to the prompt.
    """

    style: str = ""
    automatic: bool = True
    pinned: Mapping[str, float | None] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    strengths: Mapping[str, float] = field(default_factory=dict)
    top_k: int | None = None
    use_triggers: bool = True

    @classmethod
    def from_dict(cls, raw: object) -> Selection:
        """Check what a browser sent.

        Raises:
            GenerationError: It is not a selection.
        """
        if raw is None or raw == "":
            return cls()
        if not isinstance(raw, Mapping):
            raise GenerationError("The selection of adapters is not understood; reload the page.")
        dropped = raw.get("dropped") or []
        top_k = raw.get("top_k")
        if not isinstance(dropped, (list, tuple)) or len(dropped) > MAX_NAMES:
            raise GenerationError(f"At most {MAX_NAMES} adapters can be left out.")
        return cls(
            style=str(raw.get("style") or ""),
            automatic=raw.get("automatic", True) is not False,
            pinned=_strengths(raw.get("pinned")),
            dropped=tuple(str(name) for name in dropped),
            strengths={
                name: value
                for name, value in _strengths(raw.get("strengths")).items()
                if value is not None
            },
            top_k=None if top_k is None else whole_number("top_k", top_k),
            use_triggers=raw.get("use_triggers", True) is not False,
        )


@dataclass(frozen=True)
class Order:
    """One or several pictures that are asked for.

    Attributes:
        prompt: The prompt as it was typed.
        negative_prompt: What the pictures shall not show.
        seed: Seed of the first picture, the next ones count up; -1 is a random one.
        steps: Denoising steps; None is the configured number.
        width: Pixels; None is the configured width.
        height: Pixels; None is the configured height.
        guidance: Guidance scale; None is the configured one.
        count: How many pictures.
        strategy: How adapters are fused; None is the style's or the configured way.
        compare: Also draw without adapters and with each one alone.
        selection: Which adapters shall take part.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = RANDOM_SEED
    steps: int | None = None
    width: int | None = None
    height: int | None = None
    guidance: float | None = None
    count: int = 1
    strategy: str | None = None
    compare: bool = False
    selection: Selection = field(default_factory=Selection)

    def __post_init__(self) -> None:
        """Check what only an order can have; the pipeline checks the rest.

        Raises:
            GenerationError: A value is not possible.
        """
        if not 1 <= self.count <= MAX_PICTURES:
            raise GenerationError(
                f"The number of pictures must be between 1 and {MAX_PICTURES}, not {self.count}."
            )
        if self.steps is not None and not 1 <= self.steps <= MAX_STEPS:
            raise GenerationError(f"Steps must be between 1 and {MAX_STEPS}, not {self.steps}.")
        if not RANDOM_SEED <= self.seed <= MAX_SEED - MAX_PICTURES:
            raise GenerationError(
                f"The seed must be -1 for a random one, or between 0 and {MAX_SEED - MAX_PICTURES}."
            )

    def with_seed(self) -> Order:
        """Return the order with its seed chosen where it was to be random."""
        if self.seed != RANDOM_SEED:
            return self
        return replace(self, seed=secrets.randbelow(RANDOM_SEEDS))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Order:
        """Read an order back from `to_dict`."""
        return cls(**{**raw, "selection": Selection.from_dict(raw.get("selection"))})


def order_of_report(report: Mapping[str, Any]) -> Order:
    """Settings that make a picture again, from the report inside it.

    Raises:
        GenerationError: The report lacks a value, or has one that no order can have.
    """
    try:
        return _order_of_report(report)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise GenerationError("The settings in this picture are not understood.") from error


def _order_of_report(report: Mapping[str, Any]) -> Order:
    adapters = report.get("adapters") or []
    pinned = {str(used["name"]): used["strength"] for used in adapters}
    added = any(used.get("triggers") for used in adapters)
    selection = {"automatic": False, "pinned": pinned, "use_triggers": added}
    # Tags would fix what the pins leave free; trigger words that were added are added again.
    typed = parse_prompt(str(report["prompt"])).text
    return Order(
        prompt=typed if added else str(report["used_prompt"]),
        negative_prompt=str(report.get("negative_prompt") or ""),
        seed=int(report["seed"]),
        steps=int(report["steps"]),
        width=int(report["width"]),
        height=int(report["height"]),
        guidance=float(report["guidance"]),
        strategy=str(report["strategy"]),
        selection=Selection.from_dict(selection),
    )


def whole_number(name: str, value: object) -> int:
    """Read a whole number from a form.

    Raises:
        GenerationError: It is none.
    """
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    if not math.isfinite(number) or number != int(number):
        raise GenerationError(f"{name} must be a whole number, not {shown(value, 40)}.")
    return int(number)


def _strengths(raw: object) -> dict[str, float | None]:
    if raw is None:
        return {}
    if not isinstance(raw, Mapping) or len(raw) > MAX_NAMES:
        raise GenerationError(f"At most {MAX_NAMES} adapters with a strength each can be chosen.")
    found: dict[str, float | None] = {}
    for name, value in raw.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise GenerationError(
                f"The strength of {shown(name, 60)!r} is not a number; write for example 0.8."
            )
        found[str(name)] = None if value is None else check_strength(str(name), float(value))
    return found
