"""Flow matching against its definition."""

import torch

from train.flow import add_noise, sample_sigmas


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
