"""Which files are compared, and at what size."""

from __future__ import annotations

from dataclasses import dataclass

from tests.lora.truth import CASES, FLUX, Case, Size, TruthFile

NARROW = Size(width=64, double=2, single=2, channels=16, context=40, pooled=24, time=256)
"""Two blocks of each kind at width 64; the time embedding is diffusers' own."""

ALL_BLOCKS = Size(3072, 19, 38, 64, 4096, 768, 256)


@dataclass(frozen=True)
class Entry:
    """A file that every loader gets.

    Attributes:
        case: Format and variant.
        size: Widths.
        first_block: Compare layers of the first blocks only (the file still has all of them).
        without: Part of the names of layers that the file leaves out.
    """

    case: Case
    size: Size = NARROW
    first_block: bool = False
    without: str = ""

    def make(self) -> TruthFile:
        """Draw the file."""
        truth = self.case.make(self.size)
        for layer in truth.layers:
            if self.without and self.without in layer:
                truth.forget(layer)
        return truth

    @property
    def about(self) -> str:
        """Size and what is left out, as the table shows it."""
        words = [str(self.size.width)]
        words += ["all 57 blocks"] if self.first_block else []
        words += ["without linear1"] if self.without else []
        return ", ".join(words)


# diffusers splits linear1 of these by the sizes of FLUX.1, which are written into its code.
_TRUE_WIDTH = (
    "kohya/one alpha for all",
    "comfyui/down and up, alphas, text encoders",
)
# diffusers' converter takes every layer of all 57 blocks or fails.
_ALL_BLOCKS = ("fal/every layer of every block, and the last",)
_SPLIT_BY_TRUE_WIDTH = ("kohya/", "mixed/", "lora_unet_", "dora/kohya")
_LEFT_OUT = (
    "kohya/ranks up to 128",
    "kohya/float16",
    "kohya/alpha zero",
    "diffusers/only q, ranks differ",
    "diffusers/only k, ranks differ",
    "diffusers/only v, ranks differ",
    "diffusers/only q, k, ranks differ",
    "lokr/no prefix",
    "lokr/first side factored",
    "lokr/second side factored",
    "lokr/both sides factored",
    "lokr/second side with a core",
    "lokr/no alpha, bfloat16",
    "loha/lycoris_",
    "loha/diffusion_model.",
    "loha/no prefix",
    "loha/cores",
    "loha/no alpha, float16",
    "dora/PEFT lora_magnitude_vector.weight",
    "dora/kohya dora_scale by output",
    "dora/OneTrainer dora_scale by output",
    "dora/around LoHa, split names",
    "dora/in every other module",
    "full/normalization of queries and keys, diffusion_model. diff",
    "full/normalization of queries and keys, lora_unet_ w_norm",
    "full/normalization of queries and keys, transformer. diff",
    "full/bias of some layers only, in parts",
)
"""Variants that say no more than their neighbours in the table, or that no program writes."""


def entries() -> list[Entry]:
    """Every file of the comparison, in the order of the cases."""
    found: list[Entry] = []
    for name, case in CASES.items():
        if name in _LEFT_OUT:
            continue
        if name in _ALL_BLOCKS:
            found.append(Entry(case, ALL_BLOCKS, first_block=True))
        elif name in _TRUE_WIDTH:
            found.append(Entry(case, FLUX))
        elif any(part in name for part in _SPLIT_BY_TRUE_WIDTH):
            found.append(Entry(case, without="to_qkv_mlp"))
        else:
            found.append(Entry(case))
    return found
