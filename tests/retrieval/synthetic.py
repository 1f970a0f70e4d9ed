"""A synthetic world for retrieval: concepts are random vectors, LoRAs linear functions of them."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from autolora.lora import LoRA, save_lora

LAYERS = {  # (out, in)
    "blocks.0.attn.a_to_qkv": (72, 24),
    "blocks.0.attn.b_to_qkv": (72, 24),
    "blocks.0.attn.b_to_out": (24, 24),
    "single_blocks.0.proj_out": (24, 120),
}


class WordVectors:
    """Text encoder whose words are fixed random directions, so that meaning is shared words."""

    name = "word-vectors"
    dim = 24

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def word(self, word: str) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big")
        return np.random.RandomState(seed).randn(self.dim)

    def encode(self, texts: list[str]) -> Tensor:
        self.calls.append(list(texts))
        weight = {"a": 0.05, "on": 0.05, "background": 0.2, "picture": 0.2, "of": 0.05}
        rows = [
            sum(weight.get(w, 1.0) * self.word(w) for w in (text.lower().split() or [""]))
            for text in texts
        ]
        matrix = torch.tensor(np.array(rows).reshape(-1, self.dim), dtype=torch.float32)
        return torch.nn.functional.normalize(matrix, dim=-1)


def concept_names(count: int) -> list[str]:
    rng = np.random.RandomState(7)
    letters = "bdfgklmnprstvz"
    names: list[str] = []
    while len(names) < count:
        name = "".join(rng.choice(list(letters)) + rng.choice(list("aeiou")) for _ in range(3))
        if name not in names:
            names.append(name)
    return names


def _fixed(layer: str, vector_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """How a layer reads and writes concepts, and what all its inputs have in common."""
    out, in_features = LAYERS[layer]
    g = torch.Generator().manual_seed(len(layer))
    reads = torch.randn(in_features, vector_size, generator=g) / vector_size**0.5
    writes = torch.randn(out, vector_size, generator=g) / vector_size**0.5
    return reads, writes, torch.randn(in_features, generator=g) * 0.3


def read_activations(layer: str, vectors: Tensor) -> Tensor:
    """Inputs of a layer for texts with these vectors."""
    reads, _, common = _fixed(layer, vectors.shape[1])
    return vectors @ reads.T + common


def concept_lora(name: str, vector: Tensor, rank: int = 3, noise: float = 0.1) -> LoRA:
    """A LoRA that reads the concept's direction and writes a linear image of it."""
    g = torch.Generator().manual_seed(int(vector.abs().sum() * 1e4) % 2**31)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for layer, (out, in_features) in LAYERS.items():
        reads, writes, common = _fixed(layer, len(vector))
        A = torch.randn(rank, in_features, generator=g) * noise
        B = torch.randn(out, rank, generator=g) * noise
        A[0] += reads @ vector + common
        B[:, 0] += writes @ vector
        factors[layer] = (A, B)
    return LoRA.from_factors(name, factors)


def factors_of(lora: LoRA) -> dict[str, tuple[Tensor, Tensor]]:
    return {layer: lora.factors(layer) for layer in lora.layers}


def write_pool(folder: Path, names: list[str], captions: bool = True) -> Path:
    """One LoRA file per concept, with captions in three lengths on two covers."""
    encoder = WordVectors()
    colours = ("red", "blue", "green")
    for i, name in enumerate(names):
        vector = encoder.encode([name])[0]
        save_lora(folder / f"{name}.safetensors", factors_of(concept_lora(name, vector)))
        if captions:
            covers = {
                f"{name}.cover-{j}.png": [
                    f"a picture of a {name} on a {colours[(i + j) % 3]} background",
                    f"a {name} on a {colours[(i + j + 1) % 3]} background",
                    name,
                ]
                for j in range(2)
            }
            (folder / f"{name}.captions.json").write_text(json.dumps(covers))
    return folder


def write_portraits(path: Path, names: list[str]) -> Path:
    """Portraits that show a linear image of the concept under much noise."""
    encoder = WordVectors()
    settings, noises, channels, side = 2, 4, 2, 8
    g = torch.Generator().manual_seed(3)
    image = torch.randn(encoder.dim, settings * channels * side * side, generator=g)
    tensors = {}
    for name in names:
        clean = (encoder.encode([name])[0] @ image).view(settings, 1, channels, side, side)
        noisy = clean + torch.randn(settings, noises, channels, side, side, generator=g) * 0.5
        tensors[name] = noisy.contiguous()
    save_file(tensors, path, metadata={"sigmas": "[1.0, 0.7]"})
    return path
