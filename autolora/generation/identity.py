"""What the base model and the adapters of a picture were, so that another one is noticed.

A file is known by its content. Checkpoints of many gigabytes are known by samples of it: reading
them whole would take longer than the picture.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from autolora.flux.config import PipelineConfig
from autolora.generation.report import BaseModel

MAX_WHOLE_BYTES = 1 << 28
"""Files up to this size (256 MiB) are hashed whole."""
SAMPLES = 256
SAMPLE_BYTES = 1 << 16
_CHUNK_BYTES = 1 << 20


def identify_base(config: PipelineConfig) -> BaseModel:
    """Say what a picture of this base model hangs on.

    Args:
        config: Its configuration.

    Returns:
        Files by part, the gates' among them, and how it computes on this machine; a file that
        cannot be read has an empty fingerprint.
    """
    import torch

    from autolora.flux.loading import resolve_compute, resolve_device

    device = resolve_device(config.device)
    on_cpu = device.type == "cpu"
    files = dict(base_files(config))
    gates = config.gate or shipped_gate(config)
    if gates is not None:
        files["gates"] = gates
    return BaseModel(
        kind=config.kind,
        storage=config.storage,
        compute=str(resolve_compute(config, device)).removeprefix("torch."),
        device=device.type if on_cpu else torch.cuda.get_device_name(device),
        threads=torch.get_num_threads() if on_cpu else 0,
        files={part: _fingerprint_or_empty(path) for part, path in sorted(files.items())},
    )


def base_files(config: PipelineConfig) -> Mapping[str, Path]:
    """Return the files of a base model by part; shards of one part are numbered."""
    if config.kind == "tiny":
        from autolora.flux.tiny.weights import SHIPPED

        return {"transformer": config.weights or SHIPPED}
    from autolora.flux.checkpoints import locate

    files = {}
    for part, located in locate(config).items():
        paths = [path for path in located.paths if path.is_file()]
        for number, path in enumerate(paths):
            files[part if len(paths) == 1 else f"{part}.{number + 1}"] = path
    return files


def shipped_gate(config: PipelineConfig) -> Path | None:
    """The gates that the package ships for its own base model, where it does."""
    path = Path(__file__).resolve().parents[1] / "flux" / "tiny" / "weights" / "gate.safetensors"
    return path if config.uses_shipped_weights and path.is_file() else None


def fingerprint(path: Path) -> str:
    """Identify a file by its content.

    Args:
        path: The file.

    Returns:
        The kind of hash, a colon and the hash. The kind is ``sha256`` for a file of up to
        `MAX_WHOLE_BYTES`, else ``sampled``, over its size and `SAMPLES` evenly spaced blocks, its
        beginning (where the header is) and end among them.

    Raises:
        OSError: It cannot be read.
    """
    stat = os.stat(path)
    return _fingerprint(os.fspath(path), stat.st_size, stat.st_mtime_ns)


def data_sha256(path: Path) -> str:
    """Hash the tensor data of a safetensors file, all that follows its header.

    This is what sd-scripts writes as ``sshs_model_hash``, and A1111 and Civitai show shortened to
    12 and 10 or more digits.

    Args:
        path: A safetensors file whose header is known to be right.

    Raises:
        OSError: It cannot be read.
    """
    stat = os.stat(path)
    return _data_sha256(os.fspath(path), stat.st_size, stat.st_mtime_ns)


def _fingerprint_or_empty(path: Path) -> str:
    try:
        return fingerprint(path)
    except OSError:
        return ""


@lru_cache(maxsize=256)
def _fingerprint(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        if size <= MAX_WHOLE_BYTES:
            return f"sha256:{_hash_rest(file)}"
        digest = hashlib.sha256(str(size).encode())
        for number in range(SAMPLES):
            file.seek((size - SAMPLE_BYTES) * number // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
        return f"sampled:{digest.hexdigest()}"


@lru_cache(maxsize=4096)
def _data_sha256(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        file.seek(8 + header_bytes)
        return _hash_rest(file)


def _hash_rest(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()
