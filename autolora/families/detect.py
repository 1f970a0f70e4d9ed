"""Finds the base-model family that a LoRA file is for.

Module names decide first, then shapes and block numbers; the header only decides between models
that share all of these. Where several remain, all are named and none is guessed. Nothing here
needs torch.

Sizes of no published model (tests and experiments have such) are no contradiction as long as they
are small; the first family whose ratios they have is taken then.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from autolora.errors import LoRAFormatError, shown
from autolora.families.layers import LayerTable, Module, Share, Size, TextEncoder, templates
from autolora.families.prefixes import inner_paths
from autolora.families.telling import Telling

Shape = tuple[int, int]
"""Output rows, and input channels times the kernel's height and width; 0 where unknown."""

LARGEST_REDUCED = 1024
"""Most channels of a model that was made small on purpose."""

_HEADER_FIELDS = (
    "modelspec.architecture",
    "ss_base_model_version",
    "ss_network_module",
    "ss_sd_model_name",
    "base_model",
)


@dataclass(frozen=True)
class Detection:
    """What a file is for.

    Attributes:
        family: Name of the family; None where it is another model's, unknown or ambiguous.
        title: What to call the base model; empty where nothing tells.
        candidates: Titles of the models that it may be for, where several remain.
        families: Those of the candidates that are families, by name.
    """

    family: str | None = None
    title: str = ""
    candidates: tuple[str, ...] = ()
    families: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Candidate:
    """A family, or another model that shares its names."""

    name: str | None
    telling: Telling
    table: LayerTable
    header_only: bool = False


class _Known(NamedTuple):
    """A module of a file as a candidate knows it."""

    module: Module
    shape: Shape | None


def layer_table(name: str) -> LayerTable:
    """The layers of a family.

    Args:
        name: The family's name.

    Raises:
        LoRAFormatError: There is no such family; the message lists those that there are.
    """
    if name not in tables():
        raise LoRAFormatError(
            f"There is no base-model family named {shown(name)!r}; choose one of "
            f"{', '.join(tables())}."
        )
    return tables()[name]


@lru_cache(maxsize=1)
def tables() -> Mapping[str, LayerTable]:
    """The layers of every family by name."""
    return {c.name: c.table for c in _candidates() if c.name is not None}


def title(name: str) -> str:
    """What to call a family in a sentence; its name where there is no such family."""
    return next((c.telling.title for c in _candidates() if c.name == name), name)


def is_published(name: str) -> bool:
    """Whether people have adapters for a family from elsewhere."""
    return any(c.name == name and c.telling.words for c in _candidates())


def shares_layers(one: str, other: str) -> bool:
    """Whether adapters of one family fit another, as far as names tell."""
    return one == other or layer_table(one).rows == layer_table(other).rows


@lru_cache(maxsize=1)
def _candidates() -> tuple[_Candidate, ...]:
    from autolora.families.others import OTHERS

    found = []
    for name in sorted(file.parent.name for file in Path(__file__).parent.glob("*/layers.py")):
        module = import_module(f"autolora.families.{name}.layers")
        found.append(_Candidate(name, module.TELLING, module.LAYERS))
    return (*found, *(_Candidate(None, o.telling, o.table, o.header_only) for o in OTHERS))


@lru_cache(maxsize=1)
def _index() -> Mapping[str, Sequence[tuple[int, str, tuple[Share, ...]]]]:
    """Every flat module path, with the number of the candidate, the dialect and the layers."""
    index: dict[str, list[tuple[int, str, tuple[Share, ...]]]] = {}
    for n, candidate in enumerate(_candidates()):
        for dialect in candidate.table.dialects:
            for path, shares in candidate.table.modules(dialect).items():
                index.setdefault(path.replace(".", "_"), []).append((n, dialect, shares))
    return index


def detect(
    modules: Mapping[str, Shape | None], metadata: Mapping[str, str], wanted: str | None = None
) -> Detection:
    """Find the family of a file.

    Args:
        modules: The size of each module's weight change by its path in the file; None where the
            file does not show it.
        metadata: The header's text entries.
        wanted: Name of a family that is taken wherever names and sizes allow it.
    """
    known = _known_modules(modules)
    most = max(map(len, known.values()), default=0)
    header = header_words(metadata)
    named = {n for n, c in enumerate(_candidates()) if any(map(c.telling.named_in, header))}
    top = [
        n
        for n, found in known.items()
        if len(found) == most and (n in named or not _candidates()[n].header_only)
    ]
    by_name = _telling_name(modules, set().union(*(known[n] for n in top)) if top else set())
    if by_name:
        return _by_title(by_name)
    if not top:
        return _by_title(_other_in(header))
    return _decide(top, known, named, list(modules), wanted)


