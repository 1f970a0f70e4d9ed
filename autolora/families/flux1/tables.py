"""The canonical layers of a FLUX.1 transformer: names, kinds and how their outputs are divided.

Canonical names are the module paths of DiffSynth's ``FluxDiT``. Stream ``a`` is the image, ``b``
the text. The table holds only ratios, in units of the model width ``d``, so that it is true of any
width and any number of blocks: FLUX.1 has ``d`` = 3072 with 19 double and 38 single blocks, the
tiny model far less. Nothing here needs torch.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal, Protocol

Kind = Literal["double", "single", "outer"]
Stream = Literal["a", "b"]


@dataclass(frozen=True)
class LayerType:
    """One kind of linear layer, such as the image-side q/k/v projection of a double block.

    Attributes:
        template: Canonical name with ``{i}`` for the block index.
        kind: Double block, single block, or outside the blocks.
        stream: ``a`` (image) or ``b`` (text) in a double block, else None.
        slices: Parts of the output in row order, each with its size in units of ``d``.
        in_ratio: Input size in units of ``d``; None where it does not follow from the width.
    """

    template: str
    kind: Kind
    stream: Stream | None
    slices: tuple[tuple[str, int], ...]
    in_ratio: int | None

    @property
    def part(self) -> str:
        """The name inside its block, such as ``attn.a_to_qkv``; the whole name outside blocks."""
        return self.template.partition("{i}.")[2] or self.template

    @property
    def out_ratio(self) -> int:
        """Output size in units of ``d`` (of the smallest slice for layers outside the blocks)."""
        return sum(ratio for _, ratio in self.slices)


@dataclass(frozen=True)
class LayerName:
    """A canonical layer name taken apart.

    Attributes:
        name: The full canonical name.
        type: What kind of layer it is.
        block: Index of the block, None outside the blocks.
    """

    name: str
    type: LayerType
    block: int | None

    @property
    def kind(self) -> Kind:
        """Double block, single block, or outside the blocks."""
        return self.type.kind

    @property
    def stream(self) -> Stream | None:
        """``a`` (image) or ``b`` (text) in a double block, else None."""
        return self.type.stream


class DiT(Protocol):
    """What is asked of a module to list its layers: torch's ``named_modules``."""

    def named_modules(self) -> Iterable[tuple[str, Any]]:
        """Yield every submodule with its dotted path."""
        ...


_QKV = (("q", 1), ("k", 1), ("v", 1))
_WHOLE = (("out", 1),)
_MODULATION = (("shift", 1), ("scale", 1), ("gate", 1))
_MODULATION_2 = tuple((f"{name}_{of}", 1) for of in ("msa", "mlp") for name, _ in _MODULATION)


def _double(stream: Stream) -> Iterator[LayerType]:
    rows: tuple[tuple[str, tuple[tuple[str, int], ...], int], ...] = (
        (f"attn.{stream}_to_qkv", _QKV, 1),
        (f"attn.{stream}_to_out", _WHOLE, 1),
        (f"ff_{stream}.0", (("out", 4),), 1),
        (f"ff_{stream}.2", _WHOLE, 4),
        (f"norm1_{stream}.linear", _MODULATION_2, 1),
    )
    for part, slices, in_ratio in rows:
        yield LayerType("blocks.{i}." + part, "double", stream, slices, in_ratio)


def _single() -> Iterator[LayerType]:
    rows: tuple[tuple[str, tuple[tuple[str, int], ...], int], ...] = (
        ("to_qkv_mlp", (*_QKV, ("mlp", 4)), 1),
        ("proj_out", _WHOLE, 5),
        ("norm.linear", _MODULATION, 1),
    )
    for part, slices, in_ratio in rows:
        yield LayerType("single_blocks.{i}." + part, "single", None, slices, in_ratio)


def _outer() -> Iterator[LayerType]:
    for name in (
        "x_embedder",
        "context_embedder",
        "time_embedder.timestep_embedder.0",
        "time_embedder.timestep_embedder.2",
        "guidance_embedder.timestep_embedder.0",
        "guidance_embedder.timestep_embedder.2",
        "pooled_text_embedder.0",
        "pooled_text_embedder.2",
        "final_proj_out",
    ):
        yield LayerType(name, "outer", None, _WHOLE, None)
    yield LayerType("final_norm_out.linear", "outer", None, _MODULATION[:2], 1)


