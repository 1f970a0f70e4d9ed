"""LoRA units: an adapter that is asked for, with everything that can be said about how it acts.

They are written alike in a base model's YAML, a style, a JSON request and Python, as people
configure ControlNet units: name or path, strength, steps, layers, text encoder, on or off. Nothing
here needs torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Strict
from pydantic.dataclasses import dataclass

from autolora import schema
from autolora.errors import GenerationError, shown
from autolora.schema import PathField

MAX_STRENGTH = 20.0
"""Largest strength that is taken for one, of either sign; sliders are made for as much."""
MAX_UNITS = 64
SUFFIX = ".safetensors"
_STEPS = re.compile(r"\s*([0-9]{1,4})?\s*-\s*([0-9]{1,4})?\s*|\s*([0-9]{1,4})\s*")

Steps = tuple[int, int | None]
"""First and last step, counted from 1; None as the last is the end."""


def check_strength(name: str, strength: float) -> float:
    """Make sure that a strength can be used.

    Raises:
        GenerationError: It is not finite or is out of range.
    """
    if not math.isfinite(strength) or abs(strength) > MAX_STRENGTH:
        raise GenerationError(
            "The strength {} of LoRA {} is out of range; use {} to {}, commonly 0.5 to 1.",
            f"{strength:g}",
            repr(shown(name, 60)),
            f"-{MAX_STRENGTH:g}",
            f"{MAX_STRENGTH:g}",
        )
    return float(strength)


def parse_steps(value: Any) -> Steps | None:
    """Read the steps of a unit: ``3-8``, ``3-``, ``-8`` or ``3``, or a pair of numbers.

    Raises:
        ValueError: They are not understood, or no step is meant.
    """
    if value is None:
        return None
    first: Any = None
    last: Any = None
    if isinstance(value, str) and (match := _STEPS.fullmatch(value)):
        begin, end, only = match.groups()
        if only or begin or end:
            first = int(only or begin or 1)
            last = int(only or end) if only or end else None
    elif isinstance(value, (list, tuple)) and len(value) == 2:
        first, last = (1 if value[0] is None else value[0]), value[1]
    if not _is_whole(first) or not (last is None or _is_whole(last)):
        raise ValueError(f"must be such as 3-8, 3- or -8, from step 1 on, not {shown(value, 40)!r}")
    if first < 1 or (last is not None and last < first):
        raise ValueError(f"must go up from step 1 on, not {shown(value, 40)!r}")
    return first, last


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _layer_patterns(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class LoRAUnit:
    """A LoRA that is asked for.

    Attributes:
        name: Its name in the pool; with a path, what it is called (the file's stem by default).
        strength: How strongly it acts; None leaves it to the adapter's author, or else 1.
        path: Its file, in place of one of the pool.
        steps: The denoising steps in which it acts; None is all.
        text_encoder: How strongly its part for text encoders acts; None is the strength where the
            request has text encoders changed, and not at all otherwise.
        layers: Patterns of canonical layer names, with ``*`` and ``?``; empty is all layers.
        enabled: Whether it takes part; one that is off is not found by the search either.
        family: The base-model family that its file is for, such as ``flux2``; only needed where
            the file itself may be for several.
    """

    name: str = ""
    strength: float | None = None
    path: PathField | None = None
    steps: Annotated[Steps | None, BeforeValidator(parse_steps)] = None
    text_encoder: float | None = None
    layers: Annotated[tuple[str, ...], Strict(False), BeforeValidator(_layer_patterns)] = ()
    enabled: Annotated[bool, Strict()] = True
    family: str | None = None

    def __post_init__(self) -> None:
        """Name a file's unit after it, and check the numbers.

        Raises:
            GenerationError: There is neither name nor path, or a strength is out of range.
        """
        if not self.name.strip() and self.path is not None:
            object.__setattr__(self, "name", self.path.stem)
        if not self.name.strip():
            raise GenerationError(
                "A LoRA was asked for without a name; write NAME or NAME:STRENGTH."
            )
        for value in (self.strength, self.text_encoder):
            if value is not None:
                check_strength(self.name, value)

    @property
    def bare(self) -> bool:
        """Whether nothing but name and strength is said."""
        return self == LoRAUnit(self.name, self.strength)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON or YAML, without what is as usual."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        said = {key: value for key, value in values.items() if value != _USUAL[key]}
        if self.path is not None:
            said["path"] = str(self.path)
        for key in ("steps", "layers"):
            if key in said:
                said[key] = list(said[key])
        return said


_USUAL = {entry.name: entry.default for entry in fields(LoRAUnit)}  # type: ignore[arg-type]


def parse_lora(text: str) -> LoRAUnit:
    """Read ``NAME`` or ``NAME:STRENGTH``; a name may itself have colons.

    A text that ends in ``.safetensors`` before the strength is the path of a file.

    Raises:
        GenerationError: The name is empty or the strength is not a number in range.
    """
    name, colon, strength = text.rpartition(":")
    if not colon or is_file_name(text):
        return unit_of_text(text, None)
    return unit_of_text(name, strength)


def is_file_name(name: str | Path) -> bool:
    """Tell the path of a LoRA file from a name in the pool."""
    return isinstance(name, Path) or name.lower().endswith(SUFFIX)


def unit_of_text(name: str, strength: str | None) -> LoRAUnit:
    """Make a unit of a name or path and a strength, both as they were typed.

    Raises:
        GenerationError: The name is empty or the strength is not a number in range.
    """
    name = name.strip()
    if not name:
        raise GenerationError("A LoRA was asked for without a name; write NAME or NAME:STRENGTH.")
    try:
        value = None if strength is None else float(strength)
    except ValueError:
        raise GenerationError(
            "The strength {} of LoRA {} is not a number; write for example 0.8.",
            repr(shown(strength, 40)),
            repr(shown(name, 60)),
        ) from None
    if value is not None:
        check_strength(name, value)
    if is_file_name(name):
        return LoRAUnit(strength=value, path=Path(name).expanduser())
    return LoRAUnit(name, value)


def _unit(value: Any) -> Any:
    """Bring the ways to write a unit to one: its fields, or the unit."""
    if isinstance(value, str):
        return parse_lora(value)
    if isinstance(value, (list, tuple)) and len(value) == 2 and isinstance(value[0], (str, Path)):
        value = {"path" if is_file_name(value[0]) else "name": value[0], "strength": value[1]}
    if isinstance(value, LoRAUnit):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(
            f"must be a name such as neon:0.8 or a LoRA's fields, not {shown(repr(value), 60)}"
        )
    known = dict(value)
    if "weight" in known:  # ControlNet units and diffusers call it so
        if "strength" in known:
            raise ValueError("has strength and weight, which are the same; give one of them")
        known["strength"] = known.pop("weight")
    for key in ("strength", "text_encoder"):
        number = known.get(key)
        if isinstance(number, bool) or not isinstance(number, (int, float, type(None))):
            raise GenerationError(
                f"The {key.replace('_', ' ')} of {{}} is not a number; write for example 0.8.",
                repr(shown(known.get("name", ""), 60)),
            )
    return known


def _units(value: Any) -> Any:
    """Also take a table of strengths by name."""
    if value is None:
        return ()
    if isinstance(value, Mapping):
        value = [{"name": str(name), "strength": strength} for name, strength in value.items()]
    if not isinstance(value, (list, tuple)) or len(value) > MAX_UNITS:
        raise ValueError(f"must be a list of at most {MAX_UNITS} LoRAs such as neon:0.8")
    return value


def check_once(units: tuple[LoRAUnit, ...]) -> tuple[LoRAUnit, ...]:
    """Make sure that no LoRA is given twice.

    Raises:
        GenerationError: One is.
    """
    names = [unit.name for unit in units]
    for name in names:
        if names.count(name) > 1:
            raise GenerationError("LoRA {} is given twice; give it once.", repr(shown(name, 60)))
    return units


Unit = Annotated[LoRAUnit, BeforeValidator(_unit)]
"""A unit, written as its fields, as ``name:strength``, or as a pair."""
Units = Annotated[
    tuple[Unit, ...], Strict(False), BeforeValidator(_units), AfterValidator(check_once)
]
"""Units, each once; a table of strengths by name is taken, too."""


def check_steps(units: Iterable[LoRAUnit], steps: int) -> None:
    """Make sure that the steps of units are steps of the picture.

    Raises:
        GenerationError: One begins or ends beyond the last step.
    """
    for unit in units:
        if unit.steps is not None and max(unit.steps[0], unit.steps[1] or 0) > steps:
            raise GenerationError(
                "LoRA {} acts in steps {}, and the picture has {}; give it steps up to that, or "
                "more steps to the picture.",
                repr(shown(unit.name, 60)),
                steps_text(unit.steps),
                steps,
            )


def steps_text(steps: Steps) -> str:
    """Write steps as people do."""
    first, last = steps
    return f"{first}-{'' if last is None else last}"


def acts_in(steps: Steps | None, step: int) -> bool:
    """Tell whether a step, counted from 1, is among the steps of a unit."""
    return steps is None or (steps[0] <= step and (steps[1] is None or step <= steps[1]))


def matching_layers(unit: LoRAUnit, layers: Iterable[str]) -> list[str]:
    """The layers of an adapter that a unit lets act.

    Raises:
        GenerationError: A pattern matches none of them.
    """
    known = list(layers)
    for pattern in unit.layers:
        if not any(fnmatchcase(layer, pattern) for layer in known):
            some = ", ".join(known[:3])
            raise GenerationError(
                "LoRA {} has no layer {}; its layers are such as {}.",
                repr(shown(unit.name, 60)),
                repr(shown(pattern, 60)),
                some,
            )
    return [name for name in known if any(fnmatchcase(name, pattern) for pattern in unit.layers)]


def read_units(raw: Any) -> tuple[LoRAUnit, ...]:
    """Read units from plain data.

    Raises:
        GenerationError: A field is unknown, a value not possible, or a LoRA given twice.
    """
    try:
        units: tuple[LoRAUnit, ...] = schema.read(Units, raw)  # type: ignore[arg-type]
    except schema.Invalid as error:
        sentence = f"LoRAs: {'; '.join(map(str, error.problems))}."
        raise GenerationError(sentence, where=error.problems[0].where) from None
    return units


def merge_units(*groups: Iterable[LoRAUnit]) -> list[LoRAUnit]:
    """Join lists of units; a name that comes again is taken as the later list has it."""
    return list({unit.name: unit for group in groups for unit in group}.values())
