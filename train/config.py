"""Reads a training config: a dataclass from YAML, with every mistake named at once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

import yaml

from autolora.errors import ConfigError

T = TypeVar("T")


def read_config(kind: type[T], path: Path | None, overrides: dict[str, Any] | None = None) -> T:
    """Fills the flat dataclass ``kind`` from a YAML file.

    Args:
        kind: A dataclass whose fields have defaults.
        path: The file; None takes the defaults.
        overrides: Values that win over the file's; None values are left out.

    Returns:
        An instance of ``kind``.

    Raises:
        ConfigError: If the file is missing, is no mapping, or has unknown keys or wrong types.
    """
    raw: Any = {}
    if path is not None:
        if not path.is_file():
            raise ConfigError(f"There is no config file {path}; see configs/train for examples.")
        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is not YAML ({' '.join(str(error).split())}).") from error
        if not isinstance(raw, dict):
            raise ConfigError(f"{path} must be a list of `key: value` lines.")
    raw = {**raw, **{k: v for k, v in (overrides or {}).items() if v is not None}}
    defaults = {f.name: getattr(kind(), f.name) for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    problems = [f"unknown key {key!r}" for key in raw if key not in defaults]
    values = {}
    for key, value in raw.items():
        if key in defaults:
            values[key], problem = _convert(key, value, defaults[key])
            problems += [problem] if problem else []
    if problems:
        raise ConfigError(f"{path or 'The config'}: {'; '.join(problems)}.")
    return kind(**values)


def _convert(key: str, value: Any, default: Any) -> tuple[Any, str | None]:
    """The value in the default's type, and what is wrong with it."""
    if isinstance(default, tuple) and isinstance(value, list):
        return tuple(value), None
    if isinstance(default, bool) != isinstance(value, bool):
        return value, f"{key} must be {type(default).__name__}, not {value!r}"
    try:
        return type(default)(value), None
    except (TypeError, ValueError):
        return value, f"{key} must be {type(default).__name__}, not {value!r}"
