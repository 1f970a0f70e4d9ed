"""What people wrote about a LoRA: title, trigger words, strength, covers, captions.

Sources, first that has a field wins: ``<stem>.autolora.yaml`` (the user's own), then
``<stem>.metadata.json`` (ComfyUI LoRA Manager), ``<stem>.json`` (A1111, Forge),
``<stem>.civitai.info`` (Civitai Helper), ``<stem>.cm-info.json`` (StabilityMatrix),
``<file>.rgthree-info.json`` (rgthree's ComfyUI nodes), the model card (``<stem>.README.md``, or
``README.md`` in a folder with one LoRA), the safetensors header (``modelspec.*``, ``ssmd_*``,
``ss_*``, ai-toolkit's ``name``), ``<stem>.txt``. Nothing is ever fetched, and nothing written there
can make a LoRA unusable.

Each kind of source has a parser, which takes the decoded entries and returns the fields it
understands with a warning for each entry it does not. Parsers never raise: people's files hold
anything.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from autolora.errors import LoRAFormatError, printable, shown
from autolora.files import is_own_file
from autolora.lora.covers import card_covers, embedded_covers, find_covers
from autolora.lora.fields import (
    MAX_SUGGESTIONS,
    FieldReader,
    Fields,
    decode_json,
    mapping,
    plain_text,
)
from autolora.safetensors_io import read_header
from autolora.unit import MAX_STRENGTH

MAX_YAML_CHARS = 1 << 16
MAX_PROMPTS = 8
"""Most example prompts of a model page that are taken as captions."""
MAX_PROMPT = 600

USER_SUFFIX = ".autolora.yaml"
USER_KEYS = (
    "title",
    "description",
    "trigger_words",
    "tags",
    "base_model",
    "strength",
    "strength_min",
    "strength_max",
    "captions",
)
"""Keys of ``<stem>.autolora.yaml``."""


def parse_user(entries: Mapping[str, Any]) -> Fields:
    """Read ``<stem>.autolora.yaml``, the user's own word, which wins over all other sources.

    Keys are `USER_KEYS`; lists may also be texts with commas. A key with an empty value says that
    there is nothing: ``trigger_words: []`` silences what other sources claim.

    Args:
        entries: The decoded file.

    Returns:
        Fields and problems.
    """
    fields = FieldReader(entries)
    for name in ("title", "description", "base_model"):
        fields.text(name, name)
    for name in ("trigger_words", "tags"):
        fields.words(name, name)
    fields.number("preferred_strength", "strength")
    fields.bounds("strength_min", "strength_max")
    captions = entries.get("captions")
    fields.texts("captions", captions if isinstance(captions, list) else [captions], 50, 2000)
    for key in entries:
        if key not in USER_KEYS:
            close = get_close_matches(str(key), USER_KEYS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(USER_KEYS)}."
            fields.problems.append(f"unknown key {shown(key, 60)!r}; {hint}")
    for name in ("description", "trigger_words", "tags", "captions"):
        if name in entries and entries[name] in ("", []):
            fields.values[name] = "" if name == "description" else []
    return fields.result


def parse_lora_manager(entries: Mapping[str, Any]) -> Fields:
    """Read ``<stem>.metadata.json`` of ComfyUI LoRA Manager.

    Args:
        entries: The decoded file.

    Returns:
        Fields and problems.
    """
    fields = FieldReader(entries)
    civitai = mapping(entries.get("civitai"))
    usage = entries.get("usage_tips")
    tips = mapping(decode_json(usage) if isinstance(usage, str) else usage)
    fields.text("title", "model_name")
    fields.text("description", "modelDescription")
    fields.words("tags", "tags")
    fields.base_model("base_model")
    fields.base_model("baseModel", civitai)
    fields.words("trigger_words", "trainedWords", civitai)
    fields.number("preferred_strength", "strength", tips)
    fields.bounds("strength_min", "strength_max", tips)
    fields.range("strength_range", tips)
    _prompts(fields, civitai)
    return fields.result


def parse_a1111(entries: Mapping[str, Any]) -> Fields:
    """Read ``<stem>.json`` of A1111's web UI and Forge, or Civitai's answer under that name.

    Args:
        entries: The decoded file.

    Returns:
        Fields and problems.
    """
    if "trainedWords" in entries or "baseModel" in entries:
        return parse_civitai(entries)
    fields = FieldReader(entries)
    fields.text("description", "description")
    fields.base_model("sd version")
    fields.words("trigger_words", "activation text")
    # The web UI writes 0 where nothing was set.
    if entries.get("preferred weight") != 0:
        fields.number("preferred_strength", "preferred weight")
    return fields.result


def parse_civitai(entries: Mapping[str, Any]) -> Fields:
    """Read ``<stem>.civitai.info``, a model version as Civitai's interface gives it.

    Args:
        entries: The decoded file.

    Returns:
        Fields and problems.
    """
    fields = FieldReader(entries)
    model = mapping(entries.get("model"))
    fields.text("title", "name", model)
    fields.text("title", "name")
    fields.text("description", "description")
    fields.text("description", "description", model)
    fields.words("tags", "tags", model)
    fields.words("tags", "tags")
    fields.base_model("baseModel")
    fields.words("trigger_words", "trainedWords")
    _prompts(fields, entries)
    return fields.result


def parse_stability_matrix(entries: Mapping[str, Any]) -> Fields:
    """Read ``<stem>.cm-info.json`` of StabilityMatrix.

    Args:
        entries: The decoded file.

    Returns:
        Fields and problems.
    """
    fields = FieldReader(entries)
    for name in ("UserTitle", "ModelName", "VersionName"):
        fields.text("title", name)
    for name in ("ModelDescription", "VersionDescription"):
        fields.text("description", name)
    fields.words("tags", "Tags")
    fields.base_model("BaseModel")
    fields.words("trigger_words", "TrainedWords")
    return fields.result


def parse_rgthree(entries: Mapping[str, Any]) -> Fields:
    """Read ``<file>.rgthree-info.json`` of ComfyUI's rgthree nodes.

    Its words are those of the model page and of the user, and also the tags of the training
    captions with their counts, which nobody said are trigger words.

    Args:
        entries: The decoded file.

    Returns:
        Fields and problems.
    """
    fields = FieldReader(entries)
    fields.text("title", "name")
    for name in ("userNote", "description"):
        fields.text("description", name)
    fields.words("tags", "tags")
    fields.base_model("baseModel")
    listed = entries.get("trainedWords")
    words = [mapping(entry) for entry in listed] if isinstance(listed, list) else []
    said = [word.get("word") for word in words if word.get("civitai") or word.get("user")]
    counted = [word.get("word") for word in words if word.get("word") not in said]
    fields.words("trigger_words", "trainedWords", {"trainedWords": said})
    fields.words("suggestions", "trainedWords", {"trainedWords": counted[:MAX_SUGGESTIONS]})
    fields.bounds("strengthMin", "strengthMax")
    images = entries.get("images")
    shown_prompts = (mapping(i).get("positive") for i in images) if isinstance(images, list) else ()
    fields.texts("captions", shown_prompts, MAX_PROMPTS, MAX_PROMPT)
    return fields.result


def parse_card(entries: Mapping[str, Any]) -> Fields:
    """Read the front matter of a Hugging Face model card.

    Args:
        entries: The decoded front matter, with the first heading of the text as ``heading``.

    Returns:
        Fields and problems; ``covers`` holds paths of pictures as the card gives them.
    """
    fields = FieldReader(entries)
    fields.text("title", "pretty_name")
    fields.text("title", "heading")
    base = entries.get("base_model")
    first = base[0] if isinstance(base, list) and base else base
    fields.base_model("base_model", {"base_model": first})
    if entries.get("instance_prompt") not in ("null", "None", "~", ""):
        fields.words("trigger_words", "instance_prompt")
    fields.words("tags", "tags")
    widget = entries.get("widget")
    examples = [mapping(example) for example in widget] if isinstance(widget, list) else []
    fields.texts("captions", (example.get("text") for example in examples), MAX_PROMPTS, MAX_PROMPT)
    urls = (mapping(example.get("output")).get("url") for example in examples)
    if covers := [url for url in urls if isinstance(url, str)]:
        fields.values["covers"] = covers
    return fields.result


def parse_header(entries: Mapping[str, Any]) -> Fields:
    """Read the text entries of a safetensors header.

    ``ss_tag_frequency`` counts the captions of the training set: it suggests words, but nobody
    said that they are trigger words or tags.

    Args:
        entries: The header's ``__metadata__``.

    Returns:
        Fields and problems.
    """
    fields = FieldReader(entries)
    for name in ("modelspec.title", "ssmd_display_name", "ss_output_name", "name"):
        fields.text("title", name)
    for name in ("modelspec.description", "ssmd_description", "ss_training_comment"):
        fields.text("description", name)
    for name in ("modelspec.trigger_phrase", "ssmd_keywords"):
        fields.words("trigger_words", name)
    for name in ("modelspec.tags", "ssmd_tags"):
        fields.words("tags", name)
    fields.tag_frequency("ss_tag_frequency")
    for name in ("modelspec.architecture", "ss_base_model_version"):
        fields.base_model(name)
    return fields.result


def parse_text(entries: Mapping[str, Any]) -> Fields:
    """Read a description in a text file.

    Args:
        entries: The file's text as the entry ``text``.

    Returns:
        Fields and problems.
    """
    fields = FieldReader(entries)
    fields.text("description", "text")
    return fields.result


SIDECARS: tuple[tuple[str, Callable[[Mapping[str, Any]], Fields]], ...] = (
    (".metadata.json", parse_lora_manager),
    (".json", parse_a1111),
    (".civitai.info", parse_civitai),
    (".cm-info.json", parse_stability_matrix),
    (".safetensors.rgthree-info.json", parse_rgthree),
)
"""JSON files beside a LoRA by what follows its stem, in the order they are asked."""

CARD_SUFFIX = ".README.md"
TEXT_SUFFIXES = (".description.txt", ".txt")
CAPTIONS_SUFFIX = ".captions.json"

SIDECAR_SUFFIXES: tuple[str, ...] = (
    USER_SUFFIX,
    *(suffix for suffix, _ in SIDECARS),
    CARD_SUFFIX,
    *TEXT_SUFFIXES,
    CAPTIONS_SUFFIX,
)
"""All files beside a LoRA, pictures aside, by what follows its stem."""


def load_yaml(text: str) -> Any:
    """Decode YAML without interpreting it: every scalar stays the text that was written.

    Trigger words such as ``no`` or ``1e3`` are words, and no tag can make an object.

    Args:
        text: The file's text.

    Returns:
        Texts, lists and dictionaries.

    Raises:
        ValueError: It is no YAML, or is longer than `MAX_YAML_CHARS`.
    """
    if len(text) > MAX_YAML_CHARS:
        raise ValueError("too long")
    try:
        return yaml.load(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError("not YAML") from error


def load_card(text: str) -> dict[str, Any] | None:
    """Decode the front matter of a model card.

    Args:
        text: Text of a ``README.md``.

    Returns:
        Its entries and the first heading as ``heading``; None where there is no front matter.

    Raises:
        ValueError: The front matter is no YAML, or no table.
    """
    found = re.match(r"---[ \t]*\n(.*?)\n---[ \t]*(?:\n|$)", text[: 2 * MAX_YAML_CHARS], re.DOTALL)
    if found is None:
        return None
    entries = load_yaml(found.group(1))
    if not isinstance(entries, dict):
        raise ValueError("front matter is no table")
    heading = re.search(r"^# +(\S[^\n]*)$", text[found.end() :], re.MULTILINE)
    return {"heading": heading.group(1) if heading else "", **entries}


def _prompts(fields: FieldReader, version: Mapping[str, Any]) -> None:
    """Prompts of the example pictures of a Civitai model version: they describe what it draws."""
    images = version.get("images")
    listed = images if isinstance(images, list) else []
    metas = [mapping(mapping(image).get("meta")) for image in listed]
    fields.texts("captions", (meta.get("prompt") for meta in metas), MAX_PROMPTS, MAX_PROMPT)


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
        found._name(path)
        return found

    def _name(self, path: Path) -> None:
        """Take the title from the file's name; where that is everybody's, from its folder's."""
        own = self.title and (self.sources["title"] != "header" or not is_generic(self.title))
        if own:
            return
        folder = _telling_folder(path) if is_generic(path.stem) else ""
        if folder:
            self.title, self.sources["title"] = printable(folder), "folder name"
        elif not self.title:
            self.title, self.sources["title"] = printable(path.stem), "file name"

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


