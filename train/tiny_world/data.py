"""Latents and text states for training on the tiny world."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from autolora.families.tiny.model import TinyEncoder
from autolora.minilm import MiniLM
from train.tiny_world.captions import caption
from train.tiny_world.render import random_view, render
from train.tiny_world.styles import Style
from train.tiny_world.subjects import Subject


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
            with torch.autocast("cpu", torch.bfloat16):
                s, p = minilm.token_states(unique[i : i + 256], length)
            states.append(s.bfloat16())
            pooled.append(p.bfloat16())
        rows = {text: i for i, text in enumerate(unique)}
        return TextTable(torch.cat(states), torch.cat(pooled), rows)


@dataclass
class Views:
    """Rendered views: latents [N, 16, h, w] in bf16 and their captions."""

    latents: Tensor
    captions: list[list[str]]


@torch.no_grad()
def encode_pictures(encoder: TinyEncoder, pictures: list[np.ndarray]) -> Tensor:
    """Encodes RGB arrays in [0, 1] to latents in bf16."""
    out = []
    for i in range(0, len(pictures), 32):
        batch = np.stack(pictures[i : i + 32]).transpose(0, 3, 1, 2)
        out.append(encoder(torch.from_numpy(np.ascontiguousarray(batch)).float() * 2 - 1))
    return torch.cat(out).bfloat16()


def render_views(
    encoder: TinyEncoder,
    subjects: list[Subject],
    count: int,
    rng: np.random.Generator,
    size: int,
    style: Style | None = None,
    captions_each: int = 3,
) -> Views:
    """Draws ``count`` views of every subject, encodes them and writes captions for them."""
    latents, captions = [], []
    for subject in subjects:
        pictures = []
        for _ in range(count):
            view = random_view(rng)
            picture, alpha = render(subject, view, size)
            if style is not None:
                picture = np.clip(style.apply(picture, alpha, rng), 0, 1)
            pictures.append(picture)
            captions.append(
                [caption(subject.name, view.colour, rng, style) for _ in range(captions_each)]
            )
        latents.append(encode_pictures(encoder, pictures))
    return Views(torch.cat(latents), captions)
