"""Styles: presets in YAML that a running console picks up as soon as a file changes.

A style is a request that waits for its prompt: adapters as LoRA units, a way to fuse them, and a
template for the prompt::

    title: {en: Neon, zh: 霓虹}
    prompt: "{prompt}, glowing in the dark"
    adapters:
      - {name: neon, strength: 0.9, steps: 1-12}

Shipped styles are read; what people save goes to a folder of their own, where a file of the same
name takes the place of a shipped one.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field

from autolora import schema
from autolora.errors import AutoLoRAError, ConfigError, shown
from autolora.files import replacing
from autolora.infotext import copied_parameters
from autolora.request import GenerateRequest
from autolora.schema import STRICT, also
from autolora.unit import Units

BASE = "base"
MAX_FILE_BYTES = 64 << 10
MAX_ADAPTERS = 16
_NAME = re.compile(r"[^\W_][\w-]{0,47}")
Text = Annotated[str, Field(max_length=2000)]


@dataclass(frozen=True)
class Style:
    """A look that can be switched to.

    Attributes:
        name: Stem of its file.
        title: What people read, by language; the name where a language is missing.
        prompt: Template; ``{prompt}`` stands for what is typed.
        negative_prompt: Added to the request's negative prompt.
        loras: Its LoRAs; files call them ``adapters``, too.
        strategy: How adapters are fused; None is the configured way.
        retrieve: Whether the search adds adapters that fit; files call it ``automatic``, too.
        problem: Why the file cannot be used; empty when it can.
        saved: Whether it was saved by somebody rather than shipped.
    """

    __pydantic_config__ = STRICT

    name: str
    title: dict[str, Text] = field(default_factory=dict)
    prompt: Text = "{prompt}"
    negative_prompt: Text = ""
    loras: Annotated[Units, also("loras", "adapters")] = ()
    strategy: Text | None = None
    retrieve: Annotated[bool, also("retrieve", "automatic")] = True
    problem: str = ""
    saved: bool = False

    def fill(self, prompt: str) -> str:
        """Put what is typed into the template; without ``{prompt}`` it comes first."""
        if "{prompt}" in self.prompt:
            return self.prompt.replace("{prompt}", prompt)
        return ", ".join(part for part in (prompt, self.prompt) if part)

    def apply(self, asked: GenerateRequest) -> GenerateRequest:
        """Put the style's words into a request; its adapters are the planner's business."""
        if self == PLAIN or not asked.prompt.strip():
            return asked
        pasted = copied_parameters(asked.prompt)
        negative = (asked.negative_prompt.strip(), self.negative_prompt)
        return asked.changed(
            # What ends a prompt of another program must stay its end.
            prompt=self.fill(asked.prompt if pasted is None else pasted.prompt),
            negative_prompt=", ".join(part for part in negative if part),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "name": self.name,
            "title": dict(self.title),
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "adapters": [{"strength": None, **unit.to_dict()} for unit in self.loras],
            "strategy": self.strategy,
            "automatic": self.retrieve,
            "problem": self.problem,
            "saved": self.saved,
        }


PLAIN = Style(BASE, {"en": "Plain", "zh": "原味"})
"""Nothing but what is typed."""
_WRITTEN = ("title", "prompt", "negative_prompt", "adapters", "strategy", "automatic")


class Styles:
    """The styles in some folders, read again when files change."""

    def __init__(self, folders: Sequence[Path], own: Path, files: bool = False) -> None:
        """Read nothing yet.

        Args:
            folders: Shipped styles; later folders win.
            own: Where styles are saved; wins over all.
            files: Whether a style may also be named by the path of its file.
        """
        self.files = files
        self._folders = (*folders, own)
        self._own = own
        self._cache: dict[Path, tuple[tuple[int, int], Style]] = {}
        self._lock = threading.Lock()

    def all(self) -> list[Style]:
        """List the styles as the files are now, ``base`` first; broken ones say why."""
        found: dict[str, Style] = {BASE: PLAIN}
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
        if style is None and name.endswith((".yaml", ".yml")) and self.files:
            style = read_style(Path(name).expanduser())
        if style is None:
            raise ConfigError(
                "There is no style {}; choose {}.",
                repr(shown(name, 60)),
                ", ".join(sorted(known)),
                where="style",
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
                "{} cannot name a style; use letters, digits and dashes, at most 48.",
                repr(shown(style.name, 60)),
            )
        taken = {known.name for known in self.all()}
        if style.name == BASE or (style.name in taken and not overwrite):
            raise ConfigError("There is a style {} already; take another name.", repr(style.name))
        said = style.to_dict()
        values = {key: said[key] for key in _WRITTEN if said[key] or key == "automatic"}
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


def own_styles() -> Path:
    """Folder of the styles that people saved: that of a console that was started here."""
    return Path("outputs") / "styles"


def read_style(file: Path) -> Style:
    """Read a style's file.

    Args:
        file: A YAML file.

    Returns:
        The style; where the file cannot be used, one that says why.
    """
    try:
        if not file.is_file():
            raise ConfigError("it is no file, but a pipe, a device or a folder.")
        if file.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError("it is too large for a style.")
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
        return _style(file.stem, raw)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = shown(" ".join(str(error).split()), 200)
        return Style(file.stem, problem=f"Style {shown(file.name)} cannot be read: {reason}.")
    except AutoLoRAError as error:
        return Style(file.stem, problem=f"Style {shown(file.name)}: {error}")


def _style(name: str, raw: object) -> Style:
    if not isinstance(raw, Mapping):
        raise ConfigError("it must hold keys and values, such as `prompt: ...`.")
    values = {key: value for key, value in raw.items() if value is not None}
    title = values.get("title")
    if isinstance(title, str):
        values["title"] = {"en": title, "zh": title}
    given = {"name", "problem", "saved"} & values.keys()
    if given:
        raise ConfigError(f"unknown key {shown(', '.join(sorted(given)))}.")
    try:
        style = schema.read(Style, {"name": name, **values})
    except schema.Invalid as error:
        raise ConfigError(f"{error}.") from None
    if len(style.loras) > MAX_ADAPTERS:
        raise ConfigError(f"adapters must be a list of at most {MAX_ADAPTERS} names.")
    return style


def _yaml_files(folder: Path) -> list[Path]:
    try:
        return sorted(file for file in folder.iterdir() if file.suffix in (".yaml", ".yml"))
    except OSError:
        return []
