"""Layer tables: what a base model's layers are called, in every code base that trains for it.

A `LayerRow` is one kind of layer: its canonical name (the module path in DiffSynth's class), its
output rows with their meaning, its sizes in symbolic widths, and its spelling in each dialect. A
`LayerTable` reads the rows forwards (a module path of a file leads to canonical layers) and
backwards (a canonical layer leads to the module paths that a program writes). Nothing here needs
torch.

Spellings are short texts. ``double_blocks.{i}.img_attn.qkv`` is a module that is the whole layer;
``attn.to_q=q attn.to_k=k`` are two modules for one slice each; ``norm_out.linear=scale,shift`` is
the whole layer with its slices in another order; ``img_attn.qkv@1`` says that the layer is the
second of several that the module holds one after the other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Protocol

CANONICAL = "canonical"
"""The dialect of the canonical names themselves."""

_BLOCK = re.compile(
    r"(?:blocks|layers|refiner|block|encoders)[._]((?:0|[1-9]\d{0,5}))(?=[._])", re.ASCII
)
_TERM = re.compile(r"(\d*)([a-z]\w*)|(\d+)")


@dataclass(frozen=True)
class Size:
    """A number of channels as a sum of multiples of symbolic widths, such as ``4d`` or ``c2+c1``.

    Attributes:
        terms: Symbol and factor of each summand.
    """

    terms: tuple[tuple[str, int], ...]

    @classmethod
    @lru_cache(maxsize=256)
    def parse(cls, text: str) -> Size:
        """Read a size such as ``3d`` or ``c2+c1``.

        Raises:
            ValueError: The text is no size.
        """
        terms = []
        for part in text.split("+"):
            found = _TERM.fullmatch(part)
            if found is None or found[2] is None:
                raise ValueError(f"{text!r} is not a sum of multiples of symbols")
            terms.append((found[2], int(found[1] or 1)))
        return cls(tuple(terms))

    def value(self, widths: Mapping[str, int]) -> int | None:
        """The number of channels, None where a width is not known."""
        if any(symbol not in widths for symbol, _ in self.terms):
            return None
        return sum(factor * widths[symbol] for symbol, factor in self.terms)


@dataclass(frozen=True)
class Spelling:
    """How a dialect calls a layer, or a part of one.

    Attributes:
        path: Module path, with ``{i}`` for the block.
        slices: Slices of the layer that the module's rows are, in order; empty for the whole layer.
        position: Which of several layers that the module holds one after the other.
    """

    path: str
    slices: tuple[str, ...] = ()
    position: int = 0

    @classmethod
    def parse(cls, text: str) -> Spelling:
        """Read ``path``, ``path=slice,slice`` or ``path@position``."""
        path, _, slices = text.partition("=")
        path, _, position = path.partition("@")
        return cls(path, tuple(slices.split(",")) if slices else (), int(position or 0))


@dataclass(frozen=True)
class LayerRow:
    """One kind of layer.

    Attributes:
        template: Canonical name, with ``{i}`` for the block.
        slices: Parts of the output in row order, each with its size.
        inputs: Input channels; None for normalization, whose only weight is a vector.
        kernel: Height and width of a convolution's kernel; empty for a linear layer.
        spellings: Its names by dialect.
    """

    template: str
    slices: tuple[tuple[str, Size], ...]
    inputs: Size | None
    kernel: tuple[int, ...] = ()
    spellings: Mapping[str, tuple[Spelling, ...]] = field(default_factory=dict, hash=False)

    @property
    def is_norm(self) -> bool:
        """Whether its only weight is a vector."""
        return self.inputs is None

    @property
    def group(self) -> str:
        """Path of the list of blocks that it is in, such as ``single_blocks``; empty outside."""
        head, found, _ = self.template.partition(".{i}")
        return head if found else ""

    @property
    def part(self) -> str:
        """The name inside its block; the whole name outside blocks."""
        return self.template.partition("{i}.")[2] or self.template

    @property
    def slice_names(self) -> tuple[str, ...]:
        """Names of its slices, in row order."""
        return tuple(name for name, _ in self.slices)

    def out(self, slices: Sequence[str] = ()) -> Size:
        """Output channels of some slices together, of all where none is named."""
        sizes = dict(self.slices)
        terms = [term for name in slices or sizes for term in sizes[name].terms]
        return Size(tuple(terms))

    def output_slices(self, out_features: int) -> dict[str, slice]:
        """Rows of the output that belong to each slice.

        Args:
            out_features: Output channels of the layer.

        Raises:
            ValueError: They cannot be divided in the ratios of the slices.
        """
        if len(self.slices) == 1:
            return {self.slices[0][0]: slice(0, out_features)}
        unit, rest = divmod(out_features, _factor(self.out()))
        if rest or unit == 0:
            raise ValueError(
                f"{out_features} output channels of {self.part} cannot be divided into "
                f"{_factor(self.out())} equal parts"
            )
        rows: dict[str, slice] = {}
        start = 0
        for name, size in self.slices:
            rows[name] = slice(start, start + _factor(size) * unit)
            start = rows[name].stop
        return rows

    def fused_out_features(self, slices: Sequence[str], rows: int) -> int:
        """Output channels of the whole layer, from the size of some of its slices.

        Args:
            slices: Names of the slices that are at hand.
            rows: How many output channels they have together.

        Raises:
            ValueError: The rows cannot be divided in the ratios of these slices.
        """
        if set(slices) == set(self.slice_names):
            self.output_slices(rows)
            return rows
        present = _factor(self.out(slices))
        unit, rest = divmod(rows, present)
        if rest or unit == 0:
            raise ValueError(
                f"{rows} rows cannot be the {'+'.join(slices)} part of {self.part}, "
                f"which is made of {present} equal parts"
            )
        return unit * _factor(self.out())


def _factor(size: Size) -> int:
    """Factor of a size in one symbol."""
    return sum(factor for _, factor in size.terms)


def layer(
    template: str, out: str, inputs: str, kernel: tuple[int, ...] = (), **spellings: str
) -> LayerRow:
    """Write down a row.

    Args:
        template: Canonical name, with ``{i}`` for the block.
        out: Output channels, such as ``d``, or of each slice, such as ``q:d k:d v:d mlp:4d``.
        inputs: Input channels; empty for normalization.
        kernel: Height and width of a convolution's kernel.
        **spellings: Names by dialect; several are separated by blanks.
    """
    slices = []
    for text in out.split():
        name, _, size = text.rpartition(":")
        slices.append((name or "out", Size.parse(size)))
    return LayerRow(
        template,
        tuple(slices),
        Size.parse(inputs) if inputs else None,
        kernel,
        MappingProxyType(
            {
                dialect: tuple(map(Spelling.parse, text.split()))
                for dialect, text in spellings.items()
            }
        ),
    )


@dataclass(frozen=True)
class Variant:
    """The sizes of a published model.

    Attributes:
        name: What people call it.
        widths: Channels by symbol.
        blocks: Number of blocks by the path of their list.
        without: What the names of layers that it lacks begin with.
    """

    name: str
    widths: Mapping[str, int]
    blocks: Mapping[str, int]
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerName:
    """A canonical layer name taken apart.

    Attributes:
        name: The full canonical name.
        row: What kind of layer it is.
        block: Index of the block, None outside the blocks.
    """

    name: str
    row: LayerRow
    block: int | None


@dataclass(frozen=True)
class Share:
    """The part of a module that is one canonical layer, or some of its slices.

    Attributes:
        row: The kind of layer.
        slices: Slices of it that the rows are, in order; empty for the whole layer.
    """

    row: LayerRow
    slices: tuple[str, ...] = ()

    def name(self, block: int | None) -> str:
        """The canonical layer in a block."""
        return self.row.template if block is None else self.row.template.replace("{i}", str(block))


@dataclass(frozen=True)
class Module:
    """What a module path of a file stands for.

    Attributes:
        dialect: The dialect that calls it so.
        shares: The layers that its rows are, one after the other.
        block: Index of the block, None outside the blocks.
    """

    dialect: str
    shares: tuple[Share, ...]
    block: int | None


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder that files may change.

    Attributes:
        name: What `LoRA.text_encoder` calls it.
        module: Its attribute in DiffSynth's pipeline.
        table: Its layers.
        prefixes: What stands before its layers in files, joined by ``.`` or ``_``.
    """

    name: str
    module: str
    table: LayerTable
    prefixes: tuple[str, ...]


