"""What a LoRA is: file formats, exact weight changes, metadata, and pools of files.

Names are imported on first use, so that listing a pool or reading a header does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autolora.adapters.cache import AdapterCache
    from autolora.adapters.changes import LowRank
    from autolora.adapters.deltas import LayerDelta
    from autolora.adapters.formats import FORMATS, Format
    from autolora.adapters.lora import LoRA
    from autolora.adapters.metadata import Metadata
    from autolora.adapters.pool import Pool
    from autolora.adapters.prepared import PreparedLoRA
    from autolora.adapters.report import LoadReport
    from autolora.adapters.scan import PoolEntry, Problem
    from autolora.adapters.writer import save_lora

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
    "AdapterCache": "cache",
    "FORMATS": "formats",
    "Format": "formats",
    "LayerDelta": "deltas",
    "LoRA": "lora",
    "LoadReport": "report",
    "LowRank": "changes",
    "Metadata": "metadata",
    "Pool": "pool",
    "PoolEntry": "scan",
    "PreparedLoRA": "prepared",
    "Problem": "scan",
    "save_lora": "writer",
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
