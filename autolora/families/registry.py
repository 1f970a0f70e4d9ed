"""Finds families by name: every folder of this package is one. Needs no torch."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from autolora.errors import ConfigError, shown
from autolora.families.base import Family


@lru_cache(maxsize=1)
def family_names() -> tuple[str, ...]:
    """Names of all families, sorted."""
    here = str(Path(__file__).parent)
    return tuple(sorted(module.name for module in iter_modules([here]) if module.ispkg))


@lru_cache(maxsize=32)
def find_family(name: str) -> Family:
    """The family of a name.

    Raises:
        ConfigError: There is none; the message lists the names that there are.
    """
    if name not in family_names():
        raise ConfigError(
            f"There is no kind of base model named {shown(name)!r}; choose one of "
            f"{', '.join(family_names())}."
        )
    family: Family = import_module(f"autolora.families.{name}").FAMILY
    return family
