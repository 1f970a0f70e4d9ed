"""Latents and text states for training on the tiny world."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from autolora.families.tiny.model import TinyEncoder
from autolora.minilm import MiniLM
from train.tiny_world.compositions import Composition, describe, paint, paint_styled
from train.tiny_world.styles import Style


@dataclass
class TextTable:
    """Text states of unique captions: states [n, L, D] and pooled [n, D], in bf16."""

    states: Tensor
    pooled: Tensor
    row: dict[str, int]

    @staticmethod
    @torch.no_grad()
    def build(captions: list[str], minilm: MiniLM, length: int) -> TextTable:
        """Encodes every distinct caption once; the empty caption is always row 0."""
        unique = ["", *sorted(set(captions) - {""})]
        states, pooled = [], []
        for i in range(0, len(unique), 256):
            device = next(minilm.parameters()).device
            with torch.autocast(device.type, torch.bfloat16):
                s, p = minilm.token_states(unique[i : i + 256], length)
            states.append(s.bfloat16().cpu())
            pooled.append(p.bfloat16().cpu())
        rows = {text: i for i, text in enumerate(unique)}
        return TextTable(torch.cat(states), torch.cat(pooled), rows)


@dataclass
class Views:
    """Rendered views: latents [N, 16, h, w] in bf16 and their captions."""

    latents: Tensor
    captions: list[list[str]]


@torch.no_grad()
def encode_pictures(encoder: TinyEncoder, pictures: list[np.ndarray]) -> Tensor:
    """Encodes RGB arrays in [0, 1] to latents in bf16, on the CPU."""
    out = []
    device = encoder.mean.device
    for i in range(0, len(pictures), 32):
        batch = np.stack(pictures[i : i + 32]).transpose(0, 3, 1, 2)
        x = torch.from_numpy(np.ascontiguousarray(batch)).to(device).float() * 2 - 1
        out.append(encoder(x).bfloat16().cpu())
    return torch.cat(out)


def draw_views(
    encoder: TinyEncoder,
    compositions: Sequence[Composition],
    rng: np.random.Generator,
    size: int,
    style: Style | None = None,
    captions_each: int = 3,
) -> Views:
    """Paints compositions, encodes them and writes captions for them."""
    pictures = [
        paint(what, size, rng)[0] if style is None else paint_styled(what, style, size, rng)
        for what in compositions
    ]
    captions = [[describe(what, rng, style) for _ in range(captions_each)] for what in compositions]
    return Views(encode_pictures(encoder, pictures), captions)
