"""The devices of this machine, their memory, and the weight and compute types that suit them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from autolora.config import PipelineConfig
from autolora.errors import ConfigError, shown

if TYPE_CHECKING:
    import torch

BF16_CAPABILITY = (8, 0)
"""First compute capability whose tensor cores multiply bfloat16 (Ampere)."""
FLOAT8_CAPABILITY = (8, 9)
"""First compute capability that multiplies float8 (Ada)."""

_AVX512_TEST = "_is_avx512_bf16_supported"


@dataclass(frozen=True)
class Hardware:
    """A device to compute on.

    Attributes:
        device: Its torch name.
        name: What it is sold as.
        total: Bytes of memory; None where that is not known.
        free: Bytes that are not in use; None where that is not known.
        capability: CUDA's compute capability; None for anything but an NVIDIA card.
        bfloat16: Whether it multiplies bfloat16 fast.
        float8_storage: Whether it can keep and convert float8 e4m3.
        float8_compute: Whether it multiplies float8.
    """

    device: str
    name: str
    total: int | None
    free: int | None
    capability: tuple[int, int] | None = None
    bfloat16: bool = True
    float8_storage: bool = True
    float8_compute: bool = False


def hardware_of(device: torch.device) -> Hardware:
    """Look at a device that torch can use.

    Args:
        device: The device.
    """
    import torch

    if device.type != "cuda":
        total, free = machine_memory()
        return Hardware(
            str(device),
            device.type.upper(),
            total,
            free,
            bfloat16=device.type != "cpu" or bool(bfloat16_instructions()),
            float8_storage=_keeps_float8(device),
        )
    index = device.index or 0
    free, total = torch.cuda.mem_get_info(index)
    capability = torch.cuda.get_device_capability(index)
    return Hardware(
        device=f"cuda:{index}",
        name=torch.cuda.get_device_name(index),
        total=total,
        free=free,
        capability=capability,
        bfloat16=capability >= BF16_CAPABILITY,
        float8_storage=_keeps_float8(device),
        float8_compute=capability >= FLOAT8_CAPABILITY,
    )


def bfloat16_instructions() -> str | None:
    """Name the instructions by which this CPU multiplies bfloat16 fast; None without any."""
    import torch

    for name, test in (("AMX", "_is_amx_tile_supported"), ("AVX512-BF16", _AVX512_TEST)):
        supported = getattr(torch.cpu, test, None)  # not in every version of torch
        if supported is not None and supported():
            return name
    return None


def all_cards() -> list[Hardware]:
    """Look at every card that torch can use."""
    import torch

    if not torch.cuda.is_available():
        return []
    return [hardware_of(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]


def machine_memory() -> tuple[int | None, int | None]:
    """Bytes of the machine's memory, all and available; None where the system does not say."""
    try:
        total: int | None = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        total = None
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        match = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    except (OSError, ValueError):
        match = None
    return total, int(match[1]) * 1024 if match else None


def why_no_cuda() -> str:
    """Say why torch finds no NVIDIA card, and what to do about it."""
    import torch

    driver = driver_cuda()
    if torch.version.cuda is None:
        if driver is None:
            return (
                f"torch {torch.__version__} is built without CUDA, and no NVIDIA driver answers; "
                "install the driver first, then a CUDA wheel of torch"
            )
        return (
            f"torch {torch.__version__} is built without CUDA; install the wheel for CUDA "
            f"{driver} or older in its place (torch's own install page writes the command; its "
            f"name ends in +cu{driver.replace('.', '')} or a lower number)"
        )
    if driver is None:
        return (
            f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, but no NVIDIA "
            "driver answers; install the driver, or give the container access to the card"
        )
    if _version(driver) < _version(torch.version.cuda):
        return (
            f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, but the driver "
            f"knows CUDA {driver} at most; update the driver, or install a wheel of torch whose "
            f"name ends in +cu{driver.replace('.', '')} or a lower number"
        )
    return (
        f"torch {torch.__version__} is built for CUDA {torch.version.cuda} and the driver answers, "
        "but no card can be used; look at nvidia-smi and CUDA_VISIBLE_DEVICES"
    )


def driver_cuda() -> str | None:
    """Newest CUDA version that the NVIDIA driver knows, such as ``12.4``; None without one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        done = subprocess.run([program], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"CUDA Version:\s*(\d+\.\d+)", done.stdout)
    return match[1] if match else None


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def _keeps_float8(device: torch.device) -> bool:
    """Whether a tensor survives the way to float8 and back on this device."""
    import torch

    try:
        kept = torch.ones(2, device=device).to(torch.float8_e4m3fn)
        return bool((kept.to(torch.float32) == 1).all())
    except (RuntimeError, TypeError, NotImplementedError):
        return False


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
        Storage (one of `autolora.config.STORAGES`), type to compute in (``bfloat16`` or
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
    asked = _asked_compute(config, storage)
    if asked is not None:
        return asked
    if hardware.bfloat16:
        return "bfloat16"
    if not hardware.device.startswith("cpu"):
        notes.append(
            f"{hardware.name} does not multiply bfloat16; float32 is computed with, which is "
            "slower (compute: bfloat16 forces the other)."
        )
    return "float32"


def _asked_compute(config: PipelineConfig, storage: str) -> str | None:
    """Type to compute in where the configuration says so; None leaves it to the device."""
    if config.compute != "auto":
        return config.compute
    return storage if storage in ("bfloat16", "float32") else None


def resolve_device(name: str) -> torch.device:
    """Turn the name of a device into a device that exists.

    Raises:
        ConfigError: It is not the name of a device, or torch cannot use it here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"{shown(name)!r} is not a device; use auto, cpu, cuda or cuda:N."
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        why = f": {why_no_cuda()}" if not torch.cuda.is_available() else ""
        raise ConfigError(
            f"Device {name} is not there for torch on this machine{why}; use auto or cpu."
        )
    return device


def resolve_compute(config: PipelineConfig, device: torch.device) -> torch.dtype:
    """Return the type that linear layers compute in."""
    import torch

    fast = device.type != "cpu" or bfloat16_instructions() is not None
    name = _asked_compute(config, config.storage) or ("bfloat16" if fast else "float32")
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
