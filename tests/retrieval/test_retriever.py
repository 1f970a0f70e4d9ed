import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from autolora.errors import RetrievalError
from autolora.retrieval.calibration import (
    Calibration,
    _best_threshold,
    explain_away,
    fit_calibration,
    standard_scores,
)
from autolora.retrieval.encoders import LoRAEncoder, RidgeEncoder, TextWhitening
from autolora.retrieval.features import (
    FlatSpec,
    LoRAInputs,
    PortraitSpec,
    TokenSpec,
    WeightTokens,
    fit_probes,
    portrait_tokens,
    weight_tokens,
)
from autolora.retrieval.retriever import FORMAT, Retriever, RetrieverSpec
from tests.retrieval.synthetic import LAYERS, WordVectors, concept_lora, concept_names

TOKENS = TokenSpec(tuple(LAYERS), probes=6, sketch=4)
PORTRAIT = PortraitSpec(settings=2, channels=2, grid=4)
WORDS = WordVectors()
NAMES = concept_names(20)
LORAS = [concept_lora(name, WORDS.encode([name])[0]) for name in NAMES]


def make(ridge_weight: float = 0.75) -> tuple[Retriever, LoRAInputs, torch.Tensor]:
    probes = fit_probes(LORAS, TOKENS)
    weights = WeightTokens.cat([weight_tokens(lora, TOKENS, probes) for lora in LORAS])
    raw = torch.randn(20, 2, 3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    inputs = LoRAInputs(weights, portrait_tokens(raw, PORTRAIT))
    text = WORDS.encode(NAMES)
    head = TextWhitening.fit(text, torch.arange(20), dim=12, shrinkage=1.0)
    spec = FlatSpec(("read",), tuple(range(len(LAYERS))))
    ridge = RidgeEncoder.fit(inputs, head(text), head, spec, TOKENS)
    torch.manual_seed(0)
    deep = LoRAEncoder.for_inputs(
        inputs.only(weights=False, portraits=True), PORTRAIT, WORDS.dim, dim=8, width=16
    )
    about = RetrieverSpec(
        TOKENS,
        PORTRAIT,
        WORDS.name,
        (ridge_weight, 1 - ridge_weight),
        Calibration(-5.0, 1.2, 0.8, 0.4),
        {"base_model": "synthetic"},
    )
    retriever = Retriever(about, [ridge, deep], probes)
    return retriever, inputs, raw


def test_joined_cosine_is_the_weighted_mean_of_the_encoders() -> None:
    retriever, inputs, _ = make()
    text = WORDS.encode(NAMES)
    joined = retriever.encode_text(text) @ retriever.encode_inputs(inputs).T
    expected = sum(
        weight * (m.encode_text(text) @ m.encode_loras(inputs).T)
        for m, weight in zip(retriever.members, (0.75, 0.25), strict=True)
    )
    torch.testing.assert_close(joined, expected, atol=1e-5, rtol=1e-4)
    assert retriever.dim == 20


def test_an_absent_input_leaves_the_other_encoders() -> None:
    retriever, inputs, raw = make()
    only = retriever.encode(LORAS[0])
    assert only is not None
    torch.testing.assert_close(only[:12], retriever.members[0].encode_loras(inputs[:1])[0])
    assert not only[12:].any() and only.norm().item() == pytest.approx(1, abs=1e-5)
    both = retriever.encode(LORAS[0], raw[0])
    torch.testing.assert_close(both, retriever.encode_inputs(inputs)[0], atol=1e-5, rtol=1e-4)
    assert retriever.encode() is None
    with pytest.raises(RetrievalError, match="none of the inputs that they need"):
        retriever.encode_inputs(LoRAInputs(reads=torch.zeros(2, 1, 3, 16)))
    with pytest.raises(RetrievalError, match="weights, its portrait, or both"):
        retriever.encode_inputs(LoRAInputs())


def test_a_linear_encoder_needs_all_of_its_inputs() -> None:
    _, inputs, raw = make()
    text = WORDS.encode(NAMES)
    head = TextWhitening.fit(text, torch.arange(20), dim=12, shrinkage=1.0)
    both = FlatSpec(("portrait", "read"), tuple(range(len(LAYERS))))
    ridge = RidgeEncoder.fit(inputs, head(text), head, both, TOKENS)
    retriever = Retriever(RetrieverSpec(TOKENS, PORTRAIT, WORDS.name, (1.0,)), [ridge])
    assert retriever.encode(LORAS[0]) is None
    assert retriever.encode(portrait=raw[0]) is None
    assert retriever.encode(LORAS[0], raw[0]) is not None


def test_a_lora_for_other_layers_has_no_vector() -> None:
    retriever, _, _ = make()
    pair = (torch.ones(1, 3), torch.ones(3, 1))
    from autolora.lora import LoRA

    assert retriever.encode(LoRA.from_factors("x", {"blocks.7.ff_a.0": pair})) is None


def test_a_file_keeps_everything(tmp_path: Path) -> None:
    retriever, inputs, _ = make()
    retriever.background = retriever.encode_text(WORDS.encode(NAMES[:5]))
    retriever.references = retriever.encode_inputs(inputs)[:5]
    path = tmp_path / "deep" / "retriever.safetensors"
    retriever.save(path)
    loaded = Retriever.load(path)
    assert loaded.spec == retriever.spec
    assert loaded.calibrated and loaded.sha256 == retriever.sha256 != ""
    torch.testing.assert_close(loaded.encode_inputs(inputs), retriever.encode_inputs(inputs))
    torch.testing.assert_close(loaded.encode(LORAS[3]), retriever.encode(LORAS[3]))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_large_matrices_are_halved_without_changing_rankings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autolora.retrieval.retriever._HALF_FROM", 50)
    retriever, inputs, _ = make()
    retriever.save(tmp_path / "r.safetensors")
    loaded = Retriever.load(tmp_path / "r.safetensors")
    tensors = load_file(tmp_path / "r.safetensors")
    assert torch.float16 in {tensor.dtype for tensor in tensors.values()}
    text = WORDS.encode(NAMES)
    before = (retriever.encode_text(text) @ retriever.encode_inputs(inputs).T).argmax(1)
    after = (loaded.encode_text(text) @ loaded.encode_inputs(inputs).T).argmax(1)
    assert before.tolist() == after.tolist()


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def other_format(path: Path) -> None:
    save_file({"x": torch.zeros(1)}, path, metadata={"format": "something"})


def no_config(path: Path) -> None:
    save_file({"x": torch.zeros(1)}, path, metadata={FORMAT: "{}"})


def extra_tensor(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({**load_file(path), "surplus": torch.zeros(1)}, path, metadata=metadata)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncated, "damaged"),
        (other_format, "not a retriever of this version"),
        (no_config, "damaged"),
        (extra_tensor, "damaged"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: path.unlink(), "no retriever at"),
    ],
)
def test_bad_files_are_named_in_one_line(tmp_path: Path, damage: object, words: str) -> None:
    path = tmp_path / "r.safetensors"
    make()[0].save(path)
    damage(path)  # type: ignore[operator]
    with pytest.raises(RetrievalError, match=words) as caught:
        Retriever.load(path)
    assert "\n" not in str(caught.value) and "r.safetensors" in str(caught.value)


