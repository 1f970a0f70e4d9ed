"""Styles: presets in YAML that a running console picks up as soon as a file changes.

A style is a set of adapters with strengths, a way to fuse them, and a template for the prompt::

    title: {en: Neon, zh: 霓虹}
    prompt: "{prompt}, glowing in the dark"
    adapters:
      - {name: neon, strength: 0.9}

Shipped styles are read; what people save goes to a folder of their own, where a file of the same
name takes the place of a shipped one.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from autolora.errors import ConfigError, GenerationError, shown
from autolora.files import replacing
from autolora.request import check_strength

BASE = "base"
MAX_FILE_BYTES = 64 << 10
MAX_ADAPTERS = 16
_KEYS = frozenset({"title", "prompt", "negative_prompt", "adapters", "strategy", "automatic"})
_NAME = re.compile(r"[^\W_][\w-]{0,47}")


@dataclass(frozen=True)
class Style:
    """A look that can be switched to.

    Attributes:
        name: Stem of its file.
        title: What people read, by language; the name where a language is missing.
        prompt: Template; ``{prompt}`` stands for what is typed.
        negative_prompt: Added to what the picture shall not show.
        adapters: Pairs of name in the pool and strength; None is the author's strength.
        strategy: How adapters are fused; None is the configured way.
        automatic: Whether the search adds adapters that fit the prompt.
        problem: Why the file cannot be used; empty when it can.
        saved: Whether it was saved by somebody rather than shipped.
    """

    name: str
    title: Mapping[str, str] = field(default_factory=dict)
    prompt: str = "{prompt}"
    negative_prompt: str = ""
    adapters: tuple[tuple[str, float | None], ...] = ()
    strategy: str | None = None
    automatic: bool = True
    problem: str = ""
    saved: bool = False

    def fill(self, prompt: str) -> str:
        """Put what is typed into the template; without ``{prompt}`` it comes first."""
        if "{prompt}" in self.prompt:
            return self.prompt.replace("{prompt}", prompt)
        return ", ".join(part for part in (prompt, self.prompt) if part)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "name": self.name,
            "title": dict(self.title),
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "adapters": [{"name": name, "strength": value} for name, value in self.adapters],
            "strategy": self.strategy,
            "automatic": self.automatic,
            "problem": self.problem,
            "saved": self.saved,
        }


class Styles:
    """The styles in some folders, read again when files change."""

    def __init__(self, folders: Sequence[Path], own: Path) -> None:
        """Read nothing yet.

        Args:
            folders: Shipped styles; later folders win.
            own: Where styles are saved; wins over all.
        """
        self._folders = (*folders, own)
        self._own = own
        self._cache: dict[Path, tuple[tuple[int, int], Style]] = {}
        self._lock = threading.Lock()

    def all(self) -> list[Style]:
        """List the styles as the files are now, ``base`` first; broken ones say why."""
        found: dict[str, Style] = {BASE: Style(BASE, {"en": "Plain", "zh": "原味"})}
        with self._lock:
            for folder in self._folders:
                for file in _yaml_files(folder):
                    style = self._read(file)
                    if style is not None:
                        found[style.name] = style
        return sorted(found.values(), key=lambda style: (style.name != BASE, style.name))

    def get(self, name: str) -> Style:
        """Look a style up; an empty name is ``base``.

        Raises:
            ConfigError: There is none, or its file cannot be used.
        """
        known = {style.name: style for style in self.all()}
        style = known.get(name or BASE)
        if style is None:
            raise ConfigError(
                f"There is no style {shown(name, 60)!r}; choose {', '.join(sorted(known))}."
            )
        if style.problem:
            raise ConfigError(style.problem)
        return style

    def save(self, style: Style, overwrite: bool = False) -> Path:
        """Write a style into the own folder, whole or not at all.

        Args:
            style: The style; its name becomes the file's.
            overwrite: Whether a style of that name may be replaced.

        Returns:
            The file.

        Raises:
            ConfigError: The name cannot be a file's, is taken, or the file cannot be written.
        """
        if not _NAME.fullmatch(style.name):
            raise ConfigError(
                f"{shown(style.name, 60)!r} cannot name a style; use letters, digits and dashes, "
                "at most 48."
            )
        taken = {known.name for known in self.all()}
        if style.name == BASE or (style.name in taken and not overwrite):
            raise ConfigError(f"There is a style {style.name!r} already; take another name.")
        values = {key: value for key, value in style.to_dict().items() if key in _KEYS and value}
        values["automatic"] = style.automatic
        head = "# A style saved in the console; a running console sees changes made here.\n"
        text = head + yaml.safe_dump(values, allow_unicode=True, sort_keys=False)
        target = self._own / f"{style.name}.yaml"
        try:
            with replacing(target) as temporary:
                temporary.write_bytes(text.encode())
        except OSError as error:
            raise ConfigError(
                f"{shown(target)} cannot be written: {shown(error.strerror or error)}."
            ) from error
        return target

    def _read(self, file: Path) -> Style | None:
        try:
            stat = file.stat()
        except OSError:
            return None
        stamp = (stat.st_size, stat.st_mtime_ns)
        cached = self._cache.get(file)
        if cached is None or cached[0] != stamp:
            style = replace(read_style(file), saved=file.parent == self._own)
            cached = self._cache[file] = (stamp, style)
        return cached[1]


def shipped_styles() -> Path:
    """Folder of the shipped styles, in the checkout or else in the package."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent / "configs" / "styles"
    return checkout if checkout.is_dir() else package / "configs" / "styles"


