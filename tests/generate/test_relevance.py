"""What a prompt asks for: responses against a naive rewrite, and what becomes of them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from autolora import AutoLoRAPipeline
from autolora.config import load_config
from autolora.errors import FusionError, GenerationError
from autolora.fusion import Response, attached, get_strategy
from autolora.generate import relevance as module
from autolora.generate.active_adapters import Chosen
from autolora.generate.relevance import (
    Relevance,
    is_named,
    judge,
    neutral_prompts,
    relevance_of,
    word_inputs,
)
from autolora.generate.report import read_report
from autolora.generate.reproduce import repeat
from autolora.lora import LoRA
from tests.conftest import random_factors

LAYER = "blocks.0.attn.b_to_qkv"
NEUTRAL = ("a quiet afternoon", "an object on a white background", "people at a table", "a hill")
PROMPT = "a neon elephant, painted"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory, tiny_weights, make_pool) -> AutoLoRAPipeline:
    folder = tmp_path_factory.mktemp("relevance")
    make_pool(folder / "pool")
    path = folder / "random.yaml"
    path.write_text(
        f"name: random\nkind: tiny\nweights: {tiny_weights}\npool: {folder / 'pool'}\n"
        f"index: {folder / 'index'}\nsteps: 2\nwidth: 64\nheight: 64\n",
        encoding="utf-8",
    )
    return AutoLoRAPipeline(load_config(path))


@pytest.fixture(scope="module")
def relevance(pipe) -> Relevance:
    return Relevance(pipe.base, LAYER, NEUTRAL)


def inputs_of_a_whole_pass(pipe, prompt: str) -> torch.Tensor:
    """The layer's inputs in a pass that is not cut short, cut to the words by hand."""
    seen = []
    handle = pipe.dit.get_submodule(LAYER).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    try:
        module.first_pass(pipe, [prompt])
    finally:
        handle.remove()
    count = len(pipe.tokenizer_2.tokenize(prompt))
    return seen[0][0, 1 : 1 + count].float()


def test_words_are_read_without_padding_and_special_tokens(pipe) -> None:
    first, second = word_inputs(pipe.base, LAYER, [PROMPT, "hill"])
    torch.testing.assert_close(first, inputs_of_a_whole_pass(pipe.base, PROMPT), rtol=0, atol=2e-2)
    assert len(second) == 1


def test_what_is_attached_does_not_matter(pipe, relevance, tiny_shapes) -> None:
    lora = pipe.pool.load("neon")
    fresh = Relevance(pipe.base, LAYER, NEUTRAL)
    with attached(pipe.base.dit, [(pipe.pool.load("elephant"), 3.0)], "sum"):
        assert fresh.of(lora, PROMPT) == relevance.of(lora, PROMPT)


def naive(pipe, lora: LoRA, prompt: str) -> list[float]:
    states = [inputs_of_a_whole_pass(pipe, text).double() for text in NEUTRAL]
    x = torch.cat(states)
    c = torch.cov(x.T, correction=0)
    ridge = 0.1 * c.diagonal().mean()
    values, vectors = torch.linalg.eigh(c + ridge * torch.eye(len(c), dtype=c.dtype))
    m = vectors @ torch.diag(values**-0.25) @ vectors.T
    a, b = lora.factors(LAYER)
    delta = b.double() @ a.double() @ m
    most = [max(float((delta @ word).norm()) for word in text) for text in states]
    words = inputs_of_a_whole_pass(pipe, prompt).double()
    return [(float((delta @ w).norm()) - np.mean(most)) / np.std(most, ddof=1) for w in words]


def test_scores_are_what_the_equation_says(pipe, relevance) -> None:
    lora = pipe.pool.load("neon")
    # Alone or in a batch a bfloat16 pass rounds differently.
    np.testing.assert_allclose(
        relevance.of(lora, PROMPT), naive(pipe.base, lora, PROMPT), rtol=0.05, atol=0.1
    )


def test_strength_and_split_of_the_factors_do_not_matter(pipe, relevance, tiny_shapes) -> None:
    factors = random_factors(tiny_shapes, 4)
    other = {n: (7 * a, b) for n, (a, b) in factors.items()}
    first, second = LoRA.from_factors("x", factors), LoRA.from_factors("y", other)
    np.testing.assert_allclose(relevance.of(first, PROMPT), relevance.of(second, PROMPT), rtol=1e-6)


