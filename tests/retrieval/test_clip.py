"""CLIP as the search's text encoder: centred vectors, and cosines calibrated on the spot."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from autolora.retrieval.text import _SAME, _SIBLINGS, ClipText, Logistic, _pairs, fit_logistic

SYNONYMS = {pair[1]: pair[0] for pair in _pairs(_SAME)}


class Narrow(nn.Module):
    """Gives every word a random direction in a narrow cone; synonyms are near to each other."""

    def __init__(self, understands: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4), requires_grad=False)
        self.understands = understands
        self.calls = 0

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, None]:
        self.calls += 1
        return torch.stack([self.vector(int(row[0])) for row in ids]), None

    def vector(self, number: int) -> torch.Tensor:
        word = WORDS[number]
        meaning = SYNONYMS.get(word, word) if self.understands else word
        own = direction(word) * 0.3
        return 10 * torch.ones(64) + direction(meaning) + own


def direction(word: str) -> torch.Tensor:
    seed = int.from_bytes(word.encode()[:7], "big") % 2**31
    return torch.randn(64, generator=torch.Generator().manual_seed(seed))


WORDS: list[str] = []


class Tokenizer:
    model_max_length = 77

    def __call__(self, texts: list[str], **_) -> SimpleNamespace:
        for text in texts:
            if text not in WORDS:
                WORDS.append(text)
        return SimpleNamespace(input_ids=torch.tensor([[WORDS.index(text)] for text in texts]))


def test_vectors_are_centred_and_of_unit_length() -> None:
    encoder = ClipText.from_modules(Tokenizer(), Narrow())
    vectors = encoder.encode(["cat", "kitty", "mountain"])
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(3))
    raw = nn.functional.normalize(Narrow()(torch.tensor([[0], [2]]))[0], dim=-1)
    assert raw[0] @ raw[1] > 0.9, "the cone is narrow"
    assert vectors[0] @ vectors[1] > 0.5 > 0.4 > vectors[0] @ vectors[2]
    assert encoder.dim == 64 and encoder.encode([]).shape == (0, 64)


def test_texts_are_encoded_once_and_the_model_only_when_needed() -> None:
    model = Narrow()
    loads = []
    encoder = ClipText(lambda: loads.append(1) or (Tokenizer(), model))
    assert not loads
    encoder.encode(["cat"])
    calls = model.calls
    assert torch.equal(encoder.encode(["cat", "cat"])[0], encoder.encode(["cat"])[0])
    assert model.calls == calls and loads == [1]


def test_checkpoints_have_names_of_their_own() -> None:
    one, same, other = (ClipText.from_modules(Tokenizer(), Narrow()) for _ in range(3))
    other._modules[1].weight.data += 1
    assert one.name == same.name != other.name
    assert one.name.startswith("clip-64-")


def test_the_calibration_parts_synonyms_from_siblings() -> None:
    encoder = ClipText.from_modules(Tokenizer(), Narrow())
    fitted = encoder.logistic
    assert isinstance(fitted, Logistic)
    for pairs, wanted in ((_SAME, True), (_SIBLINGS, False)):
        near = [
            float((encoder.encode([a]) * encoder.encode([b])).sum()) > fitted.centre
            for a, b in _pairs(pairs)
        ]
        assert sum(answer == wanted for answer in near) >= 0.9 * len(near)
    assert ClipText.from_modules(Tokenizer(), Narrow(understands=False)).logistic is None


def test_on_minilm_it_finds_about_what_was_set_by_hand() -> None:
    from autolora.retrieval.search import MINILM
    from autolora.retrieval.text import MiniLMText

    fitted = fit_logistic(MiniLMText().encode)
    assert fitted is not None
    centre, slope = MINILM
    assert fitted.centre == pytest.approx(centre, abs=0.15)
    assert slope / 2 < fitted.slope < slope * 2


def test_no_reserved_subject_is_among_the_words() -> None:
    import unicodedata

    reserved = {
        unicodedata.name(chr(code), "").lower()
        for code in (*range(0x2300, 0x2C00), *range(0x1F000, 0x1FB00))
        if code % 7 == 3
    }
    words = {word for pair in _pairs(_SAME) + _pairs(_SIBLINGS) for word in pair}
    assert not words & reserved
