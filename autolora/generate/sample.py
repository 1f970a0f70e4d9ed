"""Draws pictures with a DiffSynth pipeline: texts once, then steps, previews and decoding.

The arithmetic is that of DiffSynth's ``FluxImagePipeline.__call__`` (a test compares the bytes),
taken apart so that several pictures share one reading of the prompt, a preview sees the latents,
and an interrupted picture leaves the pipeline as it was.

Shape legend: B pictures, C = 16 latent channels, h w latent sides (pixels / 8).

From a plan to pictures: adapters in force, prompt read once, one picture per seed.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from autolora.families.load import text_length_for
from autolora.fusion.attach import ready_beside
from autolora.generate.plan import Plan
from autolora.generate.report import Output
from autolora.request import Request

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
                # The factor comes second: before a bfloat16 tensor PyTorch would round it.
                teller.show(step + 1, latents[:1] - velocity[:1] * scheduler.sigmas[step])
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


@dataclass
class _Group:
    """Pictures whose steps were taken together: their seeds, latents, seconds, gates if any."""

    seeds: list[int]
    latents: Tensor
    seconds: float
    records: Any


def make_pictures(
    base: Any,
    plan: Plan,
    acting: AbstractContextManager[Any],
    seeds: Sequence[int],
    watch: Watch,
    batch: int = 1,
    drawn: Callable[[Output], None] | None = None,
) -> list[Output]:
    """Draw a planned picture for each seed.

    Args:
        base: The DiffSynth pipeline.
        plan: What was planned; its report is copied for each picture.
        acting: A context in which the adapters are in force; it gives what was attached.
        seeds: Seeds of the noises.
        watch: Who is told of steps and shown previews.
        batch: Pictures to draw at once. More than 1 is faster where a single picture does not
            keep the device busy, but rounding then differs by a grey level here and there.
        drawn: Given every picture as soon as its batch is decoded; what it raises ends the call.

    Returns:
        One output per seed, in their order; none where `drawn` was given them, so that any number
        of pictures takes the memory of a batch.
    """
    groups = list(chunks(seeds, batch))
    # A batch takes a step for all of its pictures at once.
    total = len(groups) * plan.request.steps
    waiting: list[_Group] = []
    outputs: list[Output] = []
    with acting as attachment:
        plan.clock.mark("attach")
        wait_for_adapters = ready_beside(base.dit, base.torch_dtype, torch.device(base.device))
        texts = read_texts(base, plan.request, plan.report.used_prompt)
        wait_for_adapters()
        layers = {entry.name: len(entry.layers) for entry in attachment.adapters}
        for number, group in enumerate(groups):
            here = dataclasses.replace(watch, done=number * plan.request.steps, total=total)
            with _recording(base, plan) as records:
                latents, seconds = denoise_latents(base, plan.request, texts, group, here)
            waiting.append(_Group(group, latents, seconds, records))
            # Where nobody waits for single pictures, all are decoded after the last step: a
            # decoder that is fetched sends an offloaded transformer away.
            if drawn is not None or number == len(groups) - 1:
                for output in _decoded(base, plan, waiting, texts, layers):
                    (drawn or outputs.append)(output)
                waiting.clear()
    return outputs


def _decoded(
    base: Any, plan: Plan, groups: Sequence[_Group], texts: Texts, layers: Mapping[str, int]
) -> Iterator[Output]:
    for group in groups:
        start = time.perf_counter()
        images = decode_latents(base, group.latents)
        timings = Timings(texts.seconds, group.seconds, time.perf_counter() - start)
        texts.seconds = 0.0  # the pictures after the first read nothing
        yield from _outputs(base, plan, group, images, timings, layers)


def _recording(base: Any, plan: Plan) -> AbstractContextManager[Any]:
    from autolora.fusion import record_gates

    return record_gates(base.dit) if plan.gated else nullcontext()


def _outputs(
    base: Any,
    plan: Plan,
    group: _Group,
    images: Sequence[Image],
    timings: Timings,
    layers: Mapping[str, int],
) -> Iterator[Output]:
    """One output per picture of a group that was drawn together."""
    records, count = group.records, len(group.seeds)
    gates = records.by_adapter() if records is not None else {}
    gate_map = records.by_step(plan.request.steps) if records is not None else None
    hits = [entry.hit for entry in plan.chosen if entry.hit is not None]
    for seed, image in zip(group.seeds, images, strict=True):
        report = copy.deepcopy(plan.report)
        report.seed = seed
        if base.dit.guidance_embedder is not None:
            report.true_cfg = plan.request.true_cfg
        for used in report.adapters:
            used.layers, used.gate = layers[used.name], gates.get(used.name)
        shares = {name: seconds / count for name, seconds in vars(timings).items()}
        report.timings = {**plan.clock.seconds, **shares, "total": plan.clock.total()}
        if count > 1:
            report.batch = list(group.seeds)
            report.notes.append(
                f"Drawn in a batch of {count}; drawn alone, single pixels may differ by a "
                "grey level."
            )
        yield Output(image, hits, report.used_prompt, report, gate_map)
