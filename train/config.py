"""Reads a training config: a dataclass from YAML, with every mistake named at once."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

from autolora.errors import ConfigError

T = TypeVar("T")


def read_config(kind: type[T], path: Path | None, overrides: dict[str, Any] | None = None) -> T:
    """Fill a dataclass from a YAML file.

    Args:
        kind: A dataclass of ints, floats, strings, bools, tuples of these, and dataclasses. Its
            ``__post_init__`` may raise `ConfigError` with further checks.
        path: The file; None takes the defaults.
        overrides: Values that win over the file's; None values are left out.

    Returns:
        An instance of ``kind``.

    Raises:
        ConfigError: The file is missing or no mapping, or naming every key that is unknown or
            missing and every value of a wrong type.
    """
    raw = {} if path is None else _read_mapping(path)
    raw |= {key: value for key, value in (overrides or {}).items() if value is not None}
    problems: list[str] = []
    values = _values(kind, raw, "", problems)
    if problems:
        raise ConfigError(f"{path or 'The config'}: {'; '.join(problems)}.")
    return kind(**values)


def _read_mapping(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"There is no config file {path}; see configs/train for examples.")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read ({' '.join(str(error).split())}).") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must be a list of `key: value` lines.")
    return raw


def _values(
    kind: type[Any], raw: dict[str, Any], where: str, problems: list[str]
) -> dict[str, Any]:
    """Checked values of a dataclass's fields; what is wrong is added to ``problems``."""
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    problems += [f"unknown key {where + str(key)!r}" for key in raw if key not in fields]
    problems += [
        f"missing key {where + name!r}"
        for name, field in fields.items()
        if name not in raw and field.default is field.default_factory is dataclasses.MISSING
    ]
    return {
        key: _checked(hints[key], value, where + key, problems)
        for key, value in raw.items()
        if key in fields
    }


def _checked(hint: Any, value: Any, key: str, problems: list[str]) -> Any:
    """The value as its field's type."""
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        before = len(problems)
        values = _values(hint, value, f"{key}.", problems)  # type: ignore[arg-type]
        return hint(**values) if len(problems) == before else None  # type: ignore[operator]
    if get_origin(hint) is tuple and isinstance(value, list):
        item = get_args(hint)[0]
        return tuple(_checked(item, one, f"{key}[{i}]", problems) for i, one in enumerate(value))
    if type(value) is hint:
        return value
    if hint is float and type(value) in (int, str):
        # YAML reads 1e-3, without a point, as text.
        with suppress(ValueError):
            return float(value)
    name = str(hint) if get_origin(hint) else hint.__name__
    problems.append(f"{key} must be {name}, not {value!r}")
    return None