def _decide(
    top: list[int],
    known: Mapping[int, Mapping[str, _Known]],
    named: set[int],
    paths: Sequence[str],
    wanted: str | None,
) -> Detection:
    """Choose among the candidates that know most of a file's names."""
    fits = {n: _fit(_candidates()[n].table, known[n].values()) for n in top}
    # Only families are read at sizes of no published model.
    families = {n for n in top if _candidates()[n].name is not None or n in named}
    fits = {n: 0 if f == 1 and n not in families else f for n, f in fits.items()}
    best = max(fits.values())
    asked = [n for n in top if wanted is not None and _candidates()[n].name == wanted]
    if asked and fits[asked[0]] == best > 0:
        return _detection(asked)
    if best == 0:
        # Nobody has such layers: the reader of the likeliest family says what is wrong with them.
        chosen = [n for n in top if n in named] or top
        return _detection([chosen[0]])
    left = [n for n in top if fits[n] == best]
    left = [n for n in left if _text_layers(n, paths) == max(_text_layers(m, paths) for m in left)]
    left = [n for n in left if n in named] or [n for n in left if not _candidates()[n].header_only]
    if best == 1:
        left = left[:1]
    return _detection([n for i, n in enumerate(left) if not _has_rows_of(n, left[:i])])


def _has_rows_of(candidate: int, others: Iterable[int]) -> bool:
    """Whether a candidate has the very layers of one before it."""
    return any(_candidates()[candidate].table.rows is _candidates()[n].table.rows for n in others)


def _detection(left: Sequence[int]) -> Detection:
    found = [_candidates()[n] for n in left]
    titles = tuple(dict.fromkeys(c.telling.title for c in found))
    families = tuple(c.name for c in found if c.name is not None)
    if len(titles) > 1 and not families:
        return Detection(None, " or ".join(titles))
    if len(titles) > 1:
        return Detection(None, "", titles, families)
    return Detection(found[0].name, titles[0]) if found else Detection()


def _by_title(name: str) -> Detection:
    families = {c.telling.title: c.name for c in _candidates() if c.name is not None}
    return Detection(families.get(name), name)


def _known_modules(modules: Mapping[str, Shape | None]) -> dict[int, dict[str, _Known]]:
    """What each candidate knows of a file, by path."""
    known: dict[int, dict[str, _Known]] = {}
    index = _index()
    for path, shape in modules.items():
        for _, inner in inner_paths(path):
            for template, block in templates(inner.replace(".", "_")):
                for n, dialect, shares in index.get(template, ()):
                    found = known.setdefault(n, {})
                    found.setdefault(path, _Known(Module(dialect, shares, block), shape))
    return known


def _text_layers(candidate: int, paths: Iterable[str]) -> int:
    """How many paths are layers of a candidate's text encoders."""
    encoders = _candidates()[candidate].table.text_encoders
    return sum(text_layer(encoders, path) is not None for path in paths) if encoders else 0


def text_layer(
    encoders: Sequence[TextEncoder], path: str
) -> tuple[TextEncoder, str, str, Module] | None:
    """Look a module path up among text encoders.

    Args:
        encoders: A family's text encoders.
        path: Module path as a file has it.

    Returns:
        Encoder, prefix, path without it, and the layer; None where no encoder has it.
    """
    for encoder in encoders:
        for prefix in encoder.prefixes:
            if path.startswith(prefix):
                inner = path[len(prefix) :]
                module = next(encoder.table.find(inner), None)
                if module is not None:
                    return encoder, prefix, inner, module
    return None


def _fit(table: LayerTable, modules: Iterable[_Known]) -> int:
    """How well sizes and block numbers fit a table.

    Returns:
        2 for those of a published model, 1 for others in the right ratios, 0 for a contradiction.
    """
    listed = list(modules)
    loose = [v for v in table.variants if _is_of(v.widths, v.blocks, listed, table.adjustable)]
    if any(_is_of(v.widths, v.blocks, listed, frozenset()) for v in loose):
        return 2
    if loose:
        return 1
    widths = _solve(listed)
    return (
        int(bool(widths) and max(widths.values()) <= LARGEST_REDUCED) if widths is not None else 0
    )


def _is_of(
    widths: Mapping[str, int],
    blocks: Mapping[str, int],
    modules: Iterable[_Known],
    adjustable: frozenset[str],
) -> bool:
    """Whether every module has the size that it has in a model, and a block of that model."""
    for module, shape in modules:
        for share in module.shares:
            count = blocks.get(share.row.group)
            if count is not None and (module.block or 0) >= count:
                return False
        if shape is not None:
            for size, kernel, value in _equations(module, shape):
                free = any(symbol in adjustable for symbol, _ in size.terms)
                expected = size.value(widths)
                if expected is not None and not free and expected * kernel != value:
                    return False
    return True


