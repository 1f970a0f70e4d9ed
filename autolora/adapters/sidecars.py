"""The fields that each kind of metadata source carries: one small parser per source.

A parser takes the decoded entries and returns the fields it understands with a sentence for each
entry it does not. Parsers never raise: people's files hold anything.
"""

import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

import yaml

from autolora.adapters.fields import FieldReader, Fields, decode_json, mapping
from autolora.errors import shown

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
    fields.text("base_model", "base_model")
    fields.words("trigger_words", "trainedWords", civitai)
    fields.number("preferred_strength", "strength", tips)
    fields.bounds("strength_min", "strength_max", tips)
    fields.range("strength_range", tips)
    _prompts(fields, civitai)
    return fields.result


def parse_a1111(entries: Mapping[str, Any]) -> Fields:
    """Read ``<stem>.json`` of A1111's web UI and Forge.

    Args:
        entries: The decoded file.

    Returns:
        Fields and problems.
    """
    fields = FieldReader(entries)
    fields.text("description", "description")
    fields.text("base_model", "sd version")
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
    fields.text("base_model", "baseModel")
    fields.words("trigger_words", "trainedWords")
    _prompts(fields, entries)
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
    fields.text("base_model", "base_model", {"base_model": first})
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
        fields.text("base_model", name)
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
