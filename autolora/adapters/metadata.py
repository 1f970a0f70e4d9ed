"""What people wrote about a LoRA: title, trigger words, strength, covers, captions.

Sources, first that has a field wins: ``<stem>.autolora.yaml`` (the user's own), then
``<stem>.metadata.json`` (ComfyUI LoRA Manager), ``<stem>.json`` (A1111, Forge),
``<stem>.civitai.info`` (Civitai Helper), the model card (``<stem>.README.md``, or ``README.md`` in
a folder with one LoRA), the safetensors header (``modelspec.*``, ``ssmd_*``, ``ss_*``, ai-toolkit's
``name``), ``<stem>.txt``. Nothing is ever fetched, and nothing written there can make a LoRA
unusable: what cannot be understood becomes a warning.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from autolora.adapters.covers import card_covers, embedded_covers, find_covers
from autolora.adapters.fields import Fields, plain_text, printable
from autolora.adapters.paths import is_own_file
from autolora.adapters.reader import read_header
from autolora.adapters.sidecars import (
    CAPTIONS_SUFFIX,
    CARD_SUFFIX,
    SIDECARS,
    TEXT_SUFFIXES,
    USER_SUFFIX,
    load_card,
    load_yaml,
    parse_card,
    parse_header,
    parse_text,
    parse_user,
)
from autolora.errors import LoRAFormatError, shown

MAX_SIDECAR_BYTES = 16 << 20


@dataclass
class Metadata:
    """What is known about a LoRA besides its weights.

    Attributes:
        title: Name for people; the file stem where nothing better is known.
        description: Free text.
        trigger_words: Words that the adapter was trained to answer to.
        tags: Topics.
        suggestions: Most frequent words of the training captions: perhaps trigger words or tags.
        base_model: Base model as its source spells it.
        preferred_strength: Strength that its author recommends.
        strength_bounds: Lowest and highest strength recommended.
        covers: Example pictures on disk, main one first.
        embedded_covers: How many pictures the header holds; see `covers.read_embedded_covers`.
        captions: Descriptions of the covers, in their order; else prompts of example pictures.
        sources: Which source each field came from, by field name.
        warnings: What could not be read, one sentence each.
    """

    title: str = ""
    description: str = ""
    trigger_words: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    suggestions: list[str] = field(default_factory=list)
    base_model: str = ""
    preferred_strength: float | None = None
    strength_bounds: tuple[float, float] | None = None
    covers: list[Path] = field(default_factory=list)
    embedded_covers: int = 0
    captions: list[str] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> "Metadata":
        """Collect what is known about a LoRA file.

        Args:
            path: The ``.safetensors`` file; its weights are not read.

        Returns:
            The metadata, with `warnings` for what could not be read.
        """
        found = cls()
        found._read_user_file(path.with_name(path.stem + USER_SUFFIX))
        for suffix, parse in SIDECARS:
            sidecar = path.with_name(path.stem + suffix)
            entries = found._load_json(sidecar)
            if isinstance(entries, dict):
                found._take(sidecar.name, parse(entries))
            elif entries is not None:
                found.warnings.append(f"{shown(sidecar.name)} is not a JSON object; not used.")
        found.covers = find_covers(path)
        found._read_card(path)
        found._read_header(path)
        for suffix in TEXT_SUFFIXES:
            sidecar = path.with_name(path.stem + suffix)
            text = found._load_text(sidecar)
            if text is not None:
                found._take(sidecar.name, parse_text({"text": text}))
        if found.covers:
            found.sources.setdefault("covers", "beside the file")
        found._read_captions(path.with_name(path.stem + CAPTIONS_SUFFIX))
        if not found.title:
            found.title, found.sources["title"] = printable(path.stem), "file name"
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON.

        Returns:
            All fields; covers as text.
        """
        return {**asdict(self), "covers": [str(cover) for cover in self.covers]}

    def _take(self, source: str, parsed: Fields) -> None:
        """Fill the fields that no earlier source had."""
        fields, problems = parsed
        self.warnings += [f"{shown(source)}: {problem}" for problem in problems]
        for name, value in fields.items():
            if name not in self.sources:
                setattr(self, name, value)
                self.sources[name] = source

    def _read_user_file(self, sidecar: Path) -> None:
        text = self._load_text(sidecar)
        if text is None:
            return
        try:
            entries = load_yaml(text)
        except ValueError:
            self.warnings.append(f"{shown(sidecar.name)} is not valid YAML; not used.")
            return
        if isinstance(entries, dict):
            self._take(sidecar.name, parse_user(entries))
        elif entries:
            self.warnings.append(f"{shown(sidecar.name)} is not a table of keys; not used.")

    def _read_card(self, path: Path) -> None:
        card = path.with_name(path.stem + CARD_SUFFIX)
        text = self._load_text(card)
        if text is None:
            card = path.with_name("README.md")
            text = self._load_text(card) if is_own_file(card) and is_alone(path) else None
        if text is None:
            return
        try:
            entries = load_card(text)
        except ValueError:
            self.warnings.append(f"{shown(card.name)}: its front matter is not YAML; not used.")
            return
        if entries is None:
            return
        fields, problems = parse_card(entries)
        names = fields.pop("covers", [])
        self._take(card.name, (fields, problems))
        if not self.covers and (pictures := card_covers(card.parent, names)):
            self.covers, self.sources["covers"] = pictures, card.name

    def _read_header(self, path: Path) -> None:
        try:
            entries = read_header(path).metadata
        except LoRAFormatError as error:
            self.warnings.append(str(error))
            return
        self._take("header", parse_header(entries))
        pictures, problems = embedded_covers(entries)
        self.warnings += [f"header: {problem}" for problem in problems]
        if pictures:
            self.embedded_covers, self.sources["embedded_covers"] = len(pictures), "header"

    def _load_text(self, sidecar: Path) -> str | None:
        try:
            if not is_own_file(sidecar):
                if sidecar.is_symlink():
                    self.warnings.append(
                        f"{shown(sidecar.name)} is a link that leaves its folder; not followed."
                    )
                return None
            if sidecar.stat().st_size > MAX_SIDECAR_BYTES:
                self.warnings.append(f"{shown(sidecar.name)} is too large; not used.")
                return None
            return sidecar.read_text(encoding="utf-8-sig")
        except (OSError, ValueError):
            self.warnings.append(f"{shown(sidecar.name)} cannot be read as UTF-8 text; not used.")
            return None

    def _load_json(self, sidecar: Path) -> Any:
        text = self._load_text(sidecar)
        if text is None:
            return None
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            self.warnings.append(f"{shown(sidecar.name)} is not valid JSON; not used.")
            return None

    def _read_captions(self, sidecar: Path) -> None:
        """Captions of our own covers say more than the example prompts of a model page."""
        by_cover = self._load_json(sidecar)
        if by_cover is None:
            return
        if not isinstance(by_cover, dict):
            self.warnings.append(f"{shown(sidecar.name)} is not a JSON object; not used.")
            return
        order = {cover.name: position for position, cover in enumerate(self.covers)}
        captions: list[str] = []
        for cover in sorted(by_cover, key=lambda name: (order.get(name, len(order)), name)):
            texts = by_cover[cover]
            if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
                captions += [plain for text in texts if (plain := plain_text(text))]
            else:
                self.warnings.append(
                    f"{shown(sidecar.name)}: captions of {shown(cover)!r} are not a list of texts."
                )
        if captions and not self.sources.get("captions", "").endswith(USER_SUFFIX):
            self.captions, self.sources["captions"] = captions, sidecar.name


def is_alone(path: Path) -> bool:
    """Tell whether a folder holds no other LoRA, so that a ``README.md`` speaks of this one.

    Args:
        path: The LoRA file.

    Returns:
        False as soon as another file with its suffix is seen, so that large folders cost little.
    """
    try:
        with os.scandir(path.parent) as files:
            return not any(
                file.name.lower().endswith(path.suffix.lower()) and file.name != path.name
                for file in files
            )
    except OSError:
        return False
