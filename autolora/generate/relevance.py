"""How much a prompt asks for an adapter, by the adapter's own response to the prompt's words.

A LoRA is trained with captions, so that a delta that reads the text stream answers loudly to the
words of its captions (`autolora.retrieval.encoders`). With ``x_t`` the input of the first text-side
attention layer at token ``t`` of a prompt ``p`` and ``BA`` the adapter's delta there::

    r_t = |B A M x_t|                   for the prompt's words, without padding and special tokens
    z_t = (r_t - mean_q r(q)) / std_q r(q)          with r(q) = max_t r_t, over neutral prompts q

and the relevance is the largest ``z_t``. ``M`` half-whitens by the covariance of the neutral
prompts' words, ``M = (C + ridge I)^(-1/4)``, as the response encoder does: without it, directions
in which all words are large drown the others.

That the norm of a LoRA's output in one forward pass ranks relevance is the idea of LoGo (arXiv
2511.07129) for language models. The layer's inputs depend on the prompt alone, not on the picture,
and are there before the first attention is computed: a prompt costs its text encoding.

Shape legend: T tokens, r rank, ``in`` channels.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from autolora.config import PipelineConfig
from autolora.errors import AutoLoRAError, FusionError, GenerationError
from autolora.files import replacing
from autolora.prompt_syntax import has_phrase

if TYPE_CHECKING:
    from autolora.fusion import Adapter, Strategy
    from autolora.generate.active_adapters import Chosen
    from autolora.lora import LoRA

_NEUTRAL = Path(__file__).parent / "neutral_prompts.txt"
_BATCH = 16
_LATENTS = (16, 16, 16)
_TIMESTEP = 1000.0
_GUIDANCE = 3.5
_SMALLEST = 1e-12
_RANK = 32
SURE_SEARCH = 0.9
"""Probability from which the search's word is taken, whatever the adapter answers."""
_RIDGE = 0.1
"""Of the words' mean variance."""


def neutral_prompts() -> tuple[str, ...]:
    """Return the sentences that adapters are compared on: they ask for nothing in particular."""
    return tuple(_NEUTRAL.read_text(encoding="utf-8").split("\n")[:-1])


@dataclass(frozen=True)
class Whitening:
    """``(C + ridge I)^(-1/4)`` by the principal directions of fewer samples than channels.

    Attributes:
        directions: Orthonormal columns ``[in, k]``.
        scales: What becomes of each, ``[k]``, float64.
        rest: What becomes of everything else.
    """

    directions: Tensor
    scales: Tensor
    rest: float

    @classmethod
    def fit(cls, samples: Tensor) -> Whitening:
        """Fit to ``[T, in]``."""
        x = samples.double() - samples.double().mean(0)
        _, values, directions = torch.linalg.svd(x, full_matrices=False)
        variances = values**2 / len(x)
        ridge = float(_RIDGE * variances.sum() / x.shape[1]) or 1.0
        return cls(directions.T, (variances + ridge) ** -0.25, ridge**-0.25)

    def __call__(self, x: Tensor) -> Tensor:
        """Whiten ``[T, in]``, float64."""
        x = x.double()
        along = x @ self.directions
        return self.rest * x + (along * (self.scales - self.rest)) @ self.directions.T


