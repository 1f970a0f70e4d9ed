"""Draws pictures with a DiffSynth pipeline: texts once, then steps, previews and decoding.

The arithmetic is that of DiffSynth's ``FluxImagePipeline.__call__`` (a test compares the bytes),
taken apart so that several pictures share one reading of the prompt, a preview sees the latents,
and an interrupted picture leaves the pipeline as it was.

Shape legend: B pictures, C = 16 latent channels, h w latent sides (pixels / 8).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from autolora.flux.loading import text_length_for
from autolora.generation.request import Request

LATENT_CHANNELS = 16
PIXELS_PER_LATENT = 8
PREVIEW_SIDE = 64
"""Longest side of the latents that a preview decodes; larger ones are shrunk first."""

Progress = Callable[[int, int], None]
"""Called as ``progress(steps done, steps in all)``, first with 0."""
Preview = Callable[[int, Image], None]
"""Called as ``preview(steps done, picture)`` with the model's guess of the finished picture."""


@dataclass
class Timings:
    """Seconds that the parts of a generation took."""

    encode: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0


@dataclass
class Texts:
    """What the transformer reads of a prompt, and of the negative prompt where that is used.

    Attributes:
        positive: Token states, pooled vector and position ids of the prompt, batch 1.
        negative: The same of the negative prompt; None where one pass is made per step.
        seconds: How long reading took.
    """

    positive: dict[str, Tensor]
    negative: dict[str, Tensor] | None = None
    seconds: float = 0.0


@dataclass
class Watch:
    """Who is told how far a picture is.

    Attributes:
        progress: Told of every step; what it raises ends the generation.
        preview: Shown the guess of the finished picture; what it raises ends the generation.
        every: Steps from one preview to the next.
        done: Steps that earlier pictures of the same call took.
        total: Steps of all pictures of the call; None is this picture's.
    """

    progress: Progress | None = None
    preview: Preview | None = None
    every: int = 1
    done: int = 0
    total: int | None = None


def denoise(
    pipe: Any,
    request: Request,
    prompt: str,
    progress: Progress | None = None,
    preview: Preview | None = None,
    preview_every: int = 1,
) -> tuple[Image, Timings]:
    """Generate a picture with whatever is attached to the transformer.

    Args:
        pipe: A DiffSynth ``FluxImagePipeline``.
        request: Seed, steps, size and guidance.
        prompt: What the model shall read.
        progress: Told of every step; what it raises ends the generation.
        preview: Shown the guess of the finished picture, ``x0 = x - sigma v``; what it raises ends
            the generation.
        preview_every: Steps from one preview to the next.

    Returns:
        The picture, and how long its parts took.
    """
    texts = read_texts(pipe, request, prompt)
    watch = Watch(progress, preview, preview_every)
    images, timings = draw(pipe, request, texts, [request.seed], watch)
    return images[0], timings


def read_texts(pipe: Any, request: Request, prompt: str) -> Texts:
    """Encode a prompt, and the negative prompt where classifier-free guidance needs it.

    Args:
        pipe: A DiffSynth ``FluxImagePipeline``.
        request: Negative prompt and guidance.
        prompt: What the model shall read.

    Returns:
        What `draw` takes, for any number of pictures.
    """
    start = time.perf_counter()
    two_passes = _guidance(pipe, request)[0] != 1.0
    prompts = [prompt, request.negative_prompt]
    length = text_length_for(pipe, prompts)
    with torch.no_grad(), _onloaded(pipe, ("text_encoder_1", "text_encoder_2")):
        positive = _encode(pipe, prompt, length, True)
        negative = _encode(pipe, request.negative_prompt, length, False) if two_passes else None
    return Texts(positive, negative, time.perf_counter() - start)


def draw(
    pipe: Any, request: Request, texts: Texts, seeds: Sequence[int], watch: Watch | None = None
) -> tuple[list[Image], Timings]:
    """Draw one picture per seed as one batch; see `denoise_latents` and `decode_latents`."""
    latents, seconds = denoise_latents(pipe, request, texts, seeds, watch)
    start = time.perf_counter()
    images = decode_latents(pipe, latents)
    return images, Timings(texts.seconds, seconds, time.perf_counter() - start)