def _equations(module: Module, shape: Shape) -> list[tuple[Size, int, int]]:
    """Symbolic sizes of a module, the factor of the kernel, and the numbers they must be."""
    terms = [term for share in module.shares for term in share.row.out(share.slices).terms]
    equations = [(Size(tuple(terms)), 1, shape[0])] if shape[0] else []
    row = module.shares[0].row
    if row.inputs is not None and shape[1]:
        equations.append((row.inputs, math.prod(row.kernel), shape[1]))
    return equations


def _solve(modules: Iterable[_Known]) -> dict[str, int] | None:
    """Widths that explain all sizes; None if no widths do."""
    widths: dict[str, int] = {}
    sums: list[tuple[Size, int]] = []
    for module, shape in modules:
        for size, kernel, value in _equations(module, shape) if shape is not None else ():
            channels, rest = divmod(value, kernel)
            symbols = {symbol for symbol, _ in size.terms}
            if rest:
                return None
            if len(symbols) > 1:
                sums.append((size, channels))
                continue
            width, rest = divmod(channels, sum(factor for _, factor in size.terms))
            if rest or widths.setdefault(symbols.pop(), width) != width:
                return None
    for size, channels in sums:
        expected = size.value(widths)
        if expected is not None and expected != channels:
            return None
    return widths


def choose(found: Detection, named: str) -> Detection:
    """Take the one of several models that a text names.

    Args:
        found: What a file may be for.
        named: What somebody calls its base model.

    Returns:
        That model, or `found` where the text names none or several of the candidates.
    """
    left = [
        candidate
        for candidate in _candidates()
        if candidate.telling.title in found.candidates
        and (named == candidate.name or candidate.telling.named_in(named.lower()))
    ]
    if len({candidate.telling.title for candidate in left}) != 1:
        return found
    return Detection(left[0].name, left[0].telling.title)


def misfit(table: LayerTable, modules: Sequence[tuple[Module, Shape]], lenient: bool) -> str | None:
    """Say what is wrong with a file whose layers are not those of a family.

    Args:
        table: The family's layers.
        modules: Modules of the file with their sizes.
        lenient: Whether widths of no published model are right.

    Returns:
        The rest of a sentence that begins with the file, with ``{model}`` for the family's title;
        None where all is well.
    """
    known = [_Known(module, shape) for module, shape in modules]
    if _fit(table, known):
        return None
    for n, (module, shape) in enumerate(known, 1):
        if _solve(known[:n]) is None:
            name = "+".join(share.name(module.block) for share in module.shares)
            return (
                f"makes layer {name} {list(shape or ())}, which has not the proportions of "
                "{model}'s layers"
            )
    widths = _solve(known) or {}
    for variant in table.variants:
        same = [s for s, width in widths.items() if variant.widths.get(s, width) == width]
        if len(same) == len(widths):
            most = {
                group: max(m.block or 0 for m, _ in known if m.shares[0].row.group == group)
                for group in {m.shares[0].row.group for m, _ in known} & variant.blocks.keys()
            }
            for group, highest in most.items():
                if highest >= variant.blocks[group]:
                    return (
                        f"has a {group} number {highest}, where {{model}} has "
                        f"{variant.blocks[group]} of them"
                    )
    if lenient:
        return None
    return f"has layers {max(widths.values(), default=0)} wide, which no {{model}} has"


def refused_width(table: LayerTable, module: Module, shape: Shape) -> tuple[str, str] | None:
    """What a file is, and what to do instead, where a module has a width that is refused."""
    known = [_Known(module, shape)]
    if not any(_is_of(v.widths, v.blocks, known, table.adjustable) for v in table.variants):
        return None
    for size, kernel, value in _equations(module, shape):
        for (symbol, width), refusal in table.refused.items():
            if size.terms == ((symbol, 1),) and value == width * kernel:
                return refusal
    return None


def header_words(metadata: Mapping[str, str]) -> list[str]:
    """What a header says about the base model, in lower case."""
    return [metadata[field].lower() for field in _HEADER_FIELDS if metadata.get(field)]


def _other_in(header: Iterable[str]) -> str:
    """Title of a model that a header names; empty where it names none."""
    from autolora.families.others import WORDS

    for text in header:
        for candidate in _candidates():
            if candidate.telling.named_in(text):
                return candidate.telling.title
        for pattern, name in WORDS:
            if pattern.search(text):
                return name
    return ""


def _telling_name(modules: Iterable[str], known: set[str]) -> str:
    """Title of a model that a module path belongs to by its name; empty if it belongs to none."""
    from autolora.families.others import DOTTED_NAMES, NAMES

    for path in modules:
        for _, inner in inner_paths(path):
            for pattern, name in DOTTED_NAMES:
                if pattern.search(inner):
                    return name
            for pattern, name in NAMES if path not in known else ():
                if pattern.search(inner.replace(".", "_")):
                    return name
    return ""
