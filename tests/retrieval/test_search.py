import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from autolora.errors import RetrievalError
from autolora.lora import Pool, save_lora
from autolora.retrieval import Hit, Searcher, choose
from autolora.retrieval.calibration import fit_calibration, standard_scores
from autolora.retrieval.encoders import RidgeEncoder, TextWhitening
from autolora.retrieval.features import (
    FlatSpec,
    LoRAInputs,
    TokenSpec,
    WeightTokens,
    fit_probes,
    weight_tokens,
)
from autolora.retrieval.index import Provenance, refresh_index
from autolora.retrieval.prompt_terms import Concept
from autolora.retrieval.retriever import Retriever, RetrieverSpec
from autolora.retrieval.search import Evidence, Findings, wanted
from autolora.retrieval.text import Logistic
from tests.retrieval.synthetic import LAYERS, WordVectors, concept_lora, concept_names, factors_of

WORDS = WordVectors()
SUBJECTS = ["elephant", "sailing ship", "rose", "jack-o-lantern", "orange"]
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
    ("a pixel art sailing ship", {"pixel_art", "sailing_ship"}),
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
    assert hit.name == "rose" and hit.why == 'its name "thorny" is in the prompt'
    assert hit.channels["words"] > 0.9 and hit.concepts == ("thorny",)
    assert 0.9 <= hit.score <= 1 and hit.kind == "subject"


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