def test_an_adapter_that_reads_no_text_says_nothing(relevance, tiny_shapes) -> None:
    factors = {n: f for n, f in random_factors(tiny_shapes, 4).items() if n != LAYER}
    assert relevance.of(LoRA.from_factors("x", factors), PROMPT) is None
    zero = {LAYER: tuple(torch.zeros_like(f) for f in random_factors(tiny_shapes, 4)[LAYER])}
    assert relevance.of(LoRA.from_factors("z", zero), PROMPT) is None


@pytest.mark.parametrize("neutral", [(), ("one",), ("one", "  ")])
def test_neutral_prompts_are_checked(pipe, neutral) -> None:
    with pytest.raises(GenerationError, match="at least two neutral prompts"):
        Relevance(pipe.base, LAYER, neutral)


def test_neutral_prompts_ask_for_no_reserved_subject() -> None:
    from train.tiny_world.subjects import reserved_words

    harmless = {
        *("a", "an", "the", "of", "in", "on", "with", "and", "for", "at", "to", "from", "by"),
        *("over", "two", "one", "empty", "wide", "white", "blue", "small", "green", "large"),
        *("red", "black", "high", "long", "full", "square", "first", "above", "angle", "under"),
    }
    prompts = neutral_prompts()
    assert len(prompts) == len(set(prompts)) == 120
    words = {word for prompt in prompts for word in re.findall(r"[a-z]+", prompt)}
    assert not (words & reserved_words()) - harmless


