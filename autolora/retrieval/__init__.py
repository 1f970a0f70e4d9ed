"""Which LoRAs fit a prompt: encoders, text, index, ranking and choosing.

Names are imported on first use, so that importing the package does not load torch or FAISS.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autolora.retrieval.choosing import choose
    from autolora.retrieval.encoder import EncoderConfig, LoRAEncoder, TextHead
    from autolora.retrieval.index import PoolIndex, Provenance
    from autolora.retrieval.refresh import RefreshReport, refresh_index
    from autolora.retrieval.retriever import Retriever
    from autolora.retrieval.search import Hit, Searcher
    from autolora.retrieval.text import MiniLMText, TextEncoder
    from autolora.retrieval.tokens import TokenSpec, WeightTokens, weight_tokens

_HOME = {
    "EncoderConfig": "encoder",
    "Hit": "search",
    "LoRAEncoder": "encoder",
    "MiniLMText": "text",
    "PoolIndex": "index",
    "Provenance": "index",
    "RefreshReport": "refresh",
    "Retriever": "retriever",
    "Searcher": "search",
    "TextEncoder": "text",
    "TextHead": "encoder",
    "TokenSpec": "tokens",
    "WeightTokens": "tokens",
    "choose": "choosing",
    "refresh_index": "refresh",
    "weight_tokens": "tokens",
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
