"""Settings of full-size base models: where their files come from, and how they share the memory."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from autolora.errors import shown

SOURCES = ("modelscope", "huggingface")
OFFLOADS = ("auto", "none", "parts", "layers")
TEXT_STORAGES = ("auto", "float8")
PARTS = ("transformer", "text_encoder", "text_encoder_2", "vae", "tokenizer", "tokenizer_2")
"""Parts of a FLUX.1 model, named as the folders of its published repositories."""

_HUB_REFERENCE = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?::(?P<pattern>[^:]+))?")


@dataclass(frozen=True)
class HubReference:
    """Files in a repository of a model hub.

    Attributes:
        id: Repository, ``owner/name``.
        pattern: Path or glob of the files in it; None where it is not narrowed down.
    """

    id: str
    pattern: str | None = None


@dataclass(frozen=True)
class CheckpointSettings:
    """Where the parts of a full-size base model come from.

    A part is a file, a folder, or ``owner/name:pattern`` for files of a hub repository.
    """

    base: str | None = None
    """Folder or hub repository, laid out as published, for the parts that are not named below."""
    transformer: str | None = None
    """The diffusion transformer: a single file (BFL's names), or a folder in diffusers' layout."""
    text_encoder: str | None = None
    """CLIP-L."""
    text_encoder_2: str | None = None
    """T5-XXL."""
    vae: str | None = None
    """The autoencoder: BFL's ``ae.safetensors``, or a folder in diffusers' layout."""
    tokenizer: str | None = None
    """Folder of CLIP's tokenizer."""
    tokenizer_2: str | None = None
    """Folder of T5's tokenizer."""
    folder: Path = Path("models")
    """Where files of hub repositories are kept, as ``folder/owner/name/...``."""
    source: str = "modelscope"
    """Hub that missing files come from: one of `SOURCES`."""
    download: bool = False
    """Whether to download what is missing while loading; it is tens of gigabytes."""

    def problems(self) -> list[str]:
        """Say what is wrong with the values, one sentence part each."""
        if self.source in SOURCES:
            return []
        return [f"checkpoint.source must be one of {', '.join(SOURCES)}, not {shown(self.source)}"]


@dataclass(frozen=True)
class MemorySettings:
    """How a full-size base model shares the memory of the card and of the machine."""

    offload: str = "auto"
    """What waits in the machine's memory: ``none``; idle ``parts``, moved as a whole; ``layers``,
    which are moved one by one as they are used. ``auto`` takes the first of these that fits."""
    vram_limit: float | None = None
    """GiB of the card that layers may fill before they stay in the machine's memory (offload
    ``layers`` only); None leaves room for the picture that is configured."""
    text_storage: str = "auto"
    """What the text encoders' linear layers are kept in: ``float8``, or ``auto`` for the type that
    is computed in."""
    tiled: bool = False
    """Whether the autoencoder decodes in tiles: slower, and needs far less at large sizes."""

    def problems(self) -> list[str]:
        """Say what is wrong with the values, one sentence part each."""
        found = []
        for key, choices in (("offload", OFFLOADS), ("text_storage", TEXT_STORAGES)):
            value = getattr(self, key)
            if value not in choices:
                found.append(
                    f"memory.{key} must be one of {', '.join(choices)}, not {shown(value)}"
                )
        limit = self.vram_limit
        if limit is not None and not (math.isfinite(limit) and limit > 0):
            found.append(f"memory.vram_limit must be a positive number of GiB, not {limit}")
        elif limit is not None and self.offload not in ("layers", "auto"):
            found.append("memory.vram_limit belongs to memory.offload layers")
        return found


@dataclass(frozen=True)
class AdapterSettings:
    """How adapters are kept ready and put into the base model."""

    cache_gb: float = 2.0
    """GiB of adapters to keep in memory, parsed and prepared, so that switching reads no file."""
    pin: bool = False
    """Whether to keep what is prepared on the accelerator; without one this changes nothing."""
    approximate_rank: int = 64
    """Rank that LoKr, LoHa, DoRA and full differences are approximated with, except where they are
    merged, which is exact."""
    text_encoders: bool = False
    """Whether adapters also act on the text encoders, where they have parts for them."""

    def problems(self) -> list[str]:
        """Say what is wrong with the values, one sentence part each."""
        found = []
        if not (math.isfinite(self.cache_gb) and self.cache_gb >= 0):
            found.append(f"adapters.cache_gb must be a number of GiB, not {self.cache_gb}")
        if not 1 <= self.approximate_rank <= 512:
            found.append(
                f"adapters.approximate_rank must be between 1 and 512, not {self.approximate_rank}"
            )
        return found


def hub_reference(text: str) -> HubReference | None:
    """Read ``owner/name`` or ``owner/name:pattern``; None where the text is a path.

    Args:
        text: What a configuration says; `autolora.flux.config.load_config` has made relative paths
            of things that exist absolute.
    """
    match = _HUB_REFERENCE.fullmatch(text)
    if match is None or match["id"].startswith("."):
        return None
    return HubReference(match["id"], match["pattern"])