class Relevance:
    """Relevance of adapters in one base model; what does not depend on the prompt is kept.

    Args:
        pipe: The DiffSynth pipeline; what is attached to it neither matters nor changes.
        layer: Canonical name of its text-side layer.
        neutral: Neutral prompts; None is the shipped list.
        file: Where their words' states are kept from one process to the next; None keeps nothing.

    Raises:
        GenerationError: There are fewer than two neutral prompts, or one is empty.
    """

    def __init__(
        self,
        pipe: Any,
        layer: str,
        neutral: Sequence[str] | None = None,
        file: Path | None = None,
    ) -> None:
        self.pipe, self.layer, self.file = pipe, layer, file
        self.prompts = tuple(neutral_prompts() if neutral is None else neutral)
        if len(self.prompts) < 2 or not all(prompt.strip() for prompt in self.prompts):
            raise GenerationError(
                "Relevance needs at least two neutral prompts, and none may be empty."
            )
        self._usual: WeakKeyDictionary[LoRA, tuple[float, float]] = WeakKeyDictionary()
        self._asked: tuple[str, Tensor] | None = None

    def of(self, lora: LoRA, prompt: str) -> tuple[float, ...] | None:
        """Return the standard scores of one adapter at a prompt's words.

        Args:
            lora: The adapter; its strength does not matter.
            prompt: As a person typed it, without tags and without trigger words added.

        Returns:
            One per token; None where the adapter changes nothing that reads text, or the prompt
            has no words, so that nothing can be said.
        """
        read = _read_factor(lora, self.layer)
        if read is None or not prompt.strip():
            return None
        words = self._tokens(prompt)
        if lora not in self._usual:
            values = torch.stack([_responses(read, x).max() for x in self._neutral])
            self._usual[lora] = float(values.mean()), float(values.std())
        mean, spread = self._usual[lora]
        if not len(words) or spread <= _SMALLEST * max(mean, _SMALLEST):
            return None
        return tuple(((_responses(read, words) - mean) / spread).tolist())

    def _tokens(self, prompt: str) -> Tensor:
        """Whitened inputs ``[T, in]`` at a prompt's words; the last prompt's are kept."""
        if self._asked is None or self._asked[0] != prompt:
            states = word_inputs(self.pipe, self.layer, [prompt])[0]
            self._asked = prompt, self._whitening(states)
        return self._asked[1]

    @cached_property
    def _states(self) -> list[Tensor]:
        kept = _read_states(self.file, len(self.prompts))
        if kept is None:
            kept = word_inputs(self.pipe, self.layer, self.prompts)
            _write_states(self.file, kept)
        return [states for states in kept if len(states)]

    @cached_property
    def _whitening(self) -> Whitening:
        return Whitening.fit(torch.cat(self._states))

    @cached_property
    def _neutral(self) -> list[Tensor]:
        return [self._whitening(states) for states in self._states]


def relevance_of(pipe: Any, config: PipelineConfig) -> Relevance | None:
    """Make the relevance for a base model; None where its family names no text-side layer."""
    layer = pipe.family.text_layer
    if not layer:
        return None
    from autolora.generate.reproduce import identify_base

    base = identify_base(config)
    known = repr((layer, base.storage, base.compute, sorted(base.files.items()), neutral_prompts()))
    name = f"neutral-{hashlib.sha256(known.encode()).hexdigest()[:16]}.safetensors"
    return Relevance(pipe, layer, file=config.index / name)


def judge(
    relevance: Relevance | None, strategy: Strategy, prompt: str, chosen: Sequence[Chosen]
) -> list[Chosen]:
    """Let a strategy silence adapters that a prompt does not ask for.

    Args:
        relevance: Of the base model; None keeps all.
        strategy: What decides.
        prompt: As typed, without tags.
        chosen: What would take part. All are looked at; only optional ones are silenced, and none
            that is subtracted: a prompt need not name what is to be taken away.

    Returns:
        The same with what was decided.
    """
    from autolora.fusion import Response

    if relevance is None:
        return list(chosen)
    responses: dict[str, Response | None] = {}
    for entry in chosen:
        words = relevance.of(entry.lora, prompt)
        # The search also knows other names of a thing, which a small delta need not answer to.
        named = is_named(entry.lora, prompt) or (entry.score or 0.0) >= SURE_SEARCH
        responses[entry.lora.name] = None if words is None else Response(words, named)
    kept = strategy.choose(responses)
    judged = []
    for entry in chosen:
        response = responses[entry.lora.name]
        quiet = entry.optional and entry.strength > 0 and not kept[entry.lora.name]
        value = None if response is None else response.value
        judged.append(replace(entry, relevance=value, quiet=quiet))
    return judged


def is_named(lora: LoRA, prompt: str) -> bool:
    """Tell whether a prompt has an adapter's name, title or one of its trigger words."""
    data = lora.metadata
    phrases = (re.sub(r"[-_]+", " ", lora.name), data.title, *data.trigger_words)
    return any(phrase.strip() and has_phrase(prompt, phrase) for phrase in phrases)


def own_prompt(lora: LoRA) -> str:
    """Return a text that an adapter was surely made for: its trigger words, or its title."""
    return ", ".join(lora.metadata.trigger_words[:3]) or lora.metadata.title or lora.name


def calibrate(
    pipe: Any,
    strategy: Strategy,
    pairs: Sequence[tuple[Adapter, float]],
    loras: Mapping[str, LoRA],
) -> None:
    """Give a strategy its passes: one per adapter, from pure noise, under a text of its own.

    Raises:
        FusionError: It is not known how this family's model is called for that.
    """
    from autolora.fusion import attached

    if not pipe.family.text_layer:
        raise FusionError(
            f"the strategy {strategy.name} can't be used with {pipe.family.title} yet"
        )
    model = pipe.family.model(pipe)

    def run(adapter: Adapter) -> None:
        with attached(model, [(adapter, 1.0)], "sum"):
            first_pass(pipe, [own_prompt(loras[adapter.name])])

    with attached(model, []):
        strategy.prepare(model, pairs, run)