def read_style(file: Path) -> Style:
    """Read a style's file.

    Args:
        file: A YAML file.

    Returns:
        The style; where the file cannot be used, one that says why.
    """
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError("it is too large for a style.")
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
        return _style(file.stem, raw)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = shown(" ".join(str(error).split()), 200)
        return Style(file.stem, problem=f"Style {shown(file.name)} cannot be read: {reason}.")
    except (ConfigError, GenerationError) as error:
        return Style(file.stem, problem=f"Style {shown(file.name)}: {error}")


def _style(name: str, raw: object) -> Style:
    if not isinstance(raw, Mapping):
        raise ConfigError("it must hold keys and values, such as `prompt: ...`.")
    if unknown := sorted(str(key) for key in set(raw) - _KEYS):
        raise ConfigError(
            f"unknown key {shown(', '.join(unknown))}; possible are {', '.join(sorted(_KEYS))}."
        )
    title = raw.get("title") or {}
    titles = title if isinstance(title, Mapping) else {"en": title, "zh": title}
    strategy = raw.get("strategy")
    return Style(
        name,
        {str(language): _text("title", text) for language, text in titles.items()},
        _text("prompt", raw.get("prompt", "{prompt}")),
        _text("negative_prompt", raw.get("negative_prompt", "")),
        _adapters(raw.get("adapters") or []),
        None if strategy is None else _text("strategy", strategy),
        raw.get("automatic", True) is not False,
    )


def _adapters(raw: object) -> tuple[tuple[str, float | None], ...]:
    if not isinstance(raw, list) or len(raw) > MAX_ADAPTERS:
        raise ConfigError(f"adapters must be a list of at most {MAX_ADAPTERS} names.")
    found: dict[str, float | None] = {}
    for entry in raw:
        fields = {"name": entry} if isinstance(entry, str) else entry
        if not isinstance(fields, Mapping) or not {"name"} <= set(fields) <= {"name", "strength"}:
            raise ConfigError("each of adapters must be a name, or {name: ..., strength: ...}.")
        name, strength = _text("name", fields["name"]), fields.get("strength")
        if strength is not None and not isinstance(strength, (int, float)):
            raise ConfigError(f"the strength of {shown(name, 60)!r} is not a number.")
        found[name] = None if strength is None else check_strength(name, float(strength))
    return tuple(found.items())


def _text(key: str, value: object) -> str:
    if not isinstance(value, str) or len(value) > 2000:
        raise ConfigError(f"{key} must be text of at most 2000 characters.")
    return value


def _yaml_files(folder: Path) -> list[Path]:
    try:
        return sorted(file for file in folder.iterdir() if file.suffix in (".yaml", ".yml"))
    except OSError:
        return []
