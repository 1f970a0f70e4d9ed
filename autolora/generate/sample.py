"""Drives any DiffSynth image pipeline: inputs, units, steps, previews and decoding.

All of DiffSynth's image pipelines do the same three things: their ``__call__`` sorts arguments into
three dictionaries and sets the scheduler, their units turn these into tensors, and a loop calls
``cfg_guided_model_fn`` and ``step``. Here the first is taken from ``__call__`` itself, which is
stopped at its first unit; the second and third are repeated so that several pictures share one
reading of the prompt, a preview sees the latents, and an interrupted picture leaves the pipeline as
it was. A test compares the bytes with ``__call__`` for every family.

Shape legend: B pictures, C latent channels, h w latent sides.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from autolora.errors import GenerationError, shown
from autolora.families.base import Family
from autolora.fusion.attach import ready_beside
from autolora.generate.plan import Plan
from autolora.generate.report import Output
from autolora.images import GivenImages
from autolora.request import Request

PREVIEW_SIDE = 64
"""Longest side of the latents that a preview decodes; larger ones are shrunk first."""

Progress = Callable[[int, int], None]
"""Called as ``progress(steps done, steps in all)``, first with 0."""
Preview = Callable[[int, Image], None]
"""Called as ``preview(steps done, picture)`` with the model's guess of the finished picture."""

_OWN = frozenset(
    [
        "self",
        "prompt",
        "negative_prompt",
        "cfg_scale",
        "embedded_guidance",
        "height",
        "width",
        "seed",
        "rand_device",
        "num_inference_steps",
        "t5_sequence_length",
        "tiled",
        "progress_bar_cmd",
    ]
)
"""Arguments that a request has fields for, or that the pipeline's configuration settles."""
_REFUSED = {
    "lora": "adapters",
    "negative_lora": "adapters",
    "positive_only_lora": "adapters",
    "lora_encoder_inputs": "adapters",
    "layer_num": "one picture at a time",
}
"""Arguments that would step around what is done here, and what is there in their place."""

_Inputs = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]
"""A pipeline's inputs: shared, of the prompt, of the negative prompt."""


@dataclass
class Timings:
    """Seconds that the parts of a generation took."""

    encode: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0


@dataclass
class Watch:
    """Progress and preview callbacks; what they raise ends the generation.

    Attributes:
        progress: Called after every step.
        preview: Called with the guess of the finished picture.
        every: Steps from one preview to the next.
        done: Steps that earlier pictures of the same call took.
        total: Steps of all pictures of the call; None is this picture's.
    """

    progress: Progress | None = None
    preview: Preview | None = None
    every: int = 1
    done: int = 0
    total: int | None = None


@dataclass
class Conditions:
    """What a generation's pictures share: arguments sorted by the pipeline, and its prompt read.

    Attributes:
        pipe: The pipeline.
        family: Its family.
        inputs: The three dictionaries before any unit.
        read: By number of a unit that reads texts, what it added to each dictionary.
        cfg: Scale of classifier-free guidance; 1 is a single pass per step.
        steps: Denoising steps that the scheduler takes.
        seconds: How long the prompt took to read.
    """

    pipe: Any
    family: Family
    inputs: _Inputs
    read: dict[int, _Inputs] = field(default_factory=dict)
    cfg: float = 1.0
    steps: int = 0
    seconds: float = 0.0

    def at(self, seed: int) -> _Inputs:
        """Run the pipeline's units for a seed; texts are read the first time only."""
        pipe, texts = self.pipe, set(self.family.text_encoders.values())
        current: _Inputs = tuple(dict(part) for part in self.inputs)  # type: ignore[assignment]
        current[0]["seed"] = seed
        for number, unit in enumerate(pipe.units):
            uses_texts = not texts.isdisjoint(unit.onload_model_names or ())
            reads = uses_texts and (unit.seperate_cfg or self._given(unit))
            if reads and number in self.read:
                for part, added in zip(current, self.read[number], strict=True):
                    part.update(added)
                continue
            before = [dict(part) for part in current]
            if reads or self._given(unit):
                pipe.load_models_to_device(_present(pipe, self._models(unit)))
            with _seeded(pipe, seed) if self.family.samples_latents else nullcontext():
                current = pipe.unit_runner(unit, pipe, *current)
            if reads:
                self.read[number] = tuple(map(_added, before, current))  # type: ignore[assignment]
        return current

    def _given(self, unit: Any) -> bool:
        """Whether a unit that uses models has been given something to use them for."""
        wanted = unit.fetch_input_params()
        return bool(unit.onload_model_names) and any(
            self.inputs[0].get(name) is not None and name not in _OWN and "tile" not in name
            for name in wanted
        )

    def _models(self, unit: Any) -> list[str]:
        """Models of a unit; DiffSynth's Z-Image asks for ``vae`` where it uses ``vae_encoder``."""
        names = list(unit.onload_model_names)
        return [*names, "vae_encoder"] if any(n.startswith("vae") for n in names) else names


