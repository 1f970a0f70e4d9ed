"""Estimates how much memory a base model needs under each option, from its sizes.

The estimate is of peak use while a picture is made. Weights are counted exactly. What a forward
pass needs beside them is a multiple of the largest activations; the two multiples were set so that
the published measurements of FLUX.1-dev at 1024 x 1024 come out (peak minus loaded size, and peak
with idle parts offloaded, in the data set ``derekl35/diffusers-quantization-benchmarks``: 4.5 to
4.8 GiB for the decoder, 1.2 GiB for the transformer). Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from autolora.config import PACKED_STORAGES, MemorySettings, PipelineConfig
from autolora.errors import ConfigError, shown
from autolora.runtime.hardware import Hardware

GIB = 1 << 30
STORED_BYTES = {
    "float8": 1.0,
    "torchao_float8": 1.0,
    "torchao_float8_dynamic": 1.0,
    "nf4": 0.52,  # 4 bits and one float8 scale of each 64 weights, twice quantized
    "bfloat16": 2.0,
    "float32": 4.0,
}
"""Bytes per weight of a linear layer by storage."""
PIXELS_PER_TOKEN = 16
TEXT_TOKENS = 512
ADAPTER_RANK, ADAPTERS = 16, 3
"""Adapters assumed by the estimate."""
TOKEN_ACTIVATIONS = 40
"""Vectors of the model's width that a token needs at the peak of a block."""
DECODER_ACTIVATIONS = 9
"""Maps of the picture's full size, with twice the channels of the last stage, while decoding."""
TILE_PIXELS = 512
"""Side of the tiles that a tiled decoder works on."""
PREVIEW_PIXELS = 512
"""Longest side of a preview, which is decoded while the transformer is on the card."""
RESERVE = 0.6 * GIB
"""The CUDA context, libraries' workspaces, and what is lost to fragmentation."""
FRAME = 2 * GIB
"""The program itself in the machine's memory."""


