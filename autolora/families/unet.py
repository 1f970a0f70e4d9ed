"""Layer rows of Stable Diffusion's UNets: DiffSynth's names are diffusers', kohya's are sgm's.

A UNet has numbered stages of different widths, so that every stage has rows of its own; only the
transformer blocks inside one repeat.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from autolora.families.layers import LayerRow, layer

_K3, _K1 = (3, 3), (1, 1)


@dataclass(frozen=True)
class Shape:
    """What tells one UNet from another.

    Attributes:
        attention: Whether each stage, from the widest picture to the smallest, has transformers.
        linear: Whether the transformers' input and output are linear layers, not convolutions.
        conditioned: Whether it takes sizes as an input.
    """

    attention: tuple[bool, ...]
    linear: bool = True
    conditioned: bool = False


def unet_rows(shape: Shape) -> Iterator[LayerRow]:
    """Every layer of a UNet with two resnets per stage; stage ``n`` has the width ``c{n}``."""
    last = len(shape.attention) - 1
    yield layer("conv_in", "c0", "latent", _K3, original="input_blocks.0.0")
    for there, here in (("time_embed", "time_embedding"), ("label_emb.0", "add_embedding")):
        if there == "time_embed" or shape.conditioned:
            inner = "c0" if there == "time_embed" else "sizes"
            yield layer(f"{here}.linear_1", "emb", inner, original=f"{there}.0")
            yield layer(f"{here}.linear_2", "emb", "emb", original=f"{there}.2")
    for stage, attends in enumerate(shape.attention):
        yield from _down(shape, stage, attends, stage == last)
    yield from _resnet("mid_block.resnets.0", "middle_block.0", f"c{last}", f"c{last}")
    yield from _transformer(shape, "mid_block.attentions.0", "middle_block.1", f"c{last}")
    yield from _resnet("mid_block.resnets.1", "middle_block.2", f"c{last}", f"c{last}")
    skips = _skips(last)
    for up, stage in enumerate(range(last, -1, -1)):
        yield from _up(shape, up, stage, skips)
    yield layer("conv_out", "latent_out", "c0", _K3, original="out.2")


def _skips(last: int) -> list[str]:
    """Widths of what the way down keeps for the way up, in order."""
    kept = ["c0"]
    for stage in range(last + 1):
        kept += [f"c{stage}", f"c{stage}"] + ([f"c{stage}"] if stage < last else [])
    return kept


def _down(shape: Shape, stage: int, attends: bool, is_last: bool) -> Iterator[LayerRow]:
    width = f"c{stage}"
    for n in range(2):
        inner = f"c{max(stage - 1, 0)}" if n == 0 else width
        here, there = f"down_blocks.{stage}", f"input_blocks.{3 * stage + n + 1}"
        yield from _resnet(f"{here}.resnets.{n}", f"{there}.0", width, inner)
        if attends:
            yield from _transformer(shape, f"{here}.attentions.{n}", f"{there}.1", width)
    if not is_last:
        name, original = f"down_blocks.{stage}.downsamplers.0.conv", f"{3 * stage + 3}.0.op"
        yield layer(name, width, width, _K3, original=f"input_blocks.{original}")


def _up(shape: Shape, up: int, stage: int, skips: list[str]) -> Iterator[LayerRow]:
    width, last = f"c{stage}", len(shape.attention) - 1
    attends = shape.attention[stage]
    for n in range(3):
        inner = (f"c{min(stage + 1, last)}" if n == 0 else width) + "+" + skips.pop()
        here, there = f"up_blocks.{up}", f"output_blocks.{3 * up + n}"
        yield from _resnet(f"{here}.resnets.{n}", f"{there}.0", width, inner)
        if attends:
            yield from _transformer(shape, f"{here}.attentions.{n}", f"{there}.1", width)
    if stage > 0:
        original = f"output_blocks.{3 * up + 2}.{2 if attends else 1}.conv"
        name = f"up_blocks.{up}.upsamplers.0.conv"
        yield layer(name, width, width, _K3, original=original)


def _resnet(here: str, there: str, width: str, inner: str) -> Iterator[LayerRow]:
    rows: Sequence[tuple[str, str, str, tuple[int, ...]]] = (
        ("conv1", "in_layers.2", inner, _K3),
        ("time_emb_proj", "emb_layers.1", "emb", ()),
        ("conv2", "out_layers.3", width, _K3),
    )
    for name, original, inputs, kernel in rows:
        yield layer(f"{here}.{name}", width, inputs, kernel, original=f"{there}.{original}")
    if inner != width:
        original = f"{there}.skip_connection"
        yield layer(f"{here}.conv_shortcut", width, inner, _K1, original=original)


def _transformer(shape: Shape, here: str, there: str, width: str) -> Iterator[LayerRow]:
    def row(name: str, out: str, inner: str, kernel: tuple[int, ...] = ()) -> LayerRow:
        return layer(f"{here}.{name}", out, inner, kernel, original=f"{there}.{name}")

    ends = () if shape.linear else _K1
    yield row("proj_in", width, width, ends)
    block = "transformer_blocks.{i}."
    for attention, inner in (("attn1", width), ("attn2", "cross")):
        yield row(f"{block}{attention}.to_q", width, width)
        yield row(f"{block}{attention}.to_k", width, inner)
        yield row(f"{block}{attention}.to_v", width, inner)
        yield row(f"{block}{attention}.to_out.0", width, width)
    yield row(f"{block}ff.net.0.proj", f"8{width}", width)
    yield row(f"{block}ff.net.2", width, f"4{width}")
    yield row("proj_out", width, width, ends)
