"""Checks keys and types of what a YAML file says against a dataclass."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from autolora.errors import shown

_WRONG = object()
_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "Path": "a path",
    "tuple[float, ...]": "a list of numbers",
}


def read_values(
    kind: type[Any], raw: Mapping[Any, Any], found: list[str], where: str = ""
) -> dict[str, Any]:
    """Check keys and types; a field that is a dataclass itself takes keys and values.

    Args:
        kind: The dataclass.
        raw: What the file says.
        found: What is wrong is added here, one sentence part each.
        where: What stands before a key's name in messages.

    Returns:
        Arguments for the dataclass, without those that are wrong.
    """
    fields = {entry.name: entry for entry in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if key not in fields:
            close = get_close_matches(str(key), fields, n=1)
            hint = f" (did you mean {where}{close[0]}?)" if close else ""
            found.append(f"unknown key {where}{shown(key)}{hint}")
            continue
        nested = fields[key].default_factory
        if isinstance(nested, type) and dataclasses.is_dataclass(nested):
            if isinstance(value, Mapping):
                values[key] = nested(**read_values(nested, value, found, f"{where}{key}."))
            else:
                found.append(f"{where}{key} must hold keys and values")
            continue
        expected = str(fields[key].type)
        converted = _convert(expected, value)
        if converted is _WRONG:
            wanted = _WORDS[expected.removesuffix(" | None")]
            found.append(f"{where}{key} must be {wanted}, not {shown(repr(value), 60)}")
        else:
            values[key] = converted
    return values


def _convert(expected: str, value: Any) -> Any:
    """Return the value as the field's type, or `_WRONG`."""
    if value is None:
        return None if expected.endswith("| None") else _WRONG
    plain = expected.removesuffix(" | None")
    if plain == "bool":
        return value if isinstance(value, bool) else _WRONG
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if plain == "int":
        return value if number and isinstance(value, int) else _WRONG
    if plain == "float":
        return float(value) if number else _WRONG
    if plain == "tuple[float, ...]":
        listed = isinstance(value, Sequence) and not isinstance(value, str)
        good = listed and all(_convert("float", item) is not _WRONG for item in value)
        return tuple(float(item) for item in value) if good else _WRONG
    if not isinstance(value, str):
        return _WRONG
    return Path(value) if plain == "Path" else value
