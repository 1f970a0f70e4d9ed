"""Activations of texts in the base model's text-side layers.

Shape legend: T texts, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autolora.config import load_config
from autolora.errors import ConfigError
from autolora.families.load import load_pipeline

_NOISE_SEED = 0


def text_activations(
    base_model: str, texts: Sequence[str], layers: Sequence[str], batch: int = 64
) -> dict[str, Tensor]:
    """Inputs of layers that read the text stream, averaged over each text's tokens.

    One forward pass per batch of texts, from pure noise, which is the same for all.

    Args:
        base_model: Name or path of the base model's configuration.
        texts: T texts.
        layers: Layers of the text stream.
        batch: Texts per pass.

    Returns:
        ``[T, in]`` by layer, float32.

    Raises:
        ConfigError: The model has no such layer, or it does not read the text stream.
    """
    pipe = load_pipeline(load_config(base_model))
    taken: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    with torch.no_grad():
        for start in range(0, len(texts), batch):
            part = list(texts[start : start + batch])
            for layer, mean in _one_batch(pipe, part, layers).items():
                taken[layer].append(mean)
    return {layer: torch.cat(parts) for layer, parts in taken.items()}


def _one_batch(pipe: Any, texts: list[str], layers: Sequence[str]) -> dict[str, Tensor]:
    inputs = _encode(pipe, texts)
    states = inputs["prompt_emb"]
    # Positions beyond a text are zero, or repeat what the encoder gives for padding.
    mask = (states.abs().sum(-1) > 0).float().cpu()
    seen: dict[str, Tensor] = {}
    handles = [
        _find(pipe.dit, layer).register_forward_pre_hook(partial(_keep, seen, layer))
        for layer in layers
    ]
    try:
        side = 2 * pipe.dit.config.size // 16 if hasattr(pipe.dit, "config") else 32
        shape = (1, 16, side, side)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(_NOISE_SEED))
        noise = noise.expand(len(texts), -1, -1, -1).to(states)
        guidance = torch.full((len(texts),), 3.5).to(states)
        timestep = torch.full((len(texts),), 1000.0).to(states)
        pipe.model_fn(pipe.dit, latents=noise, timestep=timestep, guidance=guidance, **inputs)
    finally:
        for handle in handles:
            handle.remove()
    means: dict[str, Tensor] = {}
    for layer in layers:
        x = seen[layer].float().cpu()
        if x.ndim != 3 or x.shape[1] != mask.shape[1]:
            raise ConfigError(f"Layer {layer} does not read the text stream alone.")
        means[layer] = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
    return means


def _encode(pipe: Any, texts: list[str]) -> dict[str, Tensor]:
    """Token states, pooled text and position ids of texts, as DiffSynth encodes them."""
    from diffsynth.pipelines.flux_image import FluxImageUnit_PromptEmbedder

    unit = FluxImageUnit_PromptEmbedder()
    length = pipe.family.inputs(pipe, texts)["t5_sequence_length"]
    rows = [
        unit.process(pipe, prompt=text, t5_sequence_length=length, positive=True) for text in texts
    ]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def _find(dit: nn.Module, layer: str) -> nn.Module:
    try:
        return dit.get_submodule(layer)
    except AttributeError as error:
        raise ConfigError(f"The base model has no layer {layer}; see response_layers.") from error


def _keep(seen: dict[str, Tensor], layer: str, module: nn.Module, inputs: tuple[Tensor]) -> None:
    seen[layer] = inputs[0].detach()
