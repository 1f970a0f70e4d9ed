"""Settings out of files that people drop on the page: our pictures, others', and plain text."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autolora.console.models import MAX_STEPS, request_of_report, request_of_taken
from autolora.errors import GenerationError, Message, shown
from autolora.infotext import copied_parameters, read_parameters
from autolora.lora.covers import picture_suffix

if TYPE_CHECKING:
    from autolora.config import PipelineConfig
    from autolora.generate.foreign import Found
    from autolora.generate.report import Report
    from autolora.lora import Pool

MAX_TEXT_BYTES = 1 << 20


def settings_in(data: bytes, pool: Pool | None, config: PipelineConfig) -> dict[str, Any]:
    """Read the settings in a file.

    Args:
        data: A picture, or text of generation parameters.
        pool: The LoRAs that there are.
        config: The base model.

    Returns:
        ``order``, ``model``, ``program``, ``missing`` and ``notes``.

    Raises:
        GenerationError: It holds no settings that are understood.
    """
    from autolora.generate.foreign import found_in_parameters, read_found
    from autolora.generate.report import CHUNK

    if not picture_suffix(data):
        text = _text(data)
        parameters = copied_parameters(text)
        if parameters is None:
            whole = read_parameters(text)
            parameters = whole if whole.settings else None
        if parameters is None:
            raise GenerationError(
                "The file is no picture and holds no generation parameters; choose a PNG, JPEG or "
                "WebP picture, or a .safetensors file to add it to the pool."
            )
        return _foreign(found_in_parameters(parameters), pool, config)
    texts = _texts(data)
    if CHUNK in texts:
        return _own(data, pool)
    found = read_found(texts)
    if found is None:
        raise GenerationError("The picture says nothing about how it was made.")
    return _foreign(found, pool, config)


def _text(data: bytes) -> str:
    if len(data) > MAX_TEXT_BYTES:
        return ""
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        return ""


def _texts(data: bytes) -> dict[str, str]:
    from autolora.generate.picture_texts import read_texts

    return _with_file(data, read_texts)


def _with_file(data: bytes, read: Any) -> Any:
    """Read data as a file; errors call it just that."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture"
        path.write_bytes(data)
        try:
            return read(path)
        except GenerationError as error:
            said, here = error.message, shown(path)
            values = [Message("The file") if value == here else value for value in said.values]
            raise GenerationError(said.template, *values) from error


def _own(data: bytes, pool: Pool | None) -> dict[str, Any]:
    from autolora.generate.report import Report, read_report

    report = Report.from_dict(_with_file(data, read_report))
    names = _names_now(report, pool)
    missing = [name for name, now in names.items() if now is None]
    notes = [f"Not in the pool: {shown(', '.join(missing), 300)}."] if missing else []
    order = request_of_report(report, names)
    model = report.model
    return {
        "order": order.to_dict(),
        "model": model,
        "program": "AutoLoRA",
        "missing": missing,
        "notes": notes,
    }


def _names_now(report: Report, pool: Pool | None) -> dict[str, str | None]:
    from autolora.generate.reproduce import locate_adapters

    located = [None] * len(report.adapters) if pool is None else locate_adapters(report, pool)
    pairs = zip(report.adapters, located, strict=True)
    return {used.name: None if entry is None else entry.name for used, entry in pairs}


def _foreign(found: Found, pool: Pool | None, config: PipelineConfig) -> dict[str, Any]:
    from autolora.generate.foreign import take_over

    taken = take_over(found, pool, config)
    order = request_of_taken(taken)
    notes = list(taken.notes)
    if taken.steps is not None and taken.steps > MAX_STEPS:
        notes.append(f"The picture has {taken.steps} steps; at most {MAX_STEPS} are drawn here.")
    return {
        "order": order.to_dict(),
        "model": found.settings.get("Model", ""),
        "program": found.program,
        "missing": list(taken.missing),
        "notes": notes,
    }