LAYER_TYPES: Mapping[str, LayerType] = MappingProxyType(
    {row.template: row for row in (*_double("a"), *_double("b"), *_single(), *_outer())}
)
"""Every kind of canonical linear layer by template, in the order of the forward pass by group."""

_BLOCK_INDEX = re.compile(r"(?<=blocks\.)(0|[1-9]\d{0,5})(?=\.)", re.ASCII)


@lru_cache(maxsize=4096)
def parse_layer(name: str) -> LayerName | None:
    """Take a canonical layer name apart.

    Args:
        name: A module path such as ``single_blocks.3.to_qkv_mlp``.

    Returns:
        Its parts, or None when the name is not canonical.
    """
    found = _BLOCK_INDEX.search(name)
    template = name if found is None else f"{name[: found.start()]}{{i}}{name[found.end() :]}"
    layer_type = LAYER_TYPES.get(template)
    if layer_type is None or (found is None) != (layer_type.kind == "outer"):
        return None
    return LayerName(name, layer_type, int(found.group()) if found else None)


_TYPE_ORDER = {template: position for position, template in enumerate(LAYER_TYPES)}
_KIND_ORDER: Mapping[Kind, int] = {"double": 0, "single": 1, "outer": 2}


def layer_sort_key(name: str) -> tuple[int, int, int, str]:
    """Key that sorts layers by kind, block number and place in the block.

    Args:
        name: A layer name; names that are not canonical sort last, by spelling.

    Returns:
        A key for ``sorted``.
    """
    layer = parse_layer(name)
    if layer is None:
        return (len(_KIND_ORDER), 0, 0, name)
    return (_KIND_ORDER[layer.kind], layer.block or 0, _TYPE_ORDER[layer.type.template], name)


def output_slices(layer_type: LayerType, out_features: int) -> dict[str, slice]:
    """Rows of a layer's output that belong to each of its slices.

    Args:
        layer_type: The kind of layer.
        out_features: Its number of output channels.

    Returns:
        Row ranges by slice name, in row order.

    Raises:
        ValueError: The channels cannot be divided in this kind's ratios.
    """
    unit, rest = divmod(out_features, layer_type.out_ratio)
    if rest or unit == 0:
        raise ValueError(
            f"{out_features} output channels of {layer_type.part} cannot be divided into "
            f"{layer_type.out_ratio} equal parts"
        )
    rows: dict[str, slice] = {}
    start = 0
    for name, ratio in layer_type.slices:
        rows[name] = slice(start, start + ratio * unit)
        start += ratio * unit
    return rows


def fused_out_features(layer_type: LayerType, slices: Sequence[str], rows: int) -> int:
    """Output channels of a whole layer, from the size of some of its slices.

    Args:
        layer_type: The kind of layer.
        slices: Names of the slices that are at hand.
        rows: How many output channels they have together.

    Returns:
        Number of output channels of the whole layer.

    Raises:
        ValueError: The rows cannot be divided in these slices' ratios.
    """
    ratios = dict(layer_type.slices)
    present = sum(ratios[name] for name in slices)
    unit, rest = divmod(rows, present)
    if rest or unit == 0:
        raise ValueError(
            f"{rows} rows cannot be the {'+'.join(slices)} part of {layer_type.part}, "
            f"which is made of {present} equal parts"
        )
    return unit * layer_type.out_ratio


def linear_layers(module: DiT) -> dict[str, tuple[int, int]]:
    """Canonical linear layers of a FLUX-like module with their weight shapes.

    Quantized and offloaded layers count too: all that is asked of one is that it has
    ``in_features`` and ``out_features``.

    Args:
        module: The transformer; anything with torch's ``named_modules``.

    Returns:
        ``(out_features, in_features)`` by canonical name, in the order of `layer_sort_key`.
    """
    shapes: dict[str, tuple[int, int]] = {}
    for name, child in module.named_modules():
        out_features = getattr(child, "out_features", None)
        in_features = getattr(child, "in_features", None)
        if isinstance(out_features, int) and isinstance(in_features, int) and parse_layer(name):
            shapes[name] = (out_features, in_features)
    return {name: shapes[name] for name in sorted(shapes, key=layer_sort_key)}


def linear_layer_names(module: DiT) -> list[str]:
    """Names of the canonical linear layers of a FLUX-like module.

    Args:
        module: The transformer; anything with torch's ``named_modules``.

    Returns:
        Canonical names in the order of `layer_sort_key`.
    """
    return list(linear_layers(module))