_GENERIC = re.compile(
    r"(?:(?:diffusion[ _-]?)?pytorch[ _-]?)?(?:lora|adapter|model|weights?)"
    r"(?:[ _-]*(?:lora|adapter|model|weights?|pool|v?\d+))*",
    re.IGNORECASE,
)
_REVISION = re.compile(r"[0-9a-f]{40}")


def is_generic(name: str) -> bool:
    """Tell whether a name is one that programs give to every LoRA, such as ``adapter_model``."""
    return _GENERIC.fullmatch(name.strip()) is not None


def _telling_folder(path: Path) -> str:
    """Name of the folder that a file's repository or training has; empty where none tells it."""
    folder = Path(os.path.abspath(path)).parent
    # A cache of the Hugging Face hub: models--OWNER--NAME/snapshots/REVISION/...
    for part in folder.parents:
        if part.name == "snapshots" and part.parent.name.startswith("models--"):
            return part.parent.name.rpartition("--")[2]
    if _REVISION.fullmatch(folder.name) or is_generic(folder.name.removesuffix("s")):
        return ""
    return (
        "" if folder.name.casefold() in ("pool", "models", "adapters", "downloads") else folder.name
    )


def recommended_strength(metadata: Metadata) -> float:
    """Return the strength that an adapter's metadata recommends, or 1."""
    strength = metadata.preferred_strength
    if strength is None or strength == 0 or abs(strength) > MAX_STRENGTH:
        return 1.0
    bounds = metadata.strength_bounds
    if bounds is not None and bounds[0] <= bounds[1]:
        strength = min(max(strength, bounds[0]), bounds[1])
    return float(strength)