class Denoiser(Protocol):
    """What a model needs to have its layers listed: torch's ``named_modules``."""

    def named_modules(self) -> Iterable[tuple[str, Any]]:
        """Yield every submodule with its dotted path."""
        ...


@dataclass(frozen=True, eq=False)
class LayerTable:
    """The layers of a base model.

    Attributes:
        rows: Every kind of layer, in the order of the forward pass.
        dialects: Dialects in the order in which a path is looked for.
        variants: Sizes of the published models.
        native: The dialect that trainers such as kohya's and ai-toolkit write.
        text_encoders: Text encoders that files may change.
        adjustable: Widths that models made from a published one may change, such as the input's.
        refused: What a file is that makes a width of another size, and what to do instead; by
            symbol and size.
        unet: Whether diffusers calls the denoiser ``unet``, not ``transformer``.
    """

    rows: tuple[LayerRow, ...]
    dialects: tuple[str, ...]
    variants: tuple[Variant, ...] = ()
    native: str = CANONICAL
    text_encoders: tuple[TextEncoder, ...] = ()
    adjustable: frozenset[str] = frozenset()
    refused: Mapping[tuple[str, int], tuple[str, str]] = field(default_factory=dict)
    unet: bool = False

    def __post_init__(self) -> None:
        by_template = {row.template: row for row in self.rows}
        index: dict[str, list[tuple[str, tuple[Share, ...]]]] = {}
        spelled: dict[str, dict[str, tuple[Share, ...]]] = {}
        for dialect in self.dialects:
            paths: dict[str, dict[int, Share]] = {}
            for row in self.rows:
                for spelling in self.spellings(row, dialect):
                    shares = paths.setdefault(spelling.path, {})
                    shares[spelling.position] = Share(row, spelling.slices)
            spelled[dialect] = {
                path: tuple(shares[n] for n in sorted(shares)) for path, shares in paths.items()
            }
            for path, whole in spelled[dialect].items():
                index.setdefault(flat(path), []).append((dialect, whole))
        groups = list(dict.fromkeys(row.group for row in self.rows if row.group))
        self.__dict__.update(
            _by_template=by_template,
            _index=index,
            _spelled=spelled,
            _order={row.template: n for n, row in enumerate(self.rows)},
            _groups={group: n for n, group in enumerate([*groups, ""])},
            _parsed={},
        )

    def spellings(self, row: LayerRow, dialect: str) -> tuple[Spelling, ...]:
        """A row's names in a dialect; none where it has no name there."""
        if dialect == CANONICAL:
            return (Spelling(row.template),)
        return row.spellings.get(dialect, ())

    def modules(self, dialect: str) -> Mapping[str, tuple[Share, ...]]:
        """Every module path of a dialect, and the layers that its rows are."""
        found: Mapping[str, tuple[Share, ...]] = self.__dict__["_spelled"][dialect]
        return found

    def find(self, path: str) -> Iterator[Module]:
        """Look a module path up, in the order of the dialects.

        Args:
            path: A path without prefix, its parts joined by ``.`` or ``_``.

        Yields:
            What it stands for in each dialect that knows it.
        """
        index: Mapping[str, list[tuple[str, tuple[Share, ...]]]] = self.__dict__["_index"]
        for template, block in templates(flat(path)):
            for dialect, shares in index.get(template, ()):
                yield Module(dialect, shares, block)

    def parse(self, name: str) -> LayerName | None:
        """Take a canonical layer name apart; None when it is not one of this table."""
        known: dict[str, LayerName | None] = self.__dict__["_parsed"]
        if name not in known and len(known) < 1 << 16:
            known[name] = self._parse(name)
        return known[name] if name in known else self._parse(name)

    def _parse(self, name: str) -> LayerName | None:
        rows: Mapping[str, LayerRow] = self.__dict__["_by_template"]
        for template, block in templates(name):
            if (row := rows.get(template)) is not None:
                return LayerName(name, row, block)
        return None

    def sort_key(self, name: str) -> tuple[int, int, int, str]:
        """Key that sorts layers by list of blocks, block number and place in the block."""
        found = self.parse(name)
        groups: Mapping[str, int] = self.__dict__["_groups"]
        if found is None:
            return (len(groups), 0, 0, name)
        order: Mapping[str, int] = self.__dict__["_order"]
        return (groups[found.row.group], found.block or 0, order[found.row.template], name)

    def spell(self, name: str, dialect: str) -> list[tuple[str, Spelling, tuple[Share, ...]]]:
        """The modules of a dialect that a canonical layer is divided into or is a part of.

        Args:
            name: Canonical layer name.
            dialect: The dialect.

        Returns:
            For each module its path, this layer's spelling, and all layers that the module holds;
            empty where the dialect has no name for the layer.
        """
        parsed = self.parse(name)
        if parsed is None:
            return []
        block = "" if parsed.block is None else str(parsed.block)
        return [
            (
                spelling.path.replace("{i}", block),
                spelling,
                self.modules(dialect)[spelling.path],
            )
            for spelling in self.spellings(parsed.row, dialect)
        ]

    def canonical(self, weights: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Weight shapes by canonical name.

        Args:
            weights: Shapes of a checkpoint's weights by module path, in any dialect that names
                whole layers.
        """
        found: dict[str, tuple[int, ...]] = {}
        for path, (rows, *inner) in weights.items():
            module = next(self.find(path), None)
            if module is None or module.shares[0].row.is_norm:
                continue
            factors = [_factor(share.row.out(share.slices)) for share in module.shares]
            for share, factor in zip(module.shares, factors, strict=True):
                found[share.name(module.block)] = (rows * factor // sum(factors), *inner)
        return {name: found[name] for name in sorted(found, key=self.sort_key)}

    def count(self, shapes: Mapping[str, tuple[int, int]]) -> int:
        """Weights of the model that an adapter is for.

        Args:
            shapes: Output channels, and inputs times the kernel's size, of the layers that it
                changes.

        Returns:
            Those of the published model with such layers, the first where none tells; for other
            widths, those of as many blocks as are numbered.
        """
        parsed = [(found, shapes[name]) for name in shapes if (found := self.parse(name))]
        variant = next((v for v in self.variants if self._is_of(v, parsed)), None)
        counts: dict[str, int] = {}
        if variant is not None:
            counts = dict(variant.blocks)
        else:
            for found, _ in parsed:
                group = found.row.group
                counts[group] = max(counts.get(group, 0), (found.block or 0) + 1)
        absent = () if variant is None else variant.without
        return sum(
            counts.get(row.group, 0) if row.group else 1
            for row in self.rows
            if not row.is_norm and not row.template.startswith(absent or ("\0",))
        )

    def _is_of(self, variant: Variant, layers: Iterable[tuple[LayerName, tuple[int, int]]]) -> bool:
        for found, shape in layers:
            for size, number in ((found.row.out(), shape[0]), (found.row.inputs, shape[1])):
                kernel = 1 if size is not found.row.inputs else math.prod(found.row.kernel)
                known = None if size is None else size.value(variant.widths)
                free = size is None or any(symbol in self.adjustable for symbol, _ in size.terms)
                if known is not None and not free and known * kernel != number:
                    return False
        return True

    def shapes(self, module: Denoiser) -> dict[str, tuple[int, ...]]:
        """Weight shapes of a model's layers that are in the table, in the order of `sort_key`.

        Quantized and offloaded layers count too: a linear layer is asked for ``in_features`` and
        ``out_features`` only, a convolution for its channels and kernel.

        Args:
            module: The denoiser; anything with torch's ``named_modules``.
        """
        found: dict[str, tuple[int, ...]] = {}
        for name, child in module.named_modules():
            shape = weight_shape(child)
            if shape is not None and self.parse(name) is not None:
                found[name] = shape
        return {name: found[name] for name in sorted(found, key=self.sort_key)}


def weight_shape(module: Any) -> tuple[int, ...] | None:
    """``(out, in)`` of a linear layer or ``(out, in, height, width)`` of a plain convolution.

    Args:
        module: Any module.

    Returns:
        The shape of its weight; None for other modules and for grouped convolutions.
    """
    for names in (("out_features", "in_features"), ("out_channels", "in_channels")):
        out, inner = (getattr(module, name, None) for name in names)
        if not isinstance(out, int) or not isinstance(inner, int):
            continue
        if names[0] == "out_features":
            return out, inner
        kernel = getattr(module, "kernel_size", None)
        if isinstance(kernel, tuple) and len(kernel) == 2 and getattr(module, "groups", 0) == 1:
            return out, inner, int(kernel[0]), int(kernel[1])
    return None


def flat(path: str) -> str:
    """A path with its parts joined by ``_``, as kohya's keys have it."""
    return path.replace(".", "_")


def templates(path: str) -> Iterator[tuple[str, int | None]]:
    """A path with ``{i}`` for the number of its innermost block, then unchanged.

    Args:
        path: Canonical or foreign, joined by ``.`` or ``_``.

    Yields:
        Template and block number; None for the unchanged path.
    """
    if "{" in path:
        return
    numbers = list(_BLOCK.finditer(path))
    if numbers:
        last = numbers[-1]
        yield f"{path[: last.start(1)]}{{i}}{path[last.end(1) :]}", int(last[1])
    yield path, None
