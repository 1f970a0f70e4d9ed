"""Portraits: what an adapter does to the base model's first guess of a clean picture.

The model predicts the velocity ``v = noise - x0`` of a noisy ``x = (1 - sigma) x0 + sigma noise``
(rectified flow, arXiv 2209.03003), so that its guess of the clean latents is ``x - sigma v``. For
the same ``x``, with an adapter and without, the guesses differ by

    delta x0 = -sigma (v_lora - v_base).

No picture is generated: a portrait costs one forward pass per noise and noise level. The input is
pure noise at every level: a fixed noise looks to the model like a picture of which nothing is
known, so that what it guesses comes from the adapter and the neutral prompt.

Shape legend: S noise levels, N noises, C = 16 latent channels, h w latent sides (pixels / 8).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from autolora.config import PortraitSettings

LATENT_CHANNELS = 16
PIXELS_PER_LATENT = 8
TIMESTEPS = 1000  # model time of sigma = 1
EMBEDDED_GUIDANCE = 3.5  # of guidance-distilled models, the published default


class Portraits:
    """Takes portraits with one base model; the passes without adapter are made once.

    Nothing may be attached to the model but what the portrait is of.
    """

    def __init__(self, pipe: Any, settings: PortraitSettings) -> None:
        """Fix the noises and encode the neutral prompt.

        Args:
            pipe: A DiffSynth ``FluxImagePipeline``.
            settings: Noise levels, noises, size and prompt.
        """
        self.pipe = pipe
        self.settings = settings
        side = settings.size // PIXELS_PER_LATENT
        shape = (settings.noises, LATENT_CHANNELS, side, side)
        self._noises = torch.randn(shape, generator=torch.Generator().manual_seed(settings.seed))
        self._text = _encode(pipe, settings.prompt)
        self._base: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Shape of a portrait, ``[S, N, C, h, w]``."""
        noises, channels, height, width = self._noises.shape
        return (len(self.settings.sigmas), noises, channels, height, width)

    def take(self, attached: AbstractContextManager[Any]) -> Tensor:
        """Take the portrait of an adapter.

        Args:
            attached: A context in which the adapter is attached to ``pipe.dit``, at strength 1
                and without gates, and which leaves the model as it was.

        Returns:
            The change of the first guess ``[S, N, C, h, w]``, float32 on the CPU.
        """
        base = self.base()
        with attached:
            changed = self._velocities()
        sigmas = torch.tensor(self.settings.sigmas).view(-1, 1, 1, 1, 1)
        return -sigmas * (changed - base)

    def base(self) -> Tensor:
        """Velocities ``[S, N, C, h, w]`` of the bare model, computed on first use."""
        if self._base is None:
            self._base = self._velocities()
        return self._base

    @torch.no_grad()
    def _velocities(self) -> Tensor:
        sigmas = torch.tensor(self.settings.sigmas).repeat_interleave(self.settings.noises)
        noises = self._noises.repeat(len(self.settings.sigmas), 1, 1, 1)
        parts = [
            self._forward(noise, sigma)
            for noise, sigma in zip(
                noises.split(self.settings.batch), sigmas.split(self.settings.batch), strict=True
            )
        ]
        return torch.cat(parts).view(self.shape)

    def _forward(self, noise: Tensor, sigmas: Tensor) -> Tensor:
        """Velocities of a batch ``[B, C, h, w]`` at noise levels ``[B]``."""
        pipe = self.pipe
        place = {"device": pipe.device, "dtype": pipe.torch_dtype}
        text = {
            name: value.expand(len(noise), *value.shape[1:]) for name, value in self._text.items()
        }
        pipe.load_models_to_device([pipe.family.denoiser])
        velocity = pipe.model_fn(
            pipe.family.model(pipe),
            latents=noise.to(**place),
            timestep=(sigmas * TIMESTEPS).to(**place),
            guidance=torch.full((len(noise),), EMBEDDED_GUIDANCE, **place),
            **text,
        )
        return velocity.float().cpu()


def _encode(pipe: Any, prompt: str) -> dict[str, Tensor]:
    """Token states, pooled text and position ids of one prompt, as DiffSynth encodes it."""
    from diffsynth.pipelines.flux_image import FluxImageUnit_PromptEmbedder

    unit = FluxImageUnit_PromptEmbedder()
    pipe.load_models_to_device(unit.onload_model_names)
    with torch.no_grad():
        encoded: dict[str, Tensor] = unit.process(
            pipe, prompt=prompt, **pipe.family.inputs(pipe, [prompt]), positive=True
        )
    return encoded
