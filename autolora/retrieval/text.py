"""Text encoders: what turns captions, metadata and prompts into vectors.

CLIP's text vectors lie in a narrow cone: any two texts have a cosine well above zero, and which
texts are near depends on the checkpoint. So `ClipText` subtracts the mean over a fixed list of
texts, and measures the cosine at which two names mean the same on pairs that do and on pairs that
merely share their kind. Where an encoder cannot separate the two, its similarities order a pool and
choose nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor

from autolora.errors import RetrievalError, shown

if TYPE_CHECKING:
    from torch import nn


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


BATCH = 64
MIN_SEPARATION = 1.0
"""Standard deviations between the two kinds of pairs, below which they count as the same."""

_SAME = (
    "cat/kitty truck/lorry horse/pony ship/vessel plane/aircraft house/home boy/lad rock/boulder "
    "forest/woods photo/photograph painting/artwork robot/android monster/creature child/kid "
    "ocean/sea street/road rabbit/bunny doctor/physician bike/bicycle sofa/couch"
)
_SIBLINGS = (
    "cat/lion truck/bus horse/donkey ship/canoe plane/helicopter house/barn boy/man rock/sand "
    "forest/meadow photo/painting painting/sculpture robot/astronaut monster/dragon child/parent "
    "ocean/lake street/tunnel rabbit/squirrel doctor/nurse bike/scooter sofa/chair"
)


class Logistic(NamedTuple):
    """Probability that two texts mean the same, by their cosine.

    Attributes:
        centre: Cosine at which it is as likely as not.
        slope: Steepness there.
    """

    centre: float
    slope: float


class ClipText:
    """CLIP's pooled text vectors, centred and of unit length.

    Args:
        load: Gives tokenizer and model; the model gives pooled vectors first. Called when the
            encoder is first needed.
        cache_size: How many texts' vectors to keep.
    """

    def __init__(self, load: Callable[[], tuple[Any, nn.Module]], cache_size: int = 4096) -> None:
        self._load = load
        self._cache = VectorCache(cache_size)

    @classmethod
    def from_modules(cls, tokenizer: Any, model: nn.Module) -> ClipText:
        """Use modules that are loaded already."""
        return cls(lambda: (tokenizer, model))

    @cached_property
    def name(self) -> str:
        """Name that tells checkpoints apart."""
        import torch

        weights = list(self._modules[1].parameters())
        digest = hashlib.sha256()
        for weight in (weights[0], weights[-1]):
            sample = weight.detach().flatten()[:65536].to("cpu", torch.float32)
            digest.update(sample.numpy().tobytes())
        return f"clip-{self.dim}-{digest.hexdigest()[:12]}"

    @cached_property
    def dim(self) -> int:
        """Length of the vectors."""
        return int(self._mean.shape[0])

    @cached_property
    def logistic(self) -> Logistic | None:
        """How cosines are read; None where they only order."""
        return fit_logistic(self.encode)

    def encode(self, texts: list[str]) -> Tensor:
        """Encode texts.

        Args:
            texts: n texts.

        Returns:
            Unit vectors ``[n, D]``, float32.
        """
        import torch

        def centred(new: list[str]) -> Tensor:
            return torch.nn.functional.normalize(self._pooled(new) - self._mean, dim=-1)

        found = self._cache.encode(texts, centred)
        return torch.stack(found) if found else torch.zeros(0, self.dim)

    @cached_property
    def _modules(self) -> tuple[Any, nn.Module]:
        return self._load()

    @cached_property
    def _mean(self) -> Tensor:
        words = {word for pair in _pairs(_SAME) + _pairs(_SIBLINGS) for word in pair}
        return self._pooled(sorted(words)).mean(0)

    def _pooled(self, texts: Sequence[str]) -> Tensor:
        import torch

        tokenizer, model = self._modules
        device = next(model.parameters()).device
        parts = []
        with torch.no_grad():
            for start in range(0, len(texts), BATCH):
                ids = tokenizer(
                    list(texts[start : start + BATCH]),
                    padding="max_length",
                    max_length=tokenizer.model_max_length,
                    truncation=True,
                    return_tensors="pt",
                ).input_ids
                parts.append(model(ids.to(device))[0].float().cpu())
        vectors: Tensor = torch.nn.functional.normalize(torch.cat(parts), dim=-1)
        return vectors


_TRANSLATED = "cat/\u732b dog/Hund house/maison tree/\u00e1rbol"
"""Words that are near to each other for an encoder that knows several languages."""


class SentenceText:
    """A sentence-transformers model as a `TextEncoder`, calibrated on the spot.

    Args:
        model: Hub id or folder; loaded when first needed.
        cache_size: How many texts' vectors to keep.
    """

    def __init__(self, model: str, cache_size: int = 4096) -> None:
        self.name = f"sentence-transformers {model}"
        self._model_name = model
        self._cache = VectorCache(cache_size)

    @cached_property
    def _model(self) -> Any:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise RetrievalError(
                "Text encoders by hub id or folder need sentence-transformers; "
                "run pip install autolora[sentences]."
            ) from error
        try:
            return SentenceTransformer(self._model_name)
        except Exception as error:
            reason = shown(str(error).partition("\n")[0], 200)
            raise RetrievalError(
                f"The text encoder {shown(self._model_name)} cannot be loaded ({reason}); check "
                "text in the configuration."
            ) from error

    @cached_property
    def dim(self) -> int:
        """Length of the vectors."""
        return int(self.encode(["a"]).shape[1])

    @cached_property
    def logistic(self) -> Logistic | None:
        """How cosines are read; None where they only order."""
        return fit_logistic(self.encode)

    @cached_property
    def multilingual(self) -> bool:
        """Whether it knows other languages than English, by words and their translations."""
        measured = self.logistic
        return measured is not None and bool(
            _cosines(self.encode, _TRANSLATED).mean() >= measured.centre
        )

    def encode(self, texts: list[str]) -> Tensor:
        """Encode texts.

        Args:
            texts: n texts.

        Returns:
            Unit vectors ``[n, D]``, float32.
        """
        import torch

        def unit(new: list[str]) -> Tensor:
            found = self._model.encode(new, convert_to_tensor=True, show_progress_bar=False)
            return torch.nn.functional.normalize(found.float().cpu(), dim=-1)

        found = self._cache.encode(texts, unit)
        return torch.stack(found) if found else torch.zeros(0, self.dim)


def fit_logistic(encode: Callable[[list[str]], Tensor]) -> Logistic | None:
    """Measure at which cosine two names mean the same thing.

    Linear discriminant analysis in one dimension on pairs of synonyms and pairs of the same kind.

    Args:
        encode: Gives unit vectors.

    Returns:
        The logistic, or None where the two kinds of pairs cannot be separated.
    """
    same, siblings = (_cosines(encode, text) for text in (_SAME, _SIBLINGS))
    near, far = float(same.mean()), float(siblings.mean())
    variance = float((same.var() + siblings.var()) / 2)
    if variance <= 0 or (near - far) < MIN_SEPARATION * variance**0.5:
        return None
    return Logistic((near + far) / 2, (near - far) / variance)


def _cosines(encode: Callable[[list[str]], Tensor], text: str) -> Tensor:
    pairs = _pairs(text)
    left, right = (encode([pair[side] for pair in pairs]) for side in (0, 1))
    return (left * right).sum(-1)


def _pairs(text: str) -> list[tuple[str, str]]:
    return [(first, second) for first, _, second in (p.partition("/") for p in text.split())]
