"""What people wrote about a LoRA: title, trigger words, strength, covers, captions.

Sources, first that has a field wins: ``<stem>.metadata.json`` (ComfyUI LoRA Manager),
``<stem>.json`` (A1111, Forge), ``<stem>.civitai.info`` (Civitai Helper), the safetensors header
(``modelspec.*``, ``ss_*``, ai-toolkit's ``name``), ``<stem>.txt``. Nothing is ever fetched, and
nothing written there can make a LoRA unusable: what cannot be understood becomes a warning.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from autolora.adapters.reader import read_header
from autolora.adapters.sidecars import SIDECARS, Fields, parse_header, parse_text
from autolora.errors import LoRAFormatError, shown

COVER_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_SIDECAR_BYTES = 16 << 20


@dataclass
class Metadata:
    """What is known about a LoRA besides its weights.

    Attributes:
        title: Name for people; the file stem where nothing better is known.
        description: Free text.
        trigger_words: Words that the adapter was trained to answer to.
        tags: Topics.
        base_model: Base model as its source spells it.
        preferred_strength: Strength that its author recommends.
        strength_bounds: Lowest and highest strength recommended.
        covers: Example pictures beside the file, main one first.
        captions: Descriptions of the covers, in their order.
        sources: Which source each field came from, by field name.
        warnings: What could not be read, one sentence each.
    """

    title: str = ""
    description: str = ""
    trigger_words: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    base_model: str = ""
    preferred_strength: float | None = None
    strength_bounds: tuple[float, float] | None = None
    covers: list[Path] = field(default_factory=list)
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
        for suffix, parse in SIDECARS:
            sidecar = path.with_name(path.stem + suffix)
            entries = found._load_json(sidecar)
            if isinstance(entries, dict):
                found._take(sidecar.name, parse, entries)
            elif entries is not None:
                found.warnings.append(f"{shown(sidecar.name)} is not a JSON object; not used.")
        try:
            found._take("header", parse_header, read_header(path).metadata)
        except LoRAFormatError as error:
            found.warnings.append(str(error))
        for suffix in (".description.txt", ".txt"):
            sidecar = path.with_name(path.stem + suffix)
            text = found._load_text(sidecar)
            if text is not None:
                found._take(sidecar.name, parse_text, {"text": text})
        found.covers = find_covers(path)
        found.captions = found._load_captions(path.with_name(path.stem + ".captions.json"))
        if not found.title:
            found.title, found.sources["title"] = path.stem, "file name"
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON.

        Returns:
            All fields; covers as text.
        """
        return {**asdict(self), "covers": [str(cover) for cover in self.covers]}

    def _take(
        self, source: str, parse: Callable[[Mapping[str, Any]], Fields], entries: Mapping[str, Any]
    ) -> None:
        """Fill the fields that no earlier source had."""
        fields, problems = parse(entries)
        self.warnings += [f"{shown(source)}: {problem}" for problem in problems]
        for name, value in fields.items():
            if name not in self.sources and value not in ("", [], None):
                setattr(self, name, value)
                self.sources[name] = source

    def _load_text(self, sidecar: Path) -> str | None:
        try:
            if not sidecar.is_file():
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

    def _load_captions(self, sidecar: Path) -> list[str]:
        by_cover = self._load_json(sidecar)
        if by_cover is None:
            return []
        if not isinstance(by_cover, dict):
            self.warnings.append(f"{shown(sidecar.name)} is not a JSON object; not used.")
            return []
        order = {cover.name: position for position, cover in enumerate(self.covers)}
        captions: list[str] = []
        for cover in sorted(by_cover, key=lambda name: (order.get(name, len(order)), name)):
            texts = by_cover[cover]
            if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
                captions += [text.strip() for text in texts if text.strip()]
            else:
                self.warnings.append(
                    f"{shown(sidecar.name)}: captions of {shown(cover)!r} are not a list of texts."
                )
        if captions:
            self.sources["captions"] = sidecar.name
        return captions


def find_covers(path: Path) -> list[Path]:
    """Find the pictures that belong to a LoRA file.

    Only names that follow from the file's are looked at, so that the cost does not grow with the
    folder.

    Args:
        path: The LoRA file.

    Returns:
        ``<stem>.png`` and the like, ``<stem>.preview.*``, then ``<stem>.cover-0.*`` and following.
    """
    covers = list(_existing(path, path.stem))
    covers += _existing(path, path.stem + ".preview")
    number = 0
    while numbered := list(_existing(path, f"{path.stem}.cover-{number}")):
        covers += numbered
        number += 1
    return covers


def _existing(path: Path, stem: str) -> Iterable[Path]:
    for suffix in COVER_SUFFIXES:
        candidate = path.with_name(stem + suffix)
        try:
            if candidate.is_file():
                yield candidate
        except OSError:
            continue
