"""AutoLoRA: a prompt in, a picture out, the LoRAs picked by the program.

Public names are imported on first use, so that ``import autolora`` does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autolora.errors import (
        AutoLoRAError,
        ConfigError,
        FusionError,
        GenerationError,
        LoRAFormatError,
        PoolError,
        RetrievalError,
    )
    from autolora.lora import LoRA, Pool
    from autolora.pipeline import AutoLoRAPipeline

__version__ = "0.1.0"

__all__ = [
    "AutoLoRAError",
    "AutoLoRAPipeline",
    "ConfigError",
    "FusionError",
    "GenerationError",
    "LoRA",
    "LoRAFormatError",
    "Pool",
    "PoolError",
    "RetrievalError",
    "__version__",
]

_HOME = {
    "AutoLoRAPipeline": "autolora.pipeline",
    "LoRA": "autolora.lora",
    "Pool": "autolora.lora",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME.get(name, "autolora.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