def _read_factor(lora: LoRA, layer: str) -> Tensor | None:
    """Return ``F [r, in]`` with ``|F x| = c |B A x|`` for all x; None where there is no delta."""
    if layer not in lora:
        return None
    try:
        A, B = lora.leading_factors(layer, _RANK)
    except AutoLoRAError:  # such as DoRA, whose delta depends on the base weight
        return None
    factor = torch.linalg.qr(B.double(), mode="r").R @ A.double()
    norm = factor.norm()
    return factor / norm if norm > _SMALLEST else None


def _responses(read: Tensor, tokens: Tensor) -> Tensor:
    return (tokens @ read.T).norm(dim=1)


def _read_states(file: Path | None, count: int) -> list[Tensor] | None:
    """Cached states; None if they cannot be used."""
    from safetensors.torch import load_file

    if file is None or not file.is_file():
        return None
    try:
        tensors = load_file(str(file))
        states, lengths = tensors["states"].float(), tensors["lengths"].tolist()
    except (OSError, ValueError, KeyError, SafetensorError):
        return None
    usable = len(lengths) == count and sum(lengths) == len(states)
    return list(states.split(lengths)) if usable else None


def _write_states(file: Path | None, states: Sequence[Tensor]) -> None:
    """Keep states for the next process; that nothing can be written costs time only."""
    from safetensors.torch import save_file

    if file is None:
        return
    tensors = {"states": torch.cat(list(states)), "lengths": torch.tensor([*map(len, states)])}
    with suppress(OSError, SafetensorError), replacing(file) as part:
        save_file(tensors, str(part))


class _Reached(Exception):
    """The layer has been given its input; nothing behind it needs to be computed."""


@torch.no_grad()
def word_inputs(pipe: Any, layer: str, prompts: Sequence[str]) -> list[Tensor]:
    """Inputs of a text-side layer at the words of prompts, in the bare model.

    Args:
        pipe: What `autolora.families.load.load_pipeline` gave, of a family with ``text_layer``.
        layer: Canonical name of the layer.
        prompts: The prompts; where padding changes a token's state, all are padded alike.

    Returns:
        One ``[T, in]`` per prompt, float32 on the CPU, without padding and special tokens.
    """
    from autolora.fusion import attached

    model = pipe.family.model(pipe)
    found: list[Tensor] = []
    seen: list[Tensor] = []

    def stop(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].detach().float().cpu())
        raise _Reached

    with attached(model, []):
        handle = model.get_submodule(layer).register_forward_pre_hook(stop)
        try:
            for start in range(0, len(prompts), _BATCH):
                with suppress(_Reached):
                    first_pass(pipe, prompts[start : start + _BATCH])
                found += seen.pop()
        finally:
            handle.remove()
            pipe.load_models_to_device([])
    return [states[_words(pipe, p, len(states))] for states, p in zip(found, prompts, strict=True)]


def _words(pipe: Any, prompt: str, length: int) -> list[int]:
    """Positions of a prompt's tokens that are not special."""
    marked = pipe.tokenizer_2(prompt, return_special_tokens_mask=True)["special_tokens_mask"]
    return [position for position, special in enumerate(marked[:length]) if not special]


@torch.no_grad()
def first_pass(pipe: Any, prompts: Sequence[str]) -> None:
    """Let the model make its first step on a small picture under some prompts."""
    from diffsynth.pipelines.flux_image import FluxImageUnit_PromptEmbedder

    unit, texts = FluxImageUnit_PromptEmbedder(), list(prompts)
    pipe.load_models_to_device(unit.onload_model_names)
    text = unit.process(pipe, prompt=texts, **pipe.family.inputs(pipe, texts), positive=True)
    pipe.load_models_to_device([pipe.family.denoiser])
    place, count = {"device": pipe.device, "dtype": pipe.torch_dtype}, len(texts)
    noise = torch.randn((1, *_LATENTS), generator=torch.Generator().manual_seed(0))
    pipe.model_fn(
        pipe.family.model(pipe),
        latents=noise.expand(count, -1, -1, -1).to(**place),
        timestep=torch.full((count,), _TIMESTEP, **place),
        guidance=torch.full((count,), _GUIDANCE, **place),
        **text,
    )
