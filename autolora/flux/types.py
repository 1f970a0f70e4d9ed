"""Settles what a full-size model is kept in and computes in, by what the device can do."""

from __future__ import annotations

from importlib.util import find_spec

from autolora.errors import ConfigError
from autolora.flux.config import PipelineConfig
from autolora.flux.hardware import Hardware

_LIBRARY = {
    "nf4": "bitsandbytes",
    "torchao_float8": "torchao",
    "torchao_float8_dynamic": "torchao",
}
METHODS = {
    "nf4": "bitsandbytes_nf4",
    "torchao_float8": "torchao_fp8_w8a16",
    "torchao_float8_dynamic": "torchao_fp8_w8a8",
}
"""DiffSynth's names of the packed storages."""


def settle_types(config: PipelineConfig, hardware: Hardware) -> tuple[str, str, list[str]]:
    """Choose storage and computation type, and say where that is not what was asked for.

    Args:
        config: What was asked for.
        hardware: The device.

    Returns:
        Storage (one of `autolora.flux.config.STORAGES`), type to compute in (``bfloat16`` or
        ``float32``), and notes for the user.

    Raises:
        ConfigError: The storage needs a library that is not installed.
    """
    notes: list[str] = []
    storage = config.storage
    if storage == "torchao_float8_dynamic" and not hardware.float8_compute:
        notes.append(
            f"{hardware.name} does not multiply float8; weights are kept in float8 and computed "
            "with in a wider type (storage float8)."
        )
        storage = "float8"
    library = _LIBRARY.get(storage)
    if library is not None and find_spec(library) is None:
        raise ConfigError(
            f"storage {storage} needs {library}, which is not installed; install it with: "
            f'pip install "autolora[quant]".'
        )
    compute = _compute(config, storage, hardware, notes)
    if storage == "float8" and not hardware.float8_storage:
        notes.append(f"{hardware.name} cannot keep float8; weights are kept in {compute}.")
        storage = compute
    return storage, compute, notes


def _compute(config: PipelineConfig, storage: str, hardware: Hardware, notes: list[str]) -> str:
    if config.compute != "auto":
        return config.compute
    if storage in ("bfloat16", "float32"):
        return storage
    if hardware.device.startswith("cpu"):
        return "float32"
    if hardware.bfloat16:
        return "bfloat16"
    notes.append(
        f"{hardware.name} does not multiply bfloat16; float32 is computed with, which is slower "
        "(compute: bfloat16 forces the other)."
    )
    return "float32"