def input_names(family: Family) -> tuple[str, ...]:
    """Names of the inputs that a family's pipeline takes beside those of every request."""
    module, _, name = family.pipeline.partition(":")
    pipeline = getattr(import_module(module), name)
    named = set(inspect.signature(pipeline.__call__).parameters) | family.unit_inputs
    return tuple(sorted(named - _OWN - _REFUSED.keys()))


def check_inputs(pipe: Any, inputs: Mapping[str, Any]) -> None:
    """Make sure that a pipeline takes what is given.

    Raises:
        GenerationError: It does not, or lacks the model that an input is for.
    """
    family: Family = pipe.family
    known = input_names(family)
    for name, value in inputs.items():
        if value is None:
            continue
        if name in _REFUSED:
            raise GenerationError(f"The input {name} is not taken here; use {_REFUSED[name]}.")
        if name not in known:
            raise GenerationError(
                f"{family.title} does not take {shown(name, 60)}; it takes {', '.join(known)}."
            )
        needed = family.needs.get(name)
        if needed is not None and _absent(getattr(pipe, needed, None)):
            raise GenerationError(
                f"{name} needs a {needed}, which this base model was loaded without; name one in "
                "the configuration, below `checkpoint:`."
            )
    images = family.images(pipe)
    if images.required and any(inputs.get(n or "") is None for n in (images.image, images.mask)):
        raise GenerationError(
            "This base model fills the masked part of a picture; give a picture and a mask."
        )
    masked = images.mask is not None and inputs.get(images.mask) is not None
    if masked and images.image is not None and inputs.get(images.image) is None:
        raise GenerationError("A mask says which part of a picture to redraw; give a picture.")


def _absent(model: Any) -> bool:
    """Whether a part is not there; DiffSynth wraps ControlNets, and an empty list of them, too."""
    models = getattr(model, "models", None)
    return model is None or (models is not None and all(m is None for m in models))


def prepare(pipe: Any, request: Request, prompt: str, seed: int = 0) -> Conditions:
    """Sort a pipeline's inputs and read the prompt.

    Args:
        pipe: What `autolora.families.load.load_pipeline` gave.
        request: The request; its seed is not used.
        prompt: What the model reads.
        seed: Seed of the first picture.

    Returns:
        What `denoise_latents` takes, for any number of pictures.

    Raises:
        GenerationError: An input that the pipeline does not take.
    """
    start = time.perf_counter()
    family: Family = pipe.family
    given = request.images.named(pipe, request.width, request.height)
    given = {name: value for name, value in given.items() if value is not None}
    check_inputs(pipe, given)
    embedded = family.embeds_guidance(pipe)
    cfg = request.true_cfg if embedded else request.guidance
    arguments = {
        "prompt": prompt,
        "negative_prompt": request.negative_prompt,
        "cfg_scale": cfg,
        "width": request.width,
        "height": request.height,
        "num_inference_steps": request.steps,
        "seed": seed,
        "rand_device": "cpu",
    }
    taken = inspect.signature(type(pipe).__call__).parameters
    if "embedded_guidance" in taken:
        arguments["embedded_guidance"] = request.guidance if embedded else 0.0
    if "tiled" in taken:
        arguments["tiled"] = getattr(pipe, "tiled", False)
    if request.sigma_shift is not None:
        if "sigma_shift" not in taken:
            raise GenerationError(
                f"{family.title} does not take sigma_shift; remove it from the configuration."
            )
        arguments["sigma_shift"] = request.sigma_shift
    arguments |= family.inputs(pipe, [prompt, request.negative_prompt])
    arguments |= {name: value for name, value in given.items() if name in taken}
    inputs = _sorted_inputs(pipe, arguments)
    _add_unit_inputs(
        pipe, inputs, {n: v for n, v in given.items() if n not in taken}, request.steps
    )
    conditions = Conditions(pipe, family, inputs, cfg=cfg, steps=len(pipe.scheduler.timesteps))
    with torch.no_grad(), _onloaded(pipe, ()):
        conditions.at(seed)
    conditions.seconds = time.perf_counter() - start
    return conditions


class _Sorted(Exception):
    def __init__(self, inputs: _Inputs) -> None:
        self.inputs = inputs