def test_reasons_are_safe_to_print(tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    save_lora(pool / "one.safetensors", factors_of(lora_of("elephant")))
    evil = "thorny \x1b[31m\u202e thing"
    (pool / "one.json").write_text(json.dumps({"activation text": evil}))
    provenance = Provenance("", 0, WORDS.name, WORDS.dim)
    index, _ = refresh_index(tmp_path / "index", Pool(pool), provenance, WORDS)
    searcher = Searcher(index, WORDS)
    for prompt in (evil, "a thorny thing \x1b[0m", "\x1b[2J thorny 31m"):
        for item in searcher.find(prompt).evidence:
            assert item.why.isprintable(), repr(item.why)


def test_a_prompt_in_a_broken_encoding_is_searched(searcher: Searcher) -> None:
    assert names(choose(searcher, "an elephant, caf\udce9")) == {"elephant"}


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


def weight_log_odds(searcher: Searcher, words: str) -> torch.Tensor:
    """Log-odds of one concept by row of the weight channel, before anything is explained away."""
    query = RETRIEVER.encode_text(WORDS.encode([words]))
    loras = torch.from_numpy(searcher.index.vectors("weights"))
    scores = standard_scores(query, loras, RETRIEVER.background, RETRIEVER.references)
    return RETRIEVER.calibration.log_odds(scores)[0]


THRESHOLD = math.log(RETRIEVER.calibration.threshold / (1 - RETRIEVER.calibration.threshold))
"""Log-odds from which a LoRA is taken; moved to a probability of one half."""


def probabilities_of(searcher: Searcher, words: str) -> dict[int, float]:
    """What the weight channel says to a prompt of one concept, by row."""
    found = searcher.find(f"a {words}").evidence
    rows = {item.lora: searcher.index.records[item.lora].vector for item in found}
    return {rows[e.lora]: e.probability for e in found if e.concept == 0}  # type: ignore[misc]


def test_weight_probabilities_equal_a_direct_computation(nameless: Searcher) -> None:
    expected = (weight_log_odds(nameless, "elephant") - THRESHOLD).sigmoid()
    seen = probabilities_of(nameless, "elephant")
    assert len(seen) == 8
    for row, probability in seen.items():
        assert probability == pytest.approx(expected[row].item(), abs=1e-5)


def test_a_lora_of_a_known_concept_claims_nothing_else(nameless: Searcher) -> None:
    """Explained by a known concept, a LoRA says less of others, and as much of its own."""
    known = ["rose", "neon"]
    informed = Retriever(
        RETRIEVER.spec,
        RETRIEVER.members,
        RETRIEVER.probes,
        RETRIEVER.background,
        RETRIEVER.references,
        WORDS.encode(known),
    )
    searcher = Searcher(nameless.index, WORDS, informed)
    best = torch.stack([weight_log_odds(nameless, word) for word in known]).amax(0)
    for word in ("elephant", "rose"):
        bare = weight_log_odds(nameless, word)
        gaps = (best - bare).clamp_min(0)
        expected = [
            1 / (1 + math.exp(gap - b + THRESHOLD)) for b, gap in zip(bare, gaps, strict=True)
        ]
        for _ in range(2):  # the second time from what was kept
            seen = probabilities_of(searcher, word)
            assert [seen[row] for row in range(8)] == pytest.approx(expected, rel=1e-3)
    order = SUBJECTS + STYLES
    rose, elephant = (
        next(r.vector for r in nameless.index.records if int(r.name[-4:]) == order.index(word))
        for word in ("rose", "elephant")
    )
    before, after = probabilities_of(nameless, "elephant"), probabilities_of(searcher, "elephant")
    assert after[rose] < before[rose] / 10 and after[elephant] == pytest.approx(before[elephant])
    assert probabilities_of(searcher, "rose")[rose] == pytest.approx(
        probabilities_of(nameless, "rose")[rose]
    )


def test_what_is_to_be_left_out_is_not_wanted() -> None:
    concepts = [Concept("a", (0,)), Concept("b", (1,), negated=True)]
    evidence = [
        Evidence(0, 0, 0.9),
        Evidence(1, 0, 0.9),
        Evidence(1, 1, 0.95),
        Evidence(2, 0, 0.9),
        Evidence(2, 1, 0.4),  # not likely meant
        Evidence(3, 0, 0.99),
        Evidence(3, 1, 0.6),  # less likely than what is asked for
    ]
    assert wanted(Findings([], concepts, evidence)) == {0: 0.9, 2: 0.9, 3: 0.99}


@pytest.mark.parametrize(
    ("prompt", "negative", "expected"),
    [
        ("a neon elephant, no rose", "", {"neon", "elephant"}),
        ("an elephant without neon", "", {"elephant"}),
        ("an elephant, not in pixel art", "", {"elephant"}),
        ("a neon rose", "neon", {"rose"}),
        ("a neon rose", "blurry, roses", {"neon"}),
        ("an elephant instead of a rose", "", {"elephant"}),
        ("a non-neon elephant", "", {"elephant"}),
        ("a neon-free rose", "", {"rose"}),
    ],
)
def test_negation(searcher: Searcher, prompt: str, negative: str, expected: set[str]) -> None:
    assert names(choose(searcher, prompt, negative=negative)) == expected
    assert expected <= names(searcher.search(prompt, 8, negative))
    left_out = {"neon", "elephant", "rose", "pixel_art"} - expected
    named = {hit.name for hit in searcher.search(prompt, 8, negative) if hit.score > 0.5}
    assert not named & left_out


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("I rose early", set()),
        ("prices rose sharply", set()),
        ("an elefant", {"elephant"}),
        ("eleph", set()),
        ("8-bit roses", {"pixel_art", "rose"}),
        ("pixelart rose", {"pixel_art", "rose"}),
        ("the elephant in the room", set()),
        ("eine Rose ohne Neon", {"rose"}),
        ("\u4e00\u53ea\u5927\u8c61", {"elephant"}),
    ],
)
def test_words_as_people_type_them(
    metadata_only: Searcher, prompt: str, expected: set[str]
) -> None:
    assert names(choose(metadata_only, prompt)) == expected


def test_a_measured_cosine_takes_the_place_of_minilms(metadata_only: Searcher) -> None:
    class Measured(WordVectors):
        logistic: Logistic | None = Logistic(0.3, 9.0)

    scale = Searcher(metadata_only.index, Measured())._scale()
    # Equally likely to mean the same: 0.74 of MiniLM, where the logistic is half as steep.
    assert scale(0.3) == pytest.approx(0.74) and scale(0.5) == pytest.approx(0.84)
    Measured.logistic = None
    assert Searcher(metadata_only.index, Measured())._scale()(1.0) <= 0.5


def test_weights_are_judged_by_their_calibrated_threshold(nameless: Searcher) -> None:
    """Probabilities that would do elsewhere choose nothing where held-out LoRAs asked for more."""
    strict = dataclasses.replace(
        RETRIEVER.spec,
        calibration=dataclasses.replace(RETRIEVER.calibration, threshold=1 - 1e-12),
    )
    parts = (RETRIEVER.members, RETRIEVER.probes, RETRIEVER.background, RETRIEVER.references)
    searcher = Searcher(nameless.index, WORDS, Retriever(strict, *parts))
    assert choose(nameless, "an elephant") and not choose(searcher, "an elephant")
