"""Reads plain data (YAML, JSON, a form) as a typed model, and says where which value is wrong.

Models are dataclasses or pydantic models; pydantic does the checking. Every mistake is found, and
each is a value with its place, so that a face can make its own sentence of it. Nothing here needs
torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import SchemaValidator

from autolora.errors import shown

T = TypeVar("T")

STRICT: ConfigDict = ConfigDict(extra="forbid", strict=True)
"""Unknown keys are mistakes, and a text is not taken for a number."""
RECORDED: ConfigDict = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)
"""Keys that another version wrote are passed over."""

PathField = Annotated[Path, Strict(False)]
"""A path, which plain data write as text."""
Numbers = Annotated[tuple[float, ...], Strict(False)]
"""Numbers, which plain data write as a list."""

_WANTED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "string": "text",
    "bool": "true or false",
    "path": "a path",
    "tuple": "a list",
    "list": "a list",
    "dict": "keys and values",
    "mapping": "keys and values",
    "dataclass": "keys and values",
    "model": "keys and values",
}
"""What a value must be, by the first word of pydantic's name of the mistake."""


def also(*names: str) -> Any:
    """Let a field be written by any of these names, its own among them, once."""
    return Field(validation_alias=AliasChoices(*names))


@dataclass(frozen=True)
class Problem:
    """A mistake in plain data.

    Attributes:
        where: Place of the value, such as ``memory.offload`` or ``loras[1].steps``.
        what: What is wrong with it, as part of a sentence.
        advice: What to do; may be empty.
        kind: pydantic's name of the mistake, such as ``missing``.
        value: The value itself.
    """

    where: str
    what: str
    advice: str = ""
    kind: str = ""
    value: Any = None

    def __str__(self) -> str:
        """Return the sentence, without its full stop."""
        return f"{self.what} ({self.advice})" if self.advice else self.what


class Invalid(Exception):
    """Plain data that do not make a model; `problems` has at least one."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        """Hold the problems."""
        self.problems = tuple(problems)
        super().__init__("; ".join(map(str, self.problems)))


def read(kind: type[T], raw: Any) -> T:
    """Read plain data as a model.

    Args:
        kind: A dataclass or pydantic model.
        raw: The data.

    Returns:
        The model.

    Raises:
        Invalid: Naming every mistake.
        AutoLoRAError: As the model's own checks raise it.
    """
    try:
        model: T = _validator(kind).validate_python(raw)  # type: ignore[arg-type]
        return model
    except ValidationError as error:
        raise Invalid(problems(kind, error.errors(include_url=False))) from None


@cache
def _validator(kind: Any) -> SchemaValidator:
    schema = TypeAdapter(kind).core_schema
    _take_mappings(schema)
    return SchemaValidator(schema)


def _take_mappings(schema: Any) -> None:
    """Let strict dataclasses be made from keys and values, which pydantic keeps to lax ones."""
    if isinstance(schema, dict):
        if schema.get("type") == "dataclass":
            schema["strict"] = False
        for part in schema.values():
            _take_mappings(part)
    elif isinstance(schema, list):
        for part in schema:
            _take_mappings(part)


def problems(kind: Any, errors: Iterable[Mapping[str, Any]]) -> list[Problem]:
    """Translate pydantic's errors.

    Args:
        kind: The model that was read.
        errors: As `pydantic.ValidationError.errors` gives them.
    """
    return [
        _problem(kind, entry["type"], entry["loc"], entry["input"], entry.get("ctx", {}))
        for entry in errors
    ]


def _problem(
    kind: type[Any], name: str, loc: tuple[int | str, ...], value: Any, context: Mapping[str, Any]
) -> Problem:
    where = place(loc)
    if name in ("extra_forbidden", "unexpected_keyword_argument"):
        known = fields_at(kind, loc[:-1])
        if loc[-1] in known:
            return Problem(where, f"{where} is there by another name, too", "", "twice", value)
        close = get_close_matches(str(loc[-1]), known, n=1)
        advice = f"did you mean {place((*loc[:-1], close[0]))}?" if close else ""
        return Problem(where, f"unknown key {shown(where, 60)}", advice, "unknown", value)
    if name in ("missing", "missing_argument"):
        return Problem(where, f"{where} is missing", "", "missing", value)
    if name == "value_error":
        return Problem(where, f"{where} {context['error']}".strip(), "", name, value)
    if name == "string_too_long":
        what = f"{where} must be text of at most {context['max_length']} characters"
        return Problem(where, what, "", name, value)
    wanted = _WANTED.get(name.partition("_")[0], "another value")
    verb = "hold" if wanted == "keys and values" else "be"
    said = "" if verb == "hold" else f", not {shown(repr(value), 60)}"
    return Problem(where, f"{where or 'this'} must {verb} {wanted}{said}", "", "type", value)


def place(loc: Iterable[int | str]) -> str:
    """Write the place of a value: keys with dots, numbers in brackets."""
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f"{'.' if text else ''}{part}"
    return text


def fields_at(kind: Any, loc: tuple[int | str, ...] = ()) -> list[str]:
    """Names of the fields that plain data may have at a place in a model."""
    for part in loc:
        model = _model_in(kind)
        if isinstance(part, str) and model is not None:
            kind = next((h for name, h in _named_hints(model) if name == part), None)
    model = _model_in(kind)
    if model is None:
        return []
    return [name for name, _ in _named_hints(model)]


def _named_hints(model: Any) -> list[tuple[str, Any]]:
    """Every name of every field, with the field's annotation."""
    hints = get_type_hints(model, include_extras=True)
    return [
        (n, hints[field]) for field in _field_names(model) for n in _spellings(field, hints[field])
    ]


def _field_names(model: Any) -> list[str]:
    if issubclass(model, BaseModel):
        return list(model.model_fields)
    return [entry.name for entry in dataclasses.fields(model)]


def _spellings(field: str, hint: Any) -> list[str]:
    """All names of a field: its own, or the choices that its annotation has."""
    for note in getattr(hint, "__metadata__", ()):
        alias = getattr(note, "validation_alias", None)
        if isinstance(alias, AliasChoices):
            return [str(name) for name in alias.choices]
    return [field]


def _model_in(kind: Any) -> Any:
    """The dataclass or model in an annotation such as ``tuple[Model, ...] | None``."""
    if get_origin(kind) is None:
        known = isinstance(kind, type) and (
            dataclasses.is_dataclass(kind) or issubclass(kind, BaseModel)
        )
        return kind if known else None
    return next((found for arg in get_args(kind) if (found := _model_in(arg))), None)