def _sorted_inputs(pipe: Any, arguments: Mapping[str, Any]) -> _Inputs:
    """Let the pipeline's own call set the scheduler and sort its arguments, and stop it there."""

    def stop(unit: Any, pipe: Any, *inputs: dict[str, Any]) -> None:
        raise _Sorted(inputs)  # type: ignore[arg-type]

    runner = pipe.unit_runner
    pipe.unit_runner = stop
    try:
        pipe(**arguments, progress_bar_cmd=iter)
    except _Sorted as found:
        return found.inputs
    finally:
        pipe.unit_runner = runner
    raise AssertionError("a DiffSynth pipeline without units")


def _add_unit_inputs(pipe: Any, inputs: _Inputs, given: Mapping[str, Any], steps: int) -> None:
    """Give units what the pipeline's call has no argument for."""
    inputs[0].update(given)
    if "denoising_strength" in given:
        pipe.scheduler.set_timesteps(steps, denoising_strength=given["denoising_strength"])


@torch.no_grad()
def denoise_latents(
    conditions: Conditions, seeds: Sequence[int], watch: Watch | None = None
) -> tuple[Tensor, float]:
    """Take all steps of one picture per seed, as one batch.

    Several seeds at once cost memory, and rounding differs from that of a single picture (by one
    grey level here and there, more where a step amplifies it); pictures that must be the same to
    the byte are drawn one at a time.

    Args:
        conditions: What `prepare` gave.
        seeds: Seeds of the noises.
        watch: Callbacks; previews show the first picture.

    Returns:
        Latents ``[B, C, h, w]`` in the order of the seeds, and seconds.
    """
    start = time.perf_counter()
    pipe, family, scheduler = conditions.pipe, conditions.family, conditions.pipe.scheduler
    watcher = _Watcher(pipe, family, watch or Watch(), conditions.steps)
    with _onloaded(pipe, ()):
        shared, positive, negative = _batched(family, [conditions.at(seed) for seed in seeds])
    with _onloaded(pipe, _present(pipe, watcher.needs)):
        models = {name: getattr(pipe, name) for name in pipe.in_iteration_models}
        watcher.tell(0)
        for step, timestep in enumerate(scheduler.timesteps):
            prediction = pipe.cfg_guided_model_fn(
                pipe.model_fn,
                conditions.cfg,
                shared,
                positive,
                negative,
                **models,
                timestep=timestep.unsqueeze(0).to(dtype=pipe.torch_dtype, device=pipe.device),
                progress_id=step,
            )
            if watcher.wants_preview(step + 1):
                watcher.show(step + 1, timestep, prediction, shared)
            shared["latents"] = pipe.step(
                scheduler, progress_id=step, noise_pred=prediction, **shared
            )
            watcher.tell(step + 1)
    latents = family.unpack(shared["latents"], shared)
    if latents.is_cuda:
        torch.cuda.synchronize(latents.device)  # steps are only queued until here
    return latents, time.perf_counter() - start


@torch.no_grad()
def decode_latents(pipe: Any, latents: Tensor) -> list[Image]:
    """Decode latents ``[B, C, h, w]``, one picture at a time; the decoder is fetched once."""
    family: Family = pipe.family
    with _onloaded(pipe, (family.decoder,)):
        images = [decode(pipe, latents[i : i + 1]) for i in range(len(latents))]
    pipe.load_models_to_device([])
    return images


def decode(pipe: Any, latents: Tensor) -> Image:
    """Decode the latents ``[1, C, h, w]`` of one picture."""
    image: Image = pipe.family.decode(pipe, latents)
    return image


def denoise(
    pipe: Any,
    request: Request,
    prompt: str,
    progress: Progress | None = None,
    preview: Preview | None = None,
    preview_every: int = 1,
) -> tuple[Image, Timings]:
    """Generate the picture of a request with whatever is attached to the denoiser.

    Args:
        pipe: What `autolora.families.load.load_pipeline` gave.
        request: Seed, steps, size, guidance and further inputs.
        prompt: What the model reads.
        progress: Called after every step; what it raises ends the generation.
        preview: Called with the guess of the finished picture; likewise.
        preview_every: Steps from one preview to the next.

    Returns:
        The picture, and how long its parts took.
    """
    conditions = prepare(pipe, request, prompt, request.seed)
    watch = Watch(progress, preview, preview_every)
    latents, seconds = denoise_latents(conditions, [request.seed], watch)
    start = time.perf_counter()
    images = decode_latents(pipe, latents)
    return images[0], Timings(conditions.seconds, seconds, time.perf_counter() - start)


def can_batch(family: Family, images: GivenImages) -> bool:
    """Whether pictures can be drawn together: most inputs have rows for one picture only."""
    return bool(family.per_image) and not (images.mask or images.control or images.inputs)