def test_states_are_kept_for_the_next_process(pipe, tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "index" / "neutral.safetensors"
    lora = pipe.pool.load("neon")
    first = Relevance(pipe.base, LAYER, NEUTRAL, file).of(lora, PROMPT)
    asked = []
    inner = module.word_inputs
    monkeypatch.setattr(module, "word_inputs", lambda p, n, t: asked.extend(t) or inner(p, n, t))
    assert Relevance(pipe.base, LAYER, NEUTRAL, file).of(lora, PROMPT) == first
    assert asked == [PROMPT]
    file.write_bytes(b"damaged")
    assert Relevance(pipe.base, LAYER, NEUTRAL, file).of(lora, PROMPT) == first


class Quiet:
    """A relevance that finds nothing asked for but the elephant."""

    def of(self, lora: LoRA, prompt: str) -> tuple[float, ...]:
        return (9.0, 0.0) if lora.name == "elephant" else (0.0, 0.5)


def test_only_optional_adapters_are_silenced_and_none_that_is_subtracted(pipe) -> None:
    rocket, elephant = pipe.pool.load("rocket"), pipe.pool.load("elephant")
    chosen = [
        Chosen(rocket, 1.0, "found", optional=True),
        Chosen(elephant, 1.0, "found", optional=True),
    ]
    found = judge(Quiet(), get_strategy("autolora"), "a hill", chosen)
    assert [entry.quiet for entry in found] == [True, False]
    assert [entry.relevance for entry in found] == [0.5, 9.0]
    used = found[0].to_report()
    assert used.quiet and used.why == "found; quiet: the prompt does not ask for it"
    for kept in (Chosen(rocket, 1.0, "asked"), Chosen(rocket, -1.0, "found", optional=True)):
        (entry,) = judge(Quiet(), get_strategy("autolora"), "a hill", [kept])
        assert not entry.quiet and entry.acting == kept.strength
    (named,) = judge(Quiet(), get_strategy("autolora"), "a Rocket", chosen[:1])
    assert not named.quiet
    for score, quiet in ((0.9, False), (0.89, True)):
        hit = Chosen(rocket, 1.0, "found", score=score, optional=True)
        (entry,) = judge(Quiet(), get_strategy("autolora"), "a hill", [hit])
        assert entry.quiet is quiet
    assert judge(None, get_strategy("autolora"), "a hill", chosen) == chosen


def test_names_titles_and_triggers_count_as_whole_words(pipe) -> None:
    elephant = pipe.pool.load("elephant")
    assert is_named(elephant, "an elphnt animal in a zoo") and is_named(elephant, "ELEPHANT")
    assert not is_named(elephant, "elephants") and not is_named(elephant, "a hill")


@pytest.fixture
def quiet(pipe, monkeypatch) -> AutoLoRAPipeline:
    monkeypatch.setattr(pipe._planner, "_relevance", Quiet())
    return pipe


def pixels(output) -> bytes:
    return output.image.tobytes()


def test_a_quiet_adapter_leaves_the_picture_as_it_were_without_it(quiet, tmp_path: Path) -> None:
    both = [("elephant", 0.8), ("rocket", 1.0)]
    found = quiet("a hill", loras=both, retrieve=False, strategy="autolora")
    alone = quiet("a hill", loras=both[:1], retrieve=False, strategy="sum")
    assert pixels(found) == pixels(alone)
    used = {entry.name: entry for entry in found.report.adapters}
    assert used["rocket"].quiet and used["rocket"].strength == 1.0
    assert not used["elephant"].quiet
    assert "rocket" not in found.report.a1111()
    path = found.save(tmp_path / "a.png")
    assert read_report(path)["adapters"][1]["quiet"] is True
    again = repeat(path, quiet)
    assert again.png() == found.png()


def test_a_tag_is_never_silenced_nor_what_was_named_under_the_default(quiet) -> None:
    tagged = quiet("a hill <lora:rocket:1>", retrieve=False, strategy="autolora")
    assert not tagged.report.adapters[0].quiet
    config = quiet.config
    object.__setattr__(config, "strategy", "autolora")
    try:
        asked = quiet("a hill", loras=["rocket"], retrieve=False)
        assert asked.report.strategy == "autolora" and not asked.report.adapters[0].quiet
        assert asked.report.adapters[0].relevance is None
        quiet.attach([("rocket", 1.0)])
        assert not quiet("a hill").report.adapters[0].quiet
        quiet.attach([("rocket", 1.0)], strategy="autolora")
        silenced = quiet("a hill")
        assert silenced.report.adapters[0].quiet
        assert not quiet("a rocket").report.adapters[0].quiet
        quiet.detach()
        assert pixels(silenced) == pixels(quiet("a hill", retrieve=False))
    finally:
        quiet.detach()
        object.__setattr__(config, "strategy", "gated")


def test_the_real_relevance_is_reported(pipe) -> None:
    output = pipe("an elephant", strategy="autolora")
    assert pipe._planner._relevance.file.is_file()
    (used,) = [u for u in output.report.adapters if u.name == "elephant"]
    assert not used.quiet and isinstance(used.relevance, float)


def test_ssr_is_calibrated_by_the_pipeline(pipe) -> None:
    both = [("elephant", 1.0), ("neon", 1.0)]
    ssr = pipe("a hill", loras=both, retrieve=False, strategy="ssr")
    assert pixels(ssr) != pixels(pipe("a hill", loras=both, retrieve=False, strategy="sum"))
    pipe.attach(both, strategy="ssr")
    try:
        assert pixels(pipe("a hill", use_triggers=True)) == pixels(ssr)
    finally:
        pipe.detach()


@pytest.mark.parametrize("strategy", ["switch", "composite", "loratorio", "klora"])
def test_strategies_by_step_draw_and_leave_the_model_as_it_was(pipe, strategy) -> None:
    both = ["elephant", "rocket"]
    inner = pipe.base.model_fn
    bare = pixels(pipe("a hill", retrieve=False))
    assert pixels(pipe("a hill", loras=both, retrieve=False, strategy=strategy)) != bare
    assert pipe.base.model_fn == inner
    assert pixels(pipe("a hill", retrieve=False)) == bare


def test_a_family_without_a_text_layer_keeps_all_and_refuses_calibration(pipe) -> None:
    from dataclasses import replace
    from types import SimpleNamespace

    family = replace(pipe.base.family, text_layer="")
    other = SimpleNamespace(family=family)
    assert relevance_of(other, pipe.config) is None
    with pytest.raises(FusionError, match="can't be used with"):
        module.calibrate(other, get_strategy("ssr"), [], {})
    assert Response((1.0, 2.0)).value == 2.0
