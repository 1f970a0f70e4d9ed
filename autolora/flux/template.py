"""Writes a user's own configuration from a shipped one, comments and all."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from autolora.errors import ConfigError, shown
from autolora.files import replacing
from autolora.flux.config import PipelineConfig, find_config, load_config


def write_config(
    source: str, target: Path, values: Mapping[str, str], force: bool
) -> PipelineConfig:
    """Copy a shipped configuration with some values changed.

    The file appears whole or not at all, and only if it can be loaded.

    Args:
        source: Name or path of the configuration to start from.
        target: The file to write.
        values: New values of top-level keys.
        force: Whether a file that is there may be replaced.

    Returns:
        The new configuration.

    Raises:
        ConfigError: The source is wrong, the target is there already, or it cannot be written.
    """
    if target.suffix.lower() not in (".yaml", ".yml"):
        raise ConfigError(f"{shown(target)} must end in .yaml; configurations are YAML files.")
    if target.exists() and not force:
        raise ConfigError(f"{shown(target)} is there already; choose another --out, or --force.")
    text = find_config(source).read_text(encoding="utf-8")
    for key, value in values.items():
        text = _with_value(text, key, value)
    try:
        with replacing(target, suffix=".yaml") as temporary:
            temporary.write_text(text, encoding="utf-8")
            load_config(temporary)
    except OSError as error:
        reason = shown(error.strerror or error)
        raise ConfigError(f"{shown(target)} cannot be written: {reason}.") from error
    return load_config(target)


def _with_value(text: str, key: str, value: str) -> str:
    """Change the value of a top-level key; a new key goes below ``kind``."""
    quoted = json.dumps(value, ensure_ascii=False)  # JSON strings are YAML strings
    pattern = re.compile(rf"^{key}:[^#\n]*?(?=\s*(#|$))", re.MULTILINE)
    line = f"{key}: {quoted}"
    if pattern.search(text):
        return pattern.sub(lambda match: line, text, count=1)
    return re.sub(r"^kind:.*$", lambda match: f"{match.group()}\n{line}", text, count=1, flags=re.M)
