"""Flow matching against its definition."""

import sys
from types import SimpleNamespace

import torch

from train.flow import add_noise, predict_velocity, sample_sigmas


def test_noisy_latents_interpolate_and_the_velocity_leads_back():
    x0, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    sigmas = torch.tensor([0.0, 0.3, 1.0])
    noisy = add_noise(x0, noise, sigmas)
    assert torch.equal(noisy[0], x0[0]) and torch.equal(noisy[2], noise[2])
    for i, s in enumerate(sigmas.tolist()):
        torch.testing.assert_close(noisy[i] - s * (noise[i] - x0[i]), x0[i])


def test_sigmas_follow_the_logit_normal():
    sigmas = sample_sigmas(20000, 0.4, 1.2, torch.Generator().manual_seed(0))
    assert sigmas.min() > 0 and sigmas.max() < 1
    logits = torch.logit(sigmas.double())
    assert abs(logits.mean().item() - 0.4) < 0.03
    assert abs(logits.std().item() - 1.2) < 0.03


def test_the_model_is_asked_in_diffsynths_units(monkeypatch):
    """Its model function takes times from 0 to 1000 and position ids of three axes."""
    asked = {}
    fake = SimpleNamespace(model_fn_flux_image=lambda dit, **inputs: asked.update(inputs))
    monkeypatch.setitem(sys.modules, "diffsynth.pipelines.flux_image", fake)
    states, pooled = torch.randn(2, 5, 8), torch.randn(2, 8)
    noisy, sigmas = torch.randn(2, 16, 4, 4), torch.tensor([0.25, 1.0])
    predict_velocity(None, noisy, sigmas, states, pooled, guidance=7)
    assert asked["timestep"].tolist() == [250, 1000] and asked["guidance"] == 7
    assert asked["latents"] is noisy and asked["text_ids"].shape == (2, 5, 3)
    assert asked["prompt_emb"] is states and asked["pooled_prompt_emb"] is pooled
