"""The layers of Z-Image: DiffSynth's ``ZImageDiT``, whose names are diffusers'.

``original`` is the published checkpoint, as ComfyUI names it: q, k and v are one module, and the
patch size is in no name.
"""

from __future__ import annotations

from collections.abc import Iterator

from autolora.families.layers import CANONICAL, LayerRow, LayerTable, Variant, layer
from autolora.families.telling import Telling


def _block(path: str, modulated: bool) -> Iterator[LayerRow]:
    here = f"{path}.{{i}}."
    attention, forward = f"{here}attention.", f"{here}feed_forward."
    for n, letter in enumerate("qkv"):
        yield layer(f"{attention}to_{letter}", "d", "d", original=f"{attention}qkv@{n}")
    yield layer(f"{attention}to_out.0", "d", "d", original=f"{attention}out")
    yield _same(f"{forward}w1", "ff", "d")
    yield _same(f"{forward}w2", "d", "ff")
    yield _same(f"{forward}w3", "ff", "d")
    if modulated:
        slices = "scale_msa:d gate_msa:d scale_mlp:d gate_mlp:d"
        yield _same(f"{here}adaLN_modulation.0", slices, "time")
    for letter in "qk":
        yield layer(f"{attention}norm_{letter}", "head", "", original=f"{attention}{letter}_norm")
    for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
        yield _same(here + name, "d", "")


def _same(name: str, out: str, inner: str) -> LayerRow:
    """A layer with one name for all."""
    return layer(name, out, inner, original=name)


def _outer() -> Iterator[LayerRow]:
    final = "all_final_layer.2-1"
    yield layer("all_x_embedder.2-1", "d", "patch", original="x_embedder")
    yield layer(f"{final}.linear", "patch_out", "d", original="final_layer.linear")
    modulation = "adaLN_modulation.1"
    yield layer(f"{final}.{modulation}", "d", "time", original=f"final_layer.{modulation}")
    yield _same("t_embedder.mlp.0", "hidden", "time")
    yield _same("t_embedder.mlp.2", "time", "hidden")
    yield _same("cap_embedder.1", "d", "text")
    yield _same("cap_embedder.0", "text", "")


LAYERS = LayerTable(
    (
        *_block("layers", True),
        *_block("noise_refiner", True),
        *_block("context_refiner", False),
        *_outer(),
    ),
    (CANONICAL, "original"),
    (
        Variant(
            "Z-Image",
            {
                "d": 3840,
                "ff": 10240,
                "text": 2560,
                "time": 256,
                "hidden": 1024,
                "patch": 64,
                "patch_out": 64,
                "head": 128,
            },
            {"layers": 30, "noise_refiner": 2, "context_refiner": 2},
        ),
    ),
)
"""Z-Image, Turbo and the models made from them."""

TELLING = Telling("Z-Image", (r"z[-_. ]?image",))
