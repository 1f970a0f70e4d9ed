"""Portraits against one pass at a time, with the adapter added to the weights by hand."""

from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

from autolora.config import PipelineConfig, PortraitSettings
from autolora.families.load import load_pipeline
from autolora.generate.portraits import Portraits
from tests.conftest import random_factors

SETTINGS = PortraitSettings(sigmas=(1.0, 0.6), noises=3, size=64, prompt="an object", batch=4)


@pytest.fixture(scope="module")
def pipe(tiny_weights: Path):
    config = PipelineConfig("random", weights=tiny_weights, storage="float32", device="cpu")
    return load_pipeline(config)


@contextmanager
def merged(dit, factors):
    before = {name: dit.get_submodule(name).weight.clone() for name in factors}
    with torch.no_grad():
        for name, (A, B) in factors.items():
            dit.get_submodule(name).weight += B @ A
    try:
        yield
    finally:
        for name, weight in before.items():
            dit.get_submodule(name).weight.data = weight


def velocity_by_hand(pipe, noise, sigma):
    """One pass for one noise, written from DiffSynth's units."""
    minilm = pipe.text_encoder_2.minilm
    states, pooled = minilm.token_states([SETTINGS.prompt], 16)
    with torch.no_grad():
        return pipe.model_fn(
            pipe.dit,
            latents=noise,
            timestep=torch.tensor([1000 * sigma]),
            prompt_emb=states,
            pooled_prompt_emb=pooled,
            text_ids=torch.zeros(1, 16, 3),
        )


def test_portraits_are_the_change_of_the_first_guess(pipe, tiny_shapes) -> None:
    factors = random_factors(tiny_shapes, 5)
    portraits = Portraits(pipe, SETTINGS)
    taken = portraits.take(merged(pipe.dit, factors))
    assert taken.shape == portraits.shape == (2, 3, 16, 8, 8)
    noises = torch.randn((3, 16, 8, 8), generator=torch.Generator().manual_seed(SETTINGS.seed))
    for s, sigma in enumerate(SETTINGS.sigmas):
        for n in range(3):
            noise = noises[n : n + 1]
            base = velocity_by_hand(pipe, noise, sigma)
            with merged(pipe.dit, factors):
                changed = velocity_by_hand(pipe, noise, sigma)
            guess_before, guess_after = noise - sigma * base, noise - sigma * changed
            torch.testing.assert_close(
                taken[s, n : n + 1], guess_after - guess_before, rtol=1e-3, atol=1e-4
            )
    assert taken.abs().mean() > 0.01, "the adapter must do something for this to mean anything"


def test_nothing_attached_changes_nothing(pipe) -> None:
    assert torch.count_nonzero(Portraits(pipe, SETTINGS).take(nullcontext())) == 0


def test_the_bare_passes_are_made_once(pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = pipe.model_fn
    monkeypatch.setattr(pipe, "model_fn", lambda *a, **k: calls.append(1) or real(*a, **k))
    portraits = Portraits(pipe, SETTINGS)
    portraits.take(nullcontext())
    assert len(calls) == 4  # six passes in batches of at most four, twice
    portraits.take(nullcontext())
    assert len(calls) == 6
