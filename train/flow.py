"""Flow matching as FLUX uses it, shared by every training program.

``x_sigma = (1 - sigma) x_0 + sigma * noise``; the model predicts the velocity ``noise - x_0``
(rectified flow, arXiv 2209.03003; logit-normal times, arXiv 2403.03206).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def sample_sigmas(
    count: int, mean: float, std: float, generator: torch.Generator | None = None
) -> Tensor:
    """Logit-normal noise levels [count] in (0, 1)."""
    return torch.sigmoid(torch.randn(count, generator=generator) * std + mean)


def add_noise(latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """The noisy latents at ``sigmas`` [B]; ``latents`` and ``noise`` are [B, C, h, w]."""
    s = sigmas.view(-1, 1, 1, 1).to(latents)
    return (1 - s) * latents + s * noise


def predict_velocity(
    dit: Any, noisy: Tensor, sigmas: Tensor, states: Tensor, pooled: Tensor, **extra: Any
) -> Tensor:
    """One forward pass of DiffSynth's FLUX model function.

    Args:
        dit: A FLUX transformer, tiny or real.
        noisy: [B, C, h, w].
        sigmas: [B] in [0, 1].
        states: Token states [B, L, D].
        pooled: Pooled text [B, D'].
        extra: Passed to the model function.
    """
    from diffsynth.pipelines.flux_image import model_fn_flux_image

    text_ids = torch.zeros(states.shape[0], states.shape[1], 3, device=states.device)
    return model_fn_flux_image(
        dit,
        latents=noisy,
        timestep=sigmas * 1000,
        prompt_emb=states,
        pooled_prompt_emb=pooled,
        text_ids=text_ids,
        **extra,
    )


def plain_attention(device: torch.device) -> AbstractContextManager[None]:
    """On CPUs the unfused attention, whose backward is faster there for short sequences."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