@torch.no_grad()
def denoise_latents(
    pipe: Any, request: Request, texts: Texts, seeds: Sequence[int], watch: Watch | None = None
) -> tuple[Tensor, float]:
    """Take all steps of one picture per seed, as one batch.

    Several seeds at once cost memory, and rounding differs from that of a single picture (by one
    grey level here and there, more where a step amplifies it); pictures that must be the same to
    the byte are drawn one at a time.

    Args:
        pipe: A DiffSynth ``FluxImagePipeline``.
        request: Steps, size and guidance; its seed is not used.
        texts: What `read_texts` gave for this pipeline, or another with the same text encoders.
        seeds: Seeds of the noises.
        watch: Who is told; previews show the first picture.

    Returns:
        Latents ``[B, C, h, w]`` in the order of the seeds, and seconds.
    """
    start = time.perf_counter()
    scheduler = pipe.scheduler
    scheduler.set_timesteps(request.steps, shift=request.sigma_shift)
    teller = _Teller(pipe, watch or Watch(), len(scheduler.timesteps))
    cfg, guidance = _guidance(pipe, request)
    latents = _noises(pipe, request, seeds)
    shared = {
        "guidance": torch.full((1,), guidance, device=pipe.device, dtype=pipe.torch_dtype),
        "image_ids": pipe.dit.prepare_image_ids(latents[:1]),
    }
    positive = _for_batch(texts.positive, len(seeds))
    negative = _for_batch(texts.negative or {}, len(seeds))
    with _onloaded(pipe, teller.needs):
        models = {name: getattr(pipe, name) for name in pipe.in_iteration_models}
        teller.tell(0)
        for step, timestep in enumerate(scheduler.timesteps):
            velocity = pipe.cfg_guided_model_fn(
                pipe.model_fn,
                cfg,
                {**shared, "latents": latents},
                positive,
                negative,
                **models,
                timestep=timestep.unsqueeze(0).to(dtype=pipe.torch_dtype, device=pipe.device),
                progress_id=step,
            )
            if teller.wants_preview(step + 1):
                teller.show(step + 1, latents[:1] - scheduler.sigmas[step] * velocity[:1])
            latents = pipe.step(scheduler, latents, progress_id=step, noise_pred=velocity)
            teller.tell(step + 1)
    if latents.is_cuda:
        torch.cuda.synchronize(latents.device)  # steps are only queued until here
    return latents, time.perf_counter() - start


@torch.no_grad()
def decode_latents(pipe: Any, latents: Tensor) -> list[Image]:
    """Decode latents ``[B, C, h, w]``, one picture at a time; the decoder is fetched once."""
    with _onloaded(pipe, ("vae_decoder",)):
        images = [decode(pipe, latents[i : i + 1]) for i in range(len(latents))]
    pipe.load_models_to_device([])
    return images


def decode(pipe: Any, latents: Tensor) -> Image:
    """Decode the latents ``[1, C, h, w]`` of one picture."""
    decoded = pipe.vae_decoder(latents, device=pipe.device, tiled=getattr(pipe, "tiled", False))
    image: Image = pipe.vae_output_to_image(decoded)
    return image


def _guidance(pipe: Any, request: Request) -> tuple[float, float]:
    """Scales of classifier-free guidance (two passes) and of guidance as an input (distilled)."""
    if pipe.dit.guidance_embedder is None:
        return request.guidance, 0.0
    return request.true_cfg, request.guidance


def _encode(pipe: Any, prompt: str, length: int, positive: bool) -> dict[str, Tensor]:
    from diffsynth.pipelines.flux_image import FluxImageUnit_PromptEmbedder

    encoded: dict[str, Tensor] = FluxImageUnit_PromptEmbedder().process(
        pipe, prompt=prompt, t5_sequence_length=length, positive=positive
    )
    return encoded


def _noises(pipe: Any, request: Request, seeds: Sequence[int]) -> Tensor:
    """One noise per seed ``[B, C, h, w]``, made on the CPU: the same on every device."""
    shape = (1, LATENT_CHANNELS, *(s // PIXELS_PER_LATENT for s in (request.height, request.width)))
    return torch.cat([pipe.generate_noise(shape, seed=seed, rand_device="cpu") for seed in seeds])


def _for_batch(texts: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """Give every picture the same text; position ids are shared by the batch as they are."""
    return {
        name: value if name == "text_ids" else value.expand(count, *value.shape[1:])
        for name, value in texts.items()
    }


class _onloaded:
    """Parts of a managed pipeline on the device, and back where they wait after an error."""

    def __init__(self, pipe: Any, names: Sequence[str]) -> None:
        self._pipe, self._names = pipe, names

    def __enter__(self) -> None:
        self._pipe.load_models_to_device(list(self._names))

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is not None:
            self._pipe.load_models_to_device([])


@dataclass
class _Teller:
    """Calls back, with previews small enough to cost little beside a step."""

    pipe: Any
    watch: Watch
    steps: int
    needs: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        # The decoder stays beside the transformer while there are previews: it is small, and
        # fetching it would send the transformer away.
        extra = () if self.watch.preview is None else ("vae_decoder",)
        self.needs = (*self.pipe.in_iteration_models, *extra)

    def tell(self, done: int) -> None:
        if self.watch.progress is not None:
            self.watch.progress(self.watch.done + done, self.watch.total or self.steps)

    def wants_preview(self, done: int) -> bool:
        return self.watch.preview is not None and done % max(self.watch.every, 1) == 0

    def show(self, done: int, guess: Tensor) -> None:
        assert self.watch.preview is not None
        factor = PREVIEW_SIDE / max(guess.shape[-2:])
        if factor < 1:
            guess = torch.nn.functional.interpolate(
                guess.float(), scale_factor=factor, mode="area"
            ).to(guess.dtype)
        self.watch.preview(done, decode(self.pipe, guess))


def chunks(seeds: Sequence[int], size: int) -> Iterator[list[int]]:
    """Split seeds into batches of at most ``size``, which is at least 1."""
    for start in range(0, len(seeds), size):
        yield list(seeds[start : start + size])