def test_standard_scores_equal_a_loop() -> None:
    g = torch.Generator().manual_seed(0)
    text, lora, bank, refs = (torch.randn(n, 6, generator=g) for n in (3, 4, 9, 8))
    scores = standard_scores(text, lora, bank, refs)
    for i in range(3):
        for j in range(4):
            s = (text[i] @ lora[j]).item()
            of_lora = torch.stack([b @ lora[j] for b in bank])
            of_text = torch.stack([r @ text[i] for r in refs])
            assert scores[i, j].tolist() == pytest.approx(
                [(s - v.mean().item()) / v.std().item() for v in (of_lora, of_text)], rel=1e-4
            )


def test_calibration_recovers_the_law_of_the_pairs() -> None:
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(200, 100, 2, generator=g)
    law = torch.sigmoid(-3.0 + 1.5 * scores[..., 0] + 0.5 * scores[..., 1])
    positives = torch.rand(200, 100, generator=g) < law
    fitted = fit_calibration(scores, positives)
    assert (fitted.bias, fitted.lora, fitted.text) == pytest.approx((-3.0, 1.5, 0.5), abs=0.15)
    assert 0 < fitted.threshold < 1


def test_the_threshold_parts_right_from_wrong() -> None:
    scores = torch.zeros(4, 4, 2)
    scores[torch.arange(4), torch.arange(4)] = 6.0
    scores[0, 1] = 2.0
    positives = torch.eye(4, dtype=torch.bool)
    fitted = fit_calibration(scores, positives)
    probability = fitted.log_odds(scores).sigmoid()
    best_wrong = probability.masked_fill(positives, 0).max()
    assert best_wrong < fitted.threshold <= probability.diagonal().min()


def test_the_best_threshold_weighs_right_answers_against_silence() -> None:
    """Right answers at 0.9, 0.6, 0.6, a wrong one at 0.7: by hand 0.6 is worth 3/4 + 3/4."""
    positives = torch.eye(4, 5, dtype=torch.bool)
    probability = torch.full((4, 5), 0.3)
    probability[torch.arange(4), torch.arange(4)] = torch.tensor([0.9, 0.6, 0.6, 0.1])
    probability[3, 4] = 0.7
    assert _best_threshold(probability, positives) == pytest.approx(0.6)
    # Where three texts must be silent at once, 3/4 + (3/4)^3 is less than 1/4 + 1 of 0.9.
    assert _best_threshold(probability, positives, texts=3) == pytest.approx(0.9)


def test_explaining_away_equals_a_loop() -> None:
    g = torch.Generator().manual_seed(0)
    log_odds, known = torch.randn(4, 5, generator=g), torch.randn(5, generator=g)
    known[2] = -torch.inf
    lowered = explain_away(log_odds, known)
    for i in range(4):
        for j in range(5):
            own, best = log_odds[i, j].item(), known[j].item()
            assert lowered[i, j].item() == pytest.approx(own if own >= best else 2 * own - best)


