"""The embedded model as a DiffSynth pipeline: units, scheduler and model function of FLUX.1."""

from __future__ import annotations

from typing import Any

import torch
from diffsynth.pipelines.flux_image import FluxImagePipeline
from torch import Tensor

from autolora.families.tiny.model import TinyDecoder, TinyEncoder, TinyFluxConfig, TinyFluxDiT
from autolora.minilm import MiniLM, PooledStandIn, TokenStandIn, shared_minilm

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
    return pipe


def text_length(minilm: MiniLM, prompts: list[str], config: TinyFluxConfig) -> int:
    """Tokens to pad to: the trained length, or more where a prompt would be cut."""
    longest = minilm.tokenize(prompts).shape[1]
    return max(config.text_length, longest)