def _batched(family: Family, pictures: Sequence[_Inputs]) -> _Inputs:
    """Inputs of several pictures as one batch: a noise each, and the same text for all."""
    first, count = pictures[0], len(pictures)
    if count == 1:
        return first
    for part in first:
        for name in family.per_image:
            if isinstance(part.get(name), Tensor):
                part[name] = part[name].expand(count, *part[name].shape[1:])
    first[0]["latents"] = torch.cat([shared["latents"] for shared, _, _ in pictures])
    return first


def _added(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    missing = object()
    return {name: v for name, v in after.items() if before.get(name, missing) is not v}


def _present(pipe: Any, names: Sequence[str]) -> list[str]:
    return [name for name in names if getattr(pipe, name, None) is not None]


@contextmanager
def _seeded(pipe: Any, seed: int) -> Iterator[None]:
    """Make what units draw at random depend on the seed."""
    cards = [pipe.device] if torch.device(pipe.device).type == "cuda" else []
    with torch.random.fork_rng(cards):
        torch.manual_seed(seed)
        yield


@contextmanager
def _onloaded(pipe: Any, names: Sequence[str]) -> Iterator[None]:
    """Parts of a managed pipeline on the device, and back where they wait after an error."""
    if names:
        pipe.load_models_to_device(list(names))
    try:
        yield
    except BaseException:
        pipe.load_models_to_device([])
        raise


@dataclass
class _Watcher:
    """Calls back, with previews small enough to cost little beside a step."""

    pipe: Any
    family: Family
    watch: Watch
    steps: int
    needs: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        # The decoder stays on the device while there are previews: it is small, and onloading it
        # each time would evict the denoiser.
        extra = () if self.watch.preview is None else (self.family.decoder,)
        self.needs = (*self.pipe.in_iteration_models, *extra)

    def tell(self, done: int) -> None:
        if self.watch.progress is not None:
            self.watch.progress(self.watch.done + done, self.watch.total or self.steps)

    def wants_preview(self, done: int) -> bool:
        return self.watch.preview is not None and done % max(self.watch.every, 1) == 0

    def show(
        self, done: int, timestep: Tensor, prediction: Tensor, shared: Mapping[str, Any]
    ) -> None:
        assert self.watch.preview is not None
        # The scheduler knows what the model predicts: a step to the end gives x0.
        clean = self.pipe.scheduler.step(
            prediction[:1], timestep, shared["latents"][:1], to_final=True
        )
        guess = self.family.unpack(clean, shared)
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
        watch: Progress and preview callbacks.
        batch: Pictures to draw at once. More than 1 is faster where a single picture does not
            keep the device busy, but rounding then differs by a grey level here and there.
        drawn: Given every picture as soon as its batch is decoded; what it raises ends the call.

    Returns:
        One output per seed, in their order; none where `drawn` was given them, so that any number
        of pictures takes the memory of a batch.
    """
    family: Family = base.family
    groups = list(chunks(seeds, batch if can_batch(family, plan.request.images) else 1))
    # A batch takes a step for all of its pictures at once.
    total = len(groups) * plan.request.steps
    waiting: list[_Group] = []
    outputs: list[Output] = []
    with acting as attachment:
        plan.clock.mark("attach")
        wait_for_adapters = ready_beside(
            family.model(base), base.torch_dtype, torch.device(base.device)
        )
        conditions = prepare(base, plan.request, plan.report.used_prompt, seeds[0])
        wait_for_adapters()
        layers = {entry.name: len(entry.layers) for entry in attachment.adapters}
        for number, group in enumerate(groups):
            here = dataclasses.replace(watch, done=number * plan.request.steps, total=total)
            with _recording(base, plan) as records:
                latents, seconds = denoise_latents(conditions, group, here)
            waiting.append(_Group(group, latents, seconds, records))
            # Where nobody waits for single pictures, all are decoded after the last step:
            # onloading the autoencoder evicts an offloaded denoiser.
            if drawn is not None or number == len(groups) - 1:
                for output in _decoded(base, plan, waiting, conditions, layers):
                    (drawn or outputs.append)(output)
                waiting.clear()
    return outputs


def _decoded(
    base: Any,
    plan: Plan,
    groups: Sequence[_Group],
    conditions: Conditions,
    layers: Mapping[str, int],
) -> Iterator[Output]:
    for group in groups:
        start = time.perf_counter()
        images = decode_latents(base, group.latents)
        timings = Timings(conditions.seconds, group.seconds, time.perf_counter() - start)
        conditions.seconds = 0.0  # the pictures after the first read nothing
        yield from _outputs(base, plan, group, images, timings, layers)


def _recording(base: Any, plan: Plan) -> AbstractContextManager[Any]:
    from autolora.fusion import record_gates

    return record_gates(base.family.model(base)) if plan.gated else nullcontext()


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
        if base.family.embeds_guidance(base):
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