def test_the_threshold_is_looked_for_after_explaining_away() -> None:
    """What a known LoRA claims wrongly no longer counts, so the threshold can lie lower."""
    scores = torch.full((6, 6, 2), -1.0)
    scores[torch.arange(6), torch.arange(6)] = 2.0
    scores[:, 5] = 2.5  # near to everything, but surely the concept below
    positives = torch.eye(6, dtype=torch.bool)
    positives[5] = False
    known = torch.full((1, 6, 2), -1.0)
    known[0, 5] = 9.0
    plain, informed = (fit_calibration(scores, positives, k) for k in (None, known))
    assert (plain.bias, plain.lora) == (informed.bias, informed.lora)
    right = plain.log_odds(scores[0, 0]).sigmoid()
    assert informed.threshold <= right < plain.threshold


def test_files_without_concepts_still_load(tmp_path: Path) -> None:
    retriever, inputs, _ = make()
    retriever.background = retriever.encode_text(WORDS.encode(NAMES))
    retriever.references = retriever.encode_inputs(inputs)
    retriever.concepts = WORDS.encode(NAMES)
    path = tmp_path / "r.safetensors"
    retriever.save(path)
    loras = retriever.encode_inputs(inputs)
    torch.testing.assert_close(
        Retriever.load(path).known_log_odds(loras),
        retriever.log_odds(retriever.encode_text(WORDS.encode(NAMES)), loras).amax(0),
    )
    assert path.stat().st_mode & 0o777 == 0o644
    tensors = load_file(path)
    del tensors["concepts"]
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata=metadata)
    assert Retriever.load(path).known_log_odds(loras).tolist() == [-math.inf] * 20


def with_newcomers() -> tuple[Retriever, torch.Tensor, torch.Tensor]:
    """A retriever whose second encoder judges newcomers; queries and LoRAs of the joined space."""
    retriever, inputs, _ = make(0.5)
    text, loras = retriever.encode_text(WORDS.encode(NAMES)), retriever.encode_inputs(inputs)
    halves = [rows[:, :12] * 2**0.5 for rows in (text, loras)]
    others = [rows[:, 12:] * 2**0.5 for rows in (text, loras)]
    spec = replace(retriever.spec, newcomers=Calibration(-2.0, 0.5, 1.5, 0.7))
    both = Retriever(
        spec, retriever.members, retriever.probes, *halves, WORDS.encode(NAMES[:3]), *others
    )
    return both, text, loras


def test_loras_of_unknown_concepts_are_judged_by_the_encoder_of_newcomers() -> None:
    retriever, text, loras = with_newcomers()
    known = torch.full((20,), -9.0)
    known[4] = 2.0
    got = retriever.judge(text, loras, known)
    own = Calibration(-5.0, 1.2, 0.8, 0.4)
    for j in range(20):
        part = slice(0, 12) if j == 4 else slice(12, 20)
        q, x = (rows[:, part] * 2**0.5 for rows in (text, loras))
        cosine = q @ x.T
        lora = (cosine[:, j] - cosine[:, j].mean()) / cosine[:, j].std()
        pool = (cosine[:, j] - cosine.mean(1)) / cosine.std(1)
        if j == 4:
            expected = explain_away(own.bias + own.lora * lora + own.text * pool, known[4])
        else:
            expected = -2.0 + 0.5 * lora + 1.5 * pool
            expected += math.log(0.4 / 0.6) - math.log(0.7 / 0.3)
        torch.testing.assert_close(got[:, j], expected, atol=1e-3, rtol=1e-3)


def test_known_concepts_are_told_without_the_encoder_of_newcomers() -> None:
    retriever, text, loras = with_newcomers()
    changed = loras.clone()
    changed[:, 12:] = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(retriever.known_log_odds(loras), retriever.known_log_odds(changed))
    unseen = loras.clone()
    unseen[:, 12:] = 0  # a LoRA that the encoder of newcomers can't read
    known = torch.full((20,), -9.0)
    claimed = explain_away(retriever.log_odds(text, unseen), known)
    torch.testing.assert_close(retriever.judge(text, unseen, known), claimed)


def test_an_encoder_of_newcomers_survives_the_file(tmp_path: Path) -> None:
    retriever, text, loras = with_newcomers()
    retriever.save(tmp_path / "r.safetensors")
    again = Retriever.load(tmp_path / "r.safetensors")
    known = retriever.known_log_odds(loras)
    torch.testing.assert_close(again.known_log_odds(loras), known)
    torch.testing.assert_close(again.judge(text, loras, known), retriever.judge(text, loras, known))
    with pytest.raises(RetrievalError, match="another beside it"):
        Retriever(replace(retriever.spec, weights=(1.0,)), retriever.members[:1])


def test_a_pool_of_one_file_gives_no_warning(recwarn) -> None:
    """One reference has no deviation: what is usual is then not known, and nothing is infinite."""
    text, lora = torch.eye(4)[:2], torch.eye(4)[1:2]
    scores = standard_scores(text, lora, torch.eye(4)[:1], lora)
    assert scores.shape == (2, 1, 2) and torch.isfinite(scores).all()
    assert not recwarn.list
