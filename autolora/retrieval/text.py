"""Text encoders: what turns captions, metadata and prompts into vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from autolora.errors import RetrievalError


class TextEncoder(Protocol):
    """Anything that gives unit vectors for texts."""

    @property
    def name(self) -> str:
        """Name that is kept with what was made by this encoder."""
        ...

    @property
    def dim(self) -> int:
        """Length D of its vectors."""
        ...

    def encode(self, texts: list[str]) -> Tensor:
        """Encode texts.

        Args:
            texts: n texts.

        Returns:
            Unit vectors ``[n, D]``, float32.
        """
        ...


class VectorCache:
    """Vectors of texts that were encoded before; a prompt's words recur often."""

    def __init__(self, size: int) -> None:
        """Make an empty cache.

        Args:
            size: How many texts' vectors to keep.
        """
        self._size = size
        self._vectors: dict[str, Tensor] = {}

    def encode(self, texts: list[str], encode: Callable[[list[str]], Tensor]) -> list[Tensor]:
        """Vectors of texts, of which ``encode`` is asked for those that are new, each once."""
        new = list(dict.fromkeys(text for text in texts if text not in self._vectors))
        if len(self._vectors) + len(new) > self._size:
            self._vectors.clear()
            new = list(dict.fromkeys(texts))
        if new:
            self._vectors.update(zip(new, encode(new), strict=True))
        return [self._vectors[text] for text in texts]


class MiniLMText:
    """all-MiniLM-L6-v2 as a `TextEncoder`; its weights are loaded when first needed."""

    def __init__(self, cache_size: int = 4096) -> None:
        """Make the encoder without loading it.

        Args:
            cache_size: How many texts' vectors to keep.
        """
        from autolora.minilm import MiniLM

        self.name: str = MiniLM.name
        self.dim: int = MiniLM.dim
        self._cache = VectorCache(cache_size)

    def encode(self, texts: list[str]) -> Tensor:
        """Encode texts.

        Args:
            texts: n texts.

        Returns:
            Unit vectors ``[n, D]``, float32.
        """
        import torch

        from autolora.minilm import shared_minilm

        found = self._cache.encode(texts, lambda new: shared_minilm().encode(new).float())
        return torch.stack(found) if found else torch.zeros(0, self.dim)

    def words(self, count: int, skip: int = 300) -> list[str]:
        """Common English words, from the tokenizer's own vocabulary.

        Args:
            count: How many.
            skip: How many of the very first to leave out, which are mostly function words.

        Returns:
            Lower-case words of three letters and more, the commonest first.
        """
        from autolora.minilm import shared_minilm

        vocabulary: dict[str, int] = shared_minilm().tokenizer.get_vocab()
        ordered = sorted(vocabulary, key=vocabulary.__getitem__)
        whole = [word for word in ordered if word.isascii() and word.isalpha() and len(word) > 2]
        return whole[skip : skip + count]


def check_text_encoder(wanted: str, encoder: TextEncoder) -> None:
    """Make sure that a text encoder is the one that something was made with.

    Args:
        wanted: Name of the encoder that was used.
        encoder: The encoder at hand.

    Raises:
        RetrievalError: They differ.
    """
    if wanted and wanted != encoder.name:
        raise RetrievalError(
            f"The retriever was trained on text vectors of {wanted}, but the text encoder here is "
            f"{encoder.name}; use that encoder, or train the retriever again."
        )
