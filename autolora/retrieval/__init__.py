"""Which LoRAs fit a prompt: encoders, text, index, ranking and choosing.

Names are imported on first use, so that importing the package does not load torch or FAISS.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autolora.retrieval.encoders import EncoderConfig, LoRAEncoder, TextHead
    from autolora.retrieval.features import TokenSpec, WeightTokens, weight_tokens
    from autolora.retrieval.index import PoolIndex, Provenance, RefreshReport, refresh_index
    from autolora.retrieval.retriever import Retriever
    from autolora.retrieval.search import Hit, Searcher, choose
    from autolora.retrieval.text import MiniLMText, TextEncoder

_HOME = {
    "EncoderConfig": "encoders",
    "Hit": "search",
    "LoRAEncoder": "encoders",
    "MiniLMText": "text",
    "PoolIndex": "index",
    "Provenance": "index",
    "RefreshReport": "index",
    "Retriever": "retriever",
    "Searcher": "search",
    "TextEncoder": "text",
    "TextHead": "encoders",
    "TokenSpec": "features",
    "WeightTokens": "features",
    "choose": "search",
    "refresh_index": "index",
    "weight_tokens": "features",
}

__all__ = [
    "EncoderConfig",
    "Hit",
    "LoRAEncoder",
    "MiniLMText",
    "PoolIndex",
    "Provenance",
    "RefreshReport",
    "Retriever",
    "Searcher",
    "TextEncoder",
    "TextHead",
    "TokenSpec",
    "WeightTokens",
    "choose",
    "refresh_index",
    "weight_tokens",
]


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