class DenoiserSizes(Protocol):
    """What the estimate asks of a denoiser."""

    @property
    def parameters(self) -> int:
        """Number of weights."""

    @property
    def width(self) -> int:
        """Channels of a token."""

    @property
    def text_dim(self) -> int:
        """Channels of the text's token states."""

    def linear_shapes(self) -> Mapping[str, tuple[int, int]]:
        """``(out, in)`` of every linear layer by name."""


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of all parts of a base model.

    Attributes:
        denoiser: The transformer or UNet.
        text_encoder: Weights of the first text encoder.
        text_encoder_2: Weights of the second; 0 without one.
        vae: Weights of the autoencoder.
        vae_channels: Channels of the decoder's last stage, which has the picture's full size.
    """

    denoiser: DenoiserSizes
    text_encoder: int
    text_encoder_2: int
    vae: int
    vae_channels: int


@dataclass(frozen=True)
class Need:
    """What one set of options needs.

    Attributes:
        storage: How the transformer is kept.
        text_storage: How the text encoders are kept.
        offload: What waits in the machine's memory.
        device: Bytes on the card (the machine's memory itself for a CPU).
        machine: Bytes of the machine's memory beside it.
    """

    storage: str
    text_storage: str
    offload: str
    device: float
    machine: float

    def fits(self, hardware: Hardware) -> bool:
        """Whether it fits, as far as is known."""
        return hardware.free is None or self.device <= hardware.free


def estimate(
    sizes: ModelSizes,
    storage: str,
    memory: MemorySettings,
    width: int,
    height: int,
    compute_bytes: int = 2,
) -> Need:
    """Estimate the need of one set of options.

    Args:
        sizes: Sizes of the model.
        storage: One of `autolora.config.STORAGES`.
        memory: The other options; ``auto`` for offload counts as ``none``.
        width: Picture width in pixels.
        height: Picture height in pixels.
        compute_bytes: Bytes of a number that is computed with.

    Returns:
        Peak use.
    """
    if storage in ("bfloat16", "float32"):  # which are computed in as they are
        compute_bytes = int(STORED_BYTES[storage])
    flux = part_bytes(sizes.denoiser.parameters, storage, compute_bytes)
    text_storage = "float8" if memory.text_storage == "float8" else ""
    texts = part_bytes(sizes.text_encoder + sizes.text_encoder_2, text_storage, compute_bytes)
    vae = float(sizes.vae * compute_bytes)
    step = _step_bytes(sizes, width, height, compute_bytes)
    decode = _decode_bytes(sizes, memory, width, height, compute_bytes)
    reading = TEXT_TOKENS * sizes.denoiser.text_dim * 8 * compute_bytes
    everything = flux + texts + vae
    if memory.offload == "layers":
        widest = max(out * inner for out, inner in sizes.denoiser.linear_shapes().values())
        device = max(step + widest * compute_bytes, decode + vae)
        machine = everything
    elif memory.offload == "parts":
        device = max(flux + step, texts + reading, vae + decode)
        machine = everything
    else:
        device, machine = everything + max(step, decode, reading), 0.0
    offload = "none" if memory.offload == "auto" else memory.offload
    return Need(
        storage, memory.text_storage, offload, device + RESERVE, machine + (FRAME if machine else 0)
    )


def part_bytes(parameters: int, storage: str, compute_bytes: int) -> float:
    """Bytes of a part; biases and norms are few enough to be ignored."""
    return parameters * STORED_BYTES.get(storage, float(compute_bytes))


def all_needs(
    sizes: ModelSizes, memory: MemorySettings, width: int, height: int, compute_bytes: int = 2
) -> Iterator[Need]:
    """Estimate every sensible combination of storage, text storage and offload.

    Args:
        sizes: Sizes of the model.
        memory: For what is not varied.
        width: Picture width in pixels.
        height: Picture height in pixels.
        compute_bytes: Bytes of a number that is computed with.
    """
    for storage, text_storage in (
        ("bfloat16", "auto"),
        ("float8", "auto"),
        ("float8", "float8"),
        ("nf4", "float8"),
    ):
        for offload in ("none", "parts", "layers"):
            if storage == "nf4" and offload == "layers":
                continue
            options = replace(memory, text_storage=text_storage, offload=offload, vram_limit=None)
            yield estimate(sizes, storage, options, width, height, compute_bytes)


def plan_memory(
    config: PipelineConfig,
    storage: str,
    sizes: ModelSizes,
    hardware: Hardware,
    compute_bytes: int,
    machine_free: int | None = None,
) -> tuple[MemorySettings, list[str]]:
    """Settle what is offloaded, before anything is loaded.

    Args:
        config: The configuration.
        storage: How the transformer is going to be kept.
        sizes: Sizes of the model.
        hardware: The device.
        compute_bytes: Bytes of a number that is computed with.
        machine_free: Bytes of the machine's memory that can be had; None where it is not known.

    Returns:
        Settings with offload and limit settled, and notes for the user.

    Raises:
        ConfigError: What is configured does not fit; the message says what each option needs.
    """
    memory = config.memory
    options = [replace(memory, offload=choice) for choice in _offloads(memory, storage, hardware)]
    needs = [
        estimate(sizes, storage, option, config.width, config.height, compute_bytes)
        for option in options
    ]
    fitting = [i for i, need in enumerate(needs) if need.fits(hardware)]
    if not fitting:
        raise _too_little(config, sizes, hardware, needs[-1], compute_bytes)
    settled, waiting = options[fitting[0]], needs[fitting[0]].machine
    notes = []
    if hardware.capability is None:
        if memory.offload in ("parts", "layers"):
            notes = [f"Nothing is offloaded: the model runs on the {hardware.name}."]
        settled = replace(settled, vram_limit=None)
    elif memory.offload == "auto" and settled.offload != "none":
        notes = [f"Memory: {_OFFLOAD_WORDS[settled.offload]} (memory.offload: auto)."]
    if machine_free is not None and waiting > machine_free:
        raise ConfigError(
            f"Base model {shown(config.name)} does not fit: with offload {settled.offload} about "
            f"{waiting / GIB:.1f} GiB wait in the machine's memory, which has "
            f"{machine_free / GIB:.1f} GiB available; keep less by storage float8 or nf4 and "
            "memory.text_storage float8."
        )
    if settled.offload == "layers" and settled.vram_limit is None and hardware.total is not None:
        room = hardware.total - _beside_layers(config, sizes, compute_bytes) - RESERVE
        settled = replace(settled, vram_limit=max(room, GIB / 2) / GIB)
    return settled, notes


def _offloads(memory: MemorySettings, storage: str, hardware: Hardware) -> list[str]:
    """What may be offloaded, the fastest first."""
    if hardware.capability is None:
        return ["none"]
    if memory.offload != "auto":
        return [memory.offload]
    if memory.vram_limit is not None:
        return ["layers"]
    return ["none", "parts"] if storage in PACKED_STORAGES else ["none", "parts", "layers"]


def _beside_layers(config: PipelineConfig, sizes: ModelSizes, compute_bytes: int) -> float:
    """Bytes that a card must have beside the layers that stay on it: for a step, or a preview.

    The finished picture is decoded when the transformer has left.
    """
    step = _step_bytes(sizes, config.width, config.height, compute_bytes)
    width, height = (min(side, PREVIEW_PIXELS) for side in (config.width, config.height))
    return max(step, _decode_bytes(sizes, config.memory, width, height, compute_bytes))


_OFFLOAD_WORDS = {
    "parts": "parts that are idle wait in the machine's memory",
    "layers": "layers wait in the machine's memory and are moved as they are used, which is slower",
}


def _too_little(
    config: PipelineConfig, sizes: ModelSizes, hardware: Hardware, need: Need, compute_bytes: int
) -> ConfigError:
    others = all_needs(sizes, config.memory, config.width, config.height, compute_bytes)
    card = hardware.capability is not None
    rows = [
        f"{_words(other, card)} {other.device / GIB:.1f}"
        for other in others
        if card or other.offload == "none"
    ]
    keys = "storage, memory.offload and" if card else "storage and"
    return ConfigError(
        f"Base model {shown(config.name)} does not fit: {_words(need, card)} needs about "
        f"{need.device / GIB:.1f} GiB at {config.width}x{config.height}, and {hardware.name} has "
        f"{(hardware.free or 0) / GIB:.1f} GiB free; in GiB, {', '.join(rows)}; choose {keys} "
        "memory.text_storage by that, or a smaller size."
    )


def _words(need: Need, card: bool) -> str:
    text = " with float8 text encoders" if need.text_storage == "float8" else ""
    return f"{need.storage}{text}" + (f" and offload {need.offload}" if card else "")


def _step_bytes(sizes: ModelSizes, width: int, height: int, compute_bytes: int) -> float:
    """Activations of one forward pass, one layer's weights cast, and the adapters."""
    tokens = TEXT_TOKENS + (width // PIXELS_PER_TOKEN) * (height // PIXELS_PER_TOKEN)
    layers = sizes.denoiser.linear_shapes().values()
    cast = max(out * inner for out, inner in layers)
    adapters = ADAPTERS * ADAPTER_RANK * sum(out + inner for out, inner in layers)
    numbers = tokens * TOKEN_ACTIVATIONS * sizes.denoiser.width + cast + adapters
    return float(numbers * compute_bytes)


def _decode_bytes(
    sizes: ModelSizes, memory: MemorySettings, width: int, height: int, compute_bytes: int
) -> float:
    pixels = width * height
    if memory.tiled:
        pixels = min(pixels, TILE_PIXELS**2)
    return float(DECODER_ACTIVATIONS * 2 * sizes.vae_channels * pixels * compute_bytes)
