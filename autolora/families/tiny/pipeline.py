"""The embedded model as a DiffSynth pipeline: units, scheduler and model function of FLUX.1."""

from __future__ import annotations

from typing import Any

import torch
from diffsynth.pipelines.flux_image import FluxImagePipeline
from torch import Tensor

from autolora.config import PipelineConfig
from autolora.families.tiny import FAMILY
from autolora.families.tiny.model import TinyDecoder, TinyEncoder, TinyFluxDiT
from autolora.families.tiny.weights import SHIPPED, load_tiny
from autolora.minilm import MiniLM, PooledStandIn, TokenStandIn, shared_minilm
from autolora.runtime.hardware import resolve_compute
from autolora.runtime.storage import store_in_float8

_TEXT_INPUTS = ("prompt_emb", "pooled_prompt_emb")


class TinyFluxPipeline(FluxImagePipeline):
    """A ``FluxImagePipeline`` whose components are small.

    Guided steps run the prompted and the unprompted pass as one batch of two: the same result
    as DiffSynth's two passes up to rounding, at little more than the price of one.
    """

    def cfg_guided_model_fn(
        self,
        model_fn: Any,
        cfg_scale: float,
        inputs_shared: dict[str, Any],
        inputs_posi: dict[str, Any],
        inputs_nega: dict[str, Any],
        **inputs_others: Any,
    ) -> Tensor:
        """Velocity with classifier-free guidance, [1, 16, h, w]."""
        pairs = [(inputs_posi.get(name), inputs_nega.get(name)) for name in _TEXT_INPUTS]
        same = all(p is not None and n is not None and p.shape == n.shape for p, n in pairs)
        if cfg_scale == 1.0 or not same:
            return super().cfg_guided_model_fn(
                model_fn, cfg_scale, inputs_shared, inputs_posi, inputs_nega, **inputs_others
            )
        texts = {n: torch.cat((inputs_posi[n], inputs_nega[n])) for n in _TEXT_INPUTS}
        both = {**inputs_posi, **texts}
        shared = {**inputs_shared, "latents": inputs_shared["latents"].repeat(2, 1, 1, 1)}
        prompted, unprompted = model_fn(**both, **shared, **inputs_others).chunk(2)
        return unprompted + cfg_scale * (prompted - unprompted)


def assemble(
    dit: TinyFluxDiT,
    encoder: TinyEncoder,
    decoder: TinyDecoder,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    minilm: MiniLM | None = None,
) -> TinyFluxPipeline:
    """Puts the components into a pipeline; autoencoder and transformer are cast to ``dtype``."""
    minilm = minilm or shared_minilm()
    pipe = TinyFluxPipeline(device=device, torch_dtype=dtype)
    pipe.tokenizer_1 = pipe.tokenizer_2 = minilm.tokenizer
    pipe.text_encoder_1 = PooledStandIn(minilm)
    pipe.text_encoder_2 = TokenStandIn(minilm)
    pipe.dit, pipe.vae_encoder, pipe.vae_decoder = dit, encoder, decoder
    pipe.to(device=torch.device(device), dtype=dtype)
    # The text encoder is shared by the process and stays in float32: it runs once per prompt.
    minilm.float()
    pipe.eval().requires_grad_(False)
    pipe.family, pipe.notes, pipe.tiled = FAMILY, [], False
    return pipe


def text_length(pipe: TinyFluxPipeline, prompts: list[str]) -> int:
    """Tokens to pad to: the trained length, or more where a prompt would be cut."""
    longest: int = pipe.text_encoder_2.minilm.tokenize(prompts).shape[1]
    return max(pipe.dit.config.text_length, longest)


def load(config: PipelineConfig, device: torch.device) -> TinyFluxPipeline:
    """Load the tiny model from its one file.

    Raises:
        ConfigError: The file is missing or is not a tiny FLUX.
    """
    compute = resolve_compute(config, device)
    _, parts = load_tiny(config.weights or SHIPPED)
    pipe = assemble(parts["dit"], parts["encoder"], parts["decoder"], device, compute)
    _cast_text(pipe, compute)
    if config.storage == "float8":
        # After assembling, which casts every parameter to the type that is computed in.
        store_in_float8(pipe.dit, compute, device)
    return pipe


def _cast_text(pipe: TinyFluxPipeline, compute: torch.dtype) -> None:
    """Hand the transformer its text in the type it computes in; the text encoder has its own."""

    def cast(module: Any, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return tuple(cast(module, inputs, part) for part in output)
        return output.to(compute) if isinstance(output, torch.Tensor) else output

    for encoder in (pipe.text_encoder_1, pipe.text_encoder_2):
        encoder.register_forward_hook(cast)
