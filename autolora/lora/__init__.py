"""What a LoRA is: file formats, exact weight changes, metadata, and pools of files.

Names are imported on first use, so that listing a pool or reading a header does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autolora.lora.deltas import LayerDelta, LowRank
    from autolora.lora.formats import FORMATS, Format
    from autolora.lora.load_report import LoadReport
    from autolora.lora.lora import LoRA, PreparedLoRA
    from autolora.lora.metadata import Metadata
    from autolora.lora.pool import AdapterCache, Pool, PoolEntry, Problem
    from autolora.lora.save import save_lora

__all__ = [
    "FORMATS",
    "AdapterCache",
    "Format",
    "LayerDelta",
    "LoRA",
    "LoadReport",
    "LowRank",
    "Metadata",
    "Pool",
    "PoolEntry",
    "PreparedLoRA",
    "Problem",
    "save_lora",
]

_HOME = {
    "AdapterCache": "pool",
    "FORMATS": "formats",
    "Format": "formats",
    "LayerDelta": "deltas",
    "LoRA": "lora",
    "LoadReport": "load_report",
    "LowRank": "deltas",
    "Metadata": "metadata",
    "Pool": "pool",
    "PoolEntry": "pool",
    "PreparedLoRA": "lora",
    "Problem": "pool",
    "save_lora": "save",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
