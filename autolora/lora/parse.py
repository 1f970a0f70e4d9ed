"""From a LoRA file to weight changes by canonical layer.

Every key is matched or dropped with a reason, and everything that would make a layer wrong is an
error that names the key: a factor without its partner, shapes that do not fit, NaN, integers. The
header alone decides; tensors are read once, when nothing can be wrong with them but their values.

A module of the file may stand for a layer, for slices of one, or for several layers whose rows it
holds one after the other; weight changes are cut accordingly. Kernels of convolutions are
flattened: a change has the shape ``[out, in * height * width]``.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

from autolora.errors import FamilyError, LoRAFormatError, shown
from autolora.families import detect
from autolora.families.layers import LayerRow, LayerTable, Module
from autolora.lora import refusals
from autolora.lora.deltas import (
    Change,
    Contents,
    Full,
    Hadamard,
    Kronecker,
    LayerDelta,
    LowRank,
    Magnitude,
    Matrix,
    Piece,
    is_finite,
    rows_of,
)
from autolora.lora.formats import (
    DENOISER,
    KeyMatch,
    Part,
    detect_family,
    family_error,
    match_keys,
    settled,
    supported_titles,
)
from autolora.lora.load_report import LoadReport, make_report
from autolora.lora.peft_config import PeftConfig, read_peft_config
from autolora.safetensors_io import (
    FLOAT_DTYPES,
    LARGEST_VALUE,
    MAX_FEATURES,
    NUMBER_DTYPES,
    Header,
    TensorInfo,
    read_header,
    read_tensors,
)

_LORA = ("A", "B")
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_CORES = ("lokr_t1", "lokr_t2", "hada_t1", "hada_t2", "mid")
RANKED = ("B", "lokr_w2_b", "lokr_w1_b", "hada_w1_b")
"""Factors whose inner size is the rank that alpha is divided by, the first that is there."""

_ROUNDING = 0.02  # relative difference that rounding to bfloat16 may make, with room to spare
_NAMES: Mapping[str, str] = {"A": "factor A (down)", "B": "factor B (up)"}


@dataclass(frozen=True)
class Place:
    """Where rows of a module belong.

    Attributes:
        layer: Canonical layer.
        row: What kind of layer it is.
        start: First of the module's rows.
        stop: The row after the last.
        slices: The layer's rows that they are, in order.
        out_features: Output channels of the layer.
    """

    layer: str
    row: LayerRow
    start: int
    stop: int
    slices: tuple[slice, ...]
    out_features: int


@dataclass
class Group:
    """The tensors of one module of the file.

    Attributes:
        module: The layers that the module stands for.
        part: The part of the base model that they are in.
        keys: The key of each tensor by role.
        algorithm: ``lora``, ``lokr``, ``loha`` or ``diff``; empty when no tensor changes a weight.
        shape: Output rows and flattened inputs of the module; set by `check_groups`.
        places: Where its rows belong; set by `check_groups`.
    """

    module: Module
    part: Part = DENOISER
    keys: dict[str, KeyMatch] = field(default_factory=dict)
    algorithm: str = ""
    shape: tuple[int, int] = (0, 0)
    places: tuple[Place, ...] = ()

    @property
    def row(self) -> LayerRow:
        """What kind of layer it stands for, the first of several."""
        return self.module.shares[0].row

    @property
    def layers(self) -> tuple[str, ...]:
        """The canonical layers that it stands for."""
        return tuple(share.name(self.module.block) for share in self.module.shares)

    @property
    def slices(self) -> Iterator[tuple[Part, str, str]]:
        """Part, layer and name of every slice that it stands for."""
        for share, layer in zip(self.module.shares, self.layers, strict=True):
            for name in share.slices or share.row.slice_names:
                yield self.part, layer, name

    @property
    def has_scale(self) -> bool:
        """Whether alpha counts: it does where there is a rank to divide it by."""
        return any(role in self.keys for role in RANKED)

    @property
    def first_key(self) -> str:
        """A key to name the module by in an error."""
        return min(match.key for match in self.keys.values())

    def key(self, role: str) -> str:
        """The file's key of a tensor."""
        return self.keys[role].key


def _algorithm(role: str) -> str:
    """The algorithm that a tensor is a factor of; empty for what only goes with one."""
    if role in _LORA or role == "mid":
        return "lora"
    if role == "diff":
        return role
    return {"lokr": "lokr", "hada": "loha"}.get(role.partition("_")[0], "")


def group_keys(path: Path, matches: Iterable[KeyMatch]) -> tuple[list[Group], dict[str, str]]:
    """Put together what belongs to one module.

    Args:
        path: The file, for errors.
        matches: What its keys are.

    Returns:
        Modules that change something, and keys that only go with factors and have none, with the
        reason.

    Raises:
        LoRAFormatError: A tensor is there twice, or the file holds several adapters.
    """
    groups: dict[tuple[Part, str], Group] = {}
    adapters: dict[str, str] = {}
    for match in matches:
        place = (match.part, match.prefix + match.path)
        group = groups.setdefault(place, Group(match.module, match.part))
        earlier = group.keys.setdefault(match.role, match)
        if match.adapter is not None:
            adapters.setdefault(match.adapter, match.key)
        if len(adapters) > 1:
            names = " and ".join(map(repr, map(shown, sorted(adapters))))
            raise LoRAFormatError(
                f"{shown(path)} holds several adapters, {names}; save each to its own file."
            )
        if earlier is not match:
            raise twice(path, earlier.key, match.key)
    kept: list[Group] = []
    stray: dict[str, str] = {}
    for group in groups.values():
        group.algorithm = next(filter(None, map(_algorithm, group.keys)), "")
        if group.algorithm or "diff_b" in group.keys:
            kept.append(group)
        else:
            stray |= {match.key: refusals.STRAY[role] for role, match in group.keys.items()}
    return kept, stray


def check_groups(path: Path, groups: Iterable[Group], tensors: Mapping[str, TensorInfo]) -> None:
    """Check every module from the header alone, and find its shape.

    Args:
        path: The file, for errors.
        groups: Its modules; their shape and places are set.
        tensors: Element type and shape by key.

    Raises:
        LoRAFormatError: A tensor lacks its partner, does not fit it, or is no factor at all.
    """
    for group in groups:
        for role, match in group.keys.items():
            _check_tensor(path, match.key, role, tensors[match.key], group.row)
        if group.algorithm:
            _check_complete(path, group)
            group.shape = _module_shape(path, group, tensors)
        _check_vectors(path, group, tensors)
        if not group.row.is_norm:
            group.places = _places(path, group)


def check_unique(path: Path, groups: Iterable[Group]) -> None:
    """Make sure that no weight and no bias is given twice.

    Raises:
        LoRAFormatError: One is; the error names both keys.
    """
    weights: dict[tuple[Part, str, str], str] = {}
    biases: dict[tuple[Part, str, str], str] = {}
    for group in groups:
        for seen, used in ((weights, bool(group.algorithm)), (biases, "diff_b" in group.keys)):
            for place in group.slices if used else ():
                earlier = seen.setdefault(place, group.first_key)
                if earlier != group.first_key:
                    raise twice(path, earlier, group.first_key)


def set_aside_repeats(groups: Sequence[Group]) -> tuple[list[Group], list[Group]]:
    """Part modules that other modules of the file give again in other pieces.

    Some files hold q, k and v of a layer both fused and split. The modules of the dialect that has
    more of them stay.

    Returns:
        Modules to use, and modules whose every slice is in one of those, under another name.
    """
    owners: dict[tuple[Part, str, str], list[Group]] = {}
    for group in groups:
        for place in group.slices if group.algorithm else ():
            owners.setdefault(place, []).append(group)
    twice_given = {place for place, found in owners.items() if len(found) == 2}
    dialects = Counter(group.module.dialect for group in groups)
    repeats = []
    for group in groups:
        others = [g for place in group.slices for g in owners.get(place, ()) if g is not group]
        if (
            group.algorithm
            and set(group.slices) <= twice_given
            and all(other.module.dialect != group.module.dialect for other in others)
            and all(dialects[g.module.dialect] > dialects[group.module.dialect] for g in others)
        ):
            repeats.append(group)
    gone = set(map(id, repeats))
    return [group for group in groups if id(group) not in gone], repeats


def _places(path: Path, group: Group) -> tuple[Place, ...]:
    """Divide a module's rows among the layers that it stands for.

    Raises:
        LoRAFormatError: The rows cannot be divided so.
    """
    sizes = [share.row.out(share.slices) for share in group.module.shares]
    factors = [sum(factor for _, factor in size.terms) for size in sizes]
    rows, total = group.shape[0], sum(factors)
    if len(factors) > 1 and rows % total:
        problem = f"does not fit: {rows} rows cannot be divided into {total} equal parts"
        raise bad_key(path, _row_key(group), problem)
    found, start = [], 0
    for share, layer, factor in zip(group.module.shares, group.layers, factors, strict=True):
        stop = start + rows * factor // total
        names = share.slices or share.row.slice_names
        try:
            if share.slices or len(share.row.slices) > 1:
                out_features = share.row.fused_out_features(names, stop - start)
                by_name = share.row.output_slices(out_features)
                slices = tuple(by_name[name] for name in share.slices)
            else:
                out_features, slices = stop - start, ()
        except ValueError as error:
            raise bad_key(path, _row_key(group), f"does not fit: {error}") from error
        whole = (slice(0, out_features),)
        found.append(Place(layer, share.row, start, stop, slices or whole, out_features))
        start = stop
    return tuple(found)


def _row_key(group: Group) -> str:
    """The key whose tensor has the module's rows, for errors."""
    return group.key("B") if "B" in group.keys else group.first_key


def _check_tensor(path: Path, key: str, role: str, info: TensorInfo, row: LayerRow) -> None:
    if role == "alpha":
        if math.prod(info.shape) != 1:
            raise bad_key(path, key, f"has shape {list(info.shape)}; alpha is one number")
        if info.dtype not in NUMBER_DTYPES:
            raise bad_key(path, key, f"has dtype {info.dtype}; alpha is a number")
        return
    if info.dtype not in FLOAT_DTYPES:
        raise bad_key(path, key, f"has dtype {info.dtype}; factors are floating-point")
    if 0 in info.shape:
        raise bad_key(path, key, f"has shape {list(info.shape)}, which holds no values")
    if not (role in _CORES or (_algorithm(role) and not row.is_norm)):
        return
    kernel = info.shape[2:]
    if len(info.shape) not in (2, 4) and role != "diff":
        kind = "a convolution" if row.kernel else "a linear layer"
        dimensions = "2-D or 4-D" if row.kernel else "2-D"
        raise bad_key(
            path, key, f"has shape {list(info.shape)}; factors of {kind} are {dimensions}"
        )
    if math.prod(kernel) != 1 and kernel != row.kernel:
        there = f"has a kernel of {list(row.kernel)}" if row.kernel else "is a linear layer"
        raise bad_key(
            path, key, f"has shape {list(info.shape)}, a core of a convolution; its layer {there}"
        )


def _check_complete(path: Path, group: Group) -> None:
    """Make sure that one algorithm's tensors are there, all of them."""
    algorithm = group.algorithm
    for role, match in group.keys.items():
        if _algorithm(role) not in ("", algorithm):
            other = next(key for role, key in group.keys.items() if _algorithm(role) == algorithm)
            raise twice(path, other.key, match.key)
    if algorithm == "lora":
        missing = [role for role in _LORA if role not in group.keys]
    elif algorithm == "loha":
        missing = [role for role in _LOHA if role not in group.keys]
    elif algorithm == "lokr":
        missing = [side for side in ("lokr_w1", "lokr_w2") if not _has_side(path, group, side)]
    else:
        missing = []
    if missing:
        present = next(key.key for role, key in group.keys.items() if _algorithm(role))
        raise bad_key(
            path,
            present,
            f"has no partner: {_NAMES.get(missing[0], missing[0])} is not in the file",
        )


def _has_side(path: Path, group: Group, side: str) -> bool:
    whole = side in group.keys
    product = f"{side}_a" in group.keys and f"{side}_b" in group.keys
    if whole and (f"{side}_a" in group.keys or f"{side}_b" in group.keys):
        part = f"{side}_a" if f"{side}_a" in group.keys else f"{side}_b"
        raise twice(path, group.key(side), group.key(part))
    return whole or product


def _module_shape(path: Path, group: Group, tensors: Mapping[str, TensorInfo]) -> tuple[int, int]:
    """Output rows and flattened inputs of a module that changes a weight."""
    if group.algorithm == "diff":
        shape = tensors[group.key("diff")].shape
        if (len(shape) == 1) != group.row.is_norm:
            kind = "normalization" if group.row.is_norm else "linear"
            raise bad_key(
                path, group.key("diff"), f"has shape {list(shape)}, which is no {kind} weight"
            )
        return shape[0], shape[-1] if len(shape) < 3 else math.prod(shape[1:])
    if group.algorithm == "lora":
        if "mid" in group.keys:
            return _tucker_shape(path, group, tensors)
        return _product_shape(path, group, tensors, "B", "A")
    prefix = "lokr_w" if group.algorithm == "lokr" else "hada_w"
    sides = [_side_shape(path, group, tensors, f"{prefix}{n}") for n in "12"]
    (p1, q1), (p2, q2) = sides
    if group.algorithm == "lokr":
        return p1 * p2, q1 * q2
    if sides[0] != sides[1]:
        raise bad_key(
            path,
            group.key("hada_w2_a"),
            f"makes a matrix of shape {list(sides[1])}, but hada_w1 makes {list(sides[0])}",
        )
    return p1, q1


def _side_shape(
    path: Path, group: Group, tensors: Mapping[str, TensorInfo], side: str
) -> tuple[int, int]:
    if side in group.keys:
        return _flat(tensors[group.key(side)].shape)
    core = side.replace("_w", "_t")
    if core not in group.keys:
        return _product_shape(path, group, tensors, f"{side}_a", f"{side}_b")
    a, b = (_flat(tensors[group.key(f"{side}_{letter}")].shape) for letter in "ab")
    shape = tensors[group.key(core)].shape
    if shape[:2] != (a[0], b[0]):
        raise _misfit(path, group.key(core), shape, a, b)
    return a[1], b[1] * math.prod(shape[2:])


def _tucker_shape(path: Path, group: Group, tensors: Mapping[str, TensorInfo]) -> tuple[int, int]:
    """Shape of ``up @ mid @ down`` (LoCon with a core)."""
    up, down = (_flat(tensors[group.key(role)].shape) for role in ("B", "A"))
    shape = tensors[group.key("mid")].shape
    if shape[:2] != (up[1], down[0]):
        raise _misfit(path, group.key("mid"), shape, up, down)
    return up[0], down[1] * math.prod(shape[2:])


def _misfit(
    path: Path, key: str, core: Sequence[int], a: Sequence[int], b: Sequence[int]
) -> LoRAFormatError:
    return bad_key(
        path,
        key,
        f"has shape {list(core)}, which does not fit factors of shape {list(a)} and {list(b)}",
    )


def _flat(shape: Sequence[int]) -> tuple[int, int]:
    """A shape with everything behind the first dimension in one."""
    return shape[0], math.prod(shape[1:])


def _product_shape(
    path: Path, group: Group, tensors: Mapping[str, TensorInfo], left: str, right: str
) -> tuple[int, int]:
    up, down = (_flat(tensors[group.key(role)].shape) for role in (left, right))
    if down[0] != up[1]:
        raise bad_key(
            path,
            group.key(left),
            f"has shape {list(up)}, which does not fit {right} of shape {list(down)}: "
            "the ranks differ",
        )
    return up[0], down[1]


def _check_vectors(path: Path, group: Group, tensors: Mapping[str, TensorInfo]) -> None:
    """Check biases and magnitudes; a module that has nothing else gets its rows from them."""
    for role in ("diff_b", "bias"):
        if role in group.keys:
            shape = tensors[group.key(role)].shape
            if not group.algorithm:
                group.shape = (math.prod(shape), 0)
            if math.prod(shape) != group.shape[0] or max(shape, default=0) != group.shape[0]:
                raise bad_key(
                    path,
                    group.key(role),
                    f"has shape {list(shape)}, but the module has {group.shape[0]} output channels",
                )
    if "magnitude" in group.keys:
        shape = tensors[group.key("magnitude")].shape
        axis = _magnitude_axis(group, shape)
        if group.algorithm == "diff" or axis is None:
            raise bad_key(
                path,
                group.key("magnitude"),
                f"has shape {list(shape)}, which is no DoRA magnitude of a weight of shape "
                f"{list(group.shape)}",
            )


def _magnitude_axis(group: Group, shape: tuple[int, ...]) -> str | None:
    """What DoRA magnitudes are lengths of: ``rows``, ``columns``, or None when they fit neither.

    PEFT always has one length per output channel, also of shape ``[1, out, 1, 1]``.
    """
    rows, columns = group.shape[0], group.shape[1] // math.prod(group.row.kernel)
    if len(shape) == 4 and shape[2:] == (1, 1):
        shape = shape[:2]
    if shape in ((rows, 1), (rows,)):
        return "rows"
    if shape == (1, rows) and "lora_magnitude_vector" in group.key("magnitude"):
        return "rows"
    return "columns" if shape in ((1, columns), (columns,)) else None


def bad_key(path: Path, key: str, problem: str) -> LoRAFormatError:
    """Say what is wrong with a tensor of a file."""
    return LoRAFormatError(
        f"{shown(path)}: key {shown(key)!r} {problem}; save or download the file again."
    )


def twice(path: Path, first: str, second: str) -> LoRAFormatError:
    """Say that two keys give the same weights."""
    return LoRAFormatError(
        f"{shown(path)} gives the same weights twice, as {shown(first)!r} and {shown(second)!r}; "
        "keep one of them."
    )


def build(
    path: Path,
    groups: Iterable[Group],
    tensors: Mapping[str, Tensor],
    configs: Mapping[Part, PeftConfig],
) -> dict[Part, Contents]:
    """Make weight changes of checked modules.

    Args:
        path: The file, for errors.
        groups: Its modules, with their shapes.
        tensors: Its tensors by key.
        configs: PEFT configuration by model.

    Returns:
        Changes by model, for those models that are changed.

    Raises:
        LoRAFormatError: The change of a module cannot be divided among its layers.
    """
    found: dict[Part, Contents] = {}
    pieces: dict[tuple[Part, str], list[Piece]] = {}
    sizes: dict[tuple[Part, str], tuple[int, int, tuple[int, ...]]] = {}
    for group in groups:
        contents = found.setdefault(group.part, Contents())
        contents.matched |= {match.key: "+".join(group.layers) for match in group.keys.values()}
        if group.row.is_norm:
            contents.norms[group.layers[0]] = tensors[group.key("diff")].to(torch.float32)
            continue
        scale = _scale(group, tensors, configs.get(group.part, PeftConfig()))
        if group.algorithm:
            change, magnitude = _change(group, tensors, scale), _magnitude(path, group, tensors)
            for place in group.places:
                key = (group.part, place.layer)
                pieces.setdefault(key, []).append(_piece(place, change, magnitude))
                sizes[key] = (place.out_features, group.shape[1], place.row.kernel)
        _add_biases(group, tensors, scale, contents.biases)
    for key, parts in pieces.items():
        out_features, in_features, kernel = sizes[key]
        delta = LayerDelta(out_features, in_features, tuple(parts), kernel=kernel)
        found[key[0]].layers[key[1]] = delta
    return found


def _piece(place: Place, change: Change, magnitude: Magnitude | None) -> Piece:
    """The part of a module's change that belongs to one layer."""
    if (place.start, place.stop) == (0, change.shape[0]):
        return Piece(change, place.slices, magnitude)
    if magnitude is not None:
        magnitude = Magnitude(magnitude.values[place.start : place.stop], magnitude.axis)
    return Piece(rows_of(change, place.start, place.stop), place.slices, magnitude)


def _scale(group: Group, tensors: Mapping[str, Tensor], peft: PeftConfig) -> float:
    """``alpha / rank``, alpha from the module's own tensor or else from the configuration.

    The rank is that of the factors; for LoKr that of the side that is a product, and where both
    are stored whole, LyCORIS ignores alpha.
    """
    if not group.has_scale:
        whole = group.keys.get("lokr_w1")
        return 1.0 if whole is None or "alpha" in group.keys else _whole_scale(whole, peft)
    role = next(role for role in RANKED if role in group.keys)
    match = group.keys[role]
    rank = int(tensors[match.key].shape[1 if role == "B" else 0])
    if "alpha" in group.keys:
        return float(tensors[group.key("alpha")].item()) / rank
    return peft.scale(match.path, rank) if match.reads_peft else 1.0


def _whole_scale(match: KeyMatch, peft: PeftConfig) -> float:
    return peft.whole_scale(match.path) if match.reads_peft else 1.0


def _change(group: Group, tensors: Mapping[str, Tensor], scale: float) -> Change:
    def tensor(role: str) -> Tensor | None:
        if role not in group.keys:
            return None
        found = tensors[group.key(role)]
        # A kernel belongs to the inputs, but for a core, whose inputs it is multiplied with.
        return found.flatten(1) if found.ndim > 2 and role not in _CORES else found

    def side(prefix: str, number: int) -> Matrix:
        name = f"{prefix}_w{number}"
        core = tensor(f"{prefix}_t{number}")
        return Matrix(tensor(name), tensor(f"{name}_a"), tensor(f"{name}_b"), core)

    if group.algorithm == "lora":
        down, mid, up = tensor("A"), tensor("mid"), tensor("B")
        assert down is not None and up is not None
        if mid is not None:
            wide = mid.to(torch.float64).flatten(2) if mid.ndim > 2 else mid.double()[..., None]
            product = torch.einsum("rsk,si->rik", wide, down.to(torch.float64))
            down = product.flatten(1).to(torch.promote_types(down.dtype, torch.float32))
        return LowRank(down, up, scale)
    if group.algorithm == "lokr":
        return Kronecker(side("lokr", 1), side("lokr", 2), scale)
    if group.algorithm == "loha":
        return Hadamard(side("hada", 1), side("hada", 2), scale)
    diff = tensor("diff")
    assert diff is not None
    return Full(diff)


def _magnitude(path: Path, group: Group, tensors: Mapping[str, Tensor]) -> Magnitude | None:
    if "magnitude" not in group.keys:
        return None
    values = tensors[group.key("magnitude")]
    axis = _magnitude_axis(group, tuple(values.shape))
    if axis == "columns" and len(group.places) > 1:
        raise LoRAFormatError(
            f"{shown(path)}: key {shown(group.key('magnitude'))!r} holds DoRA magnitudes by input "
            "channel over several layers at once, which depend on each other's base weights; "
            "convert the adapter to a plain LoRA."
        )
    values = values.flatten()
    if axis == "columns" and group.row.kernel:
        values = values.repeat_interleave(math.prod(group.row.kernel))
    kernel = math.prod(group.row.kernel) if axis == "columns" else 1
    return Magnitude(values, cast(Literal["rows", "columns"], axis), kernel)


def _add_biases(
    group: Group, tensors: Mapping[str, Tensor], scale: float, biases: dict[str, Tensor]
) -> None:
    """Add a module's bias (PEFT's is part of B, so scaled like it) to that of its layers."""
    for role, factor in (("bias", scale), ("diff_b", 1.0)):
        if role not in group.keys:
            continue
        values = tensors[group.key(role)].flatten().to(torch.float64) * factor
        for place in group.places:
            bias = biases.setdefault(place.layer, torch.zeros(place.out_features))
            own = values[place.start : place.stop]
            parts = own.split([where.stop - where.start for where in place.slices])
            for where, part in zip(place.slices, parts, strict=True):
                bias[where] += part.to(torch.float32)


@dataclass(frozen=True)
class Loaded:
    """A file that was read.

    Attributes:
        family: Name of the base-model family that it is for.
        parts: What it changes, by model; always with an entry for the denoiser.
        reports: What became of every key, as `DENOISER`; of each text encoder's keys alone.
    """

    family: str
    parts: Mapping[Part, Contents]
    reports: Mapping[Part, LoadReport]


def load_file(path: Path, text_encoder_only: bool = False, family: str | None = None) -> Loaded:
    """Read a LoRA file.

    Args:
        path: A safetensors file of any format in `autolora.lora.formats`.
        text_encoder_only: Also accept a file that changes text encoders and no layer of the
            denoiser.
        family: The base-model family that it is for; None finds it from the file.

    Returns:
        Weight changes by model and canonical layer name, and what became of every key.

    Raises:
        LoRAFormatError: The file is damaged, for another base model, ambiguous, or without any
            layer that can be used.
    """
    header = read_header(path)
    if not header.tensors:
        raise LoRAFormatError(f"{shown(path)} holds no tensors; download or save it again.")
    _refuse(path, refusals.refusal(header.tensors))
    asked = family is not None
    family, table = _family(path, header, family, text_encoder_only)
    groups, dropped = _groups(path, header, family, table)
    if not any(text_encoder_only or group.part == DENOISER for group in groups):
        raise _nothing_matched(path, family, dropped, groups)
    check_groups(path, groups, header.tensors)
    groups, repeats = set_aside_repeats(groups)
    check_unique(path, groups)
    _check_sizes(path, groups, family, table, lenient=asked)
    tensors = _read(path, header, [*groups, *repeats])
    present = {group.part for group in groups}
    configs = {part: read_peft_config(path, header.metadata, part) for part in present}
    parts = build(path, groups, tensors, configs)
    _check_repeats(path, groups, repeats, tensors, configs)
    dropped |= {match.key: refusals.AGAIN for group in repeats for match in group.keys.values()}
    parts.setdefault(DENOISER, Contents())
    reports: dict[Part, LoadReport] = {
        part: make_report(_format(groups, part), {part: contents}, {}, family, of=part)
        for part, contents in parts.items()
        if part != DENOISER
    }
    reports[DENOISER] = make_report(_format(groups, DENOISER), parts, dropped, family)
    return Loaded(family, parts, reports)


def load_first_layer(path: Path) -> tuple[str, LayerDelta] | None:
    """Read one layer of a LoRA file, the first in the order of the model's layers.

    Args:
        path: A safetensors file of any format; the rest of it is not looked at.

    Returns:
        The canonical name and the change; None where no weight of the denoiser is changed.

    Raises:
        LoRAFormatError: The file is damaged, or this layer cannot be used.
    """
    header = read_header(path)
    family, table = _family(path, header, None, False)
    groups, _ = group_keys(path, match_keys(header.tensors, table).values())
    groups = [g for g in groups if g.algorithm and g.part == DENOISER and not g.row.is_norm]
    layers = {layer for group in groups for layer in group.layers}
    if not layers:
        return None
    first = min(layers, key=table.sort_key)
    chosen = [group for group in groups if first in group.layers]
    check_groups(path, chosen, header.tensors)
    chosen, _ = set_aside_repeats(chosen)
    check_unique(path, chosen)
    _check_sizes(path, chosen, family, table)
    tensors = _read(path, header, chosen)
    configs = {DENOISER: read_peft_config(path, header.metadata)}
    return first, build(path, chosen, tensors, configs)[DENOISER].layers[first]


def _family(
    path: Path, header: Header, wanted: str | None, text_encoder_only: bool
) -> tuple[str, LayerTable]:
    """The family of a file, found or checked.

    Raises:
        LoRAFormatError: It is for another model, unknown, or ambiguous; the error says what to do.
    """
    found = settled(path, detect_family(header.tensors, header.metadata, wanted))
    if wanted is not None:
        table = detect.layer_table(wanted)
        other = found.family is not None and not detect.shares_layers(found.family, wanted)
        if (
            other
            or (found.family is None and found.title)
            or (found.candidates and wanted not in found.families)
        ):
            what = found.title or " or ".join(found.candidates)
            raise FamilyError(
                f"{shown(path)} is an adapter for {what}, not for {detect.title(wanted)}; "
                f"use one made for {detect.title(wanted)}.",
                found.title,
                found.candidates,
            )
        return wanted, table
    if found.family is not None:
        return found.family, detect.layer_table(found.family)
    if found.families:
        # A damaged file is damaged whatever it is for.
        table = detect.layer_table(found.families[0])
        groups, _ = _groups(path, header, found.families[0], table)
        check_groups(path, groups, header.tensors)
        check_unique(path, set_aside_repeats(groups)[0])
    if (error := family_error(path, found)) is not None:
        raise error
    return _unknown(path, header, text_encoder_only)


def _unknown(path: Path, header: Header, text_encoder_only: bool) -> tuple[str, LayerTable]:
    """The family of a file of text encoders; an error for all other files that nothing tells.

    Text encoders are shared between families, so that the first that has all of them is taken.
    """
    counted = {
        name: sum(m.part != DENOISER for m in match_keys(header.tensors, table).values())
        for name, table in detect.tables().items()
    }
    name = max(counted, key=lambda name: counted[name])
    if counted[name] and text_encoder_only:
        return name, detect.layer_table(name)
    if counted[name]:
        raise LoRAFormatError(
            f"{shown(path)} changes only text encoders ({counted[name]} keys) and no layer of a "
            "denoiser; load it with text_encoder_only=True, or use another LoRA."
        )
    fields = ("modelspec.architecture", "ss_base_model_version")
    named = next((header.metadata[field] for field in fields if header.metadata.get(field)), None)
    if named is not None and detect.detect({}, header.metadata).title == "":
        raise FamilyError(
            f"{shown(path)} is an adapter for {shown(named)}, not for {supported_titles()}; "
            "use one made for one of these.",
            named,
        )
    dropped = {key: refusals.reason_for(key, "any known base model") for key in header.tensors}
    raise LoRAFormatError(
        f"{shown(path)} changes no layer of any known base model ({_listed(dropped)}); use a LoRA "
        f"made for {supported_titles()}."
    )


def _groups(
    path: Path, header: Header, family: str, table: LayerTable
) -> tuple[list[Group], dict[str, str]]:
    """The modules of a file, and why other keys are not used."""
    matches = match_keys(header.tensors, table)
    model = detect.title(family)
    dropped = {key: refusals.reason_for(key, model) for key in header.tensors if key not in matches}
    groups, stray = group_keys(path, [matches[key] for key in sorted(matches)])
    return groups, dropped | stray


def _read(path: Path, header: Header, groups: Iterable[Group]) -> dict[str, Tensor]:
    """Read the tensors of modules and check their values."""
    listed = list(groups)
    keys = [match.key for group in listed for match in group.keys.values()]
    tensors = read_tensors(path, header, keys)
    _check_finite(path, listed, tensors)
    return tensors


def _format(groups: Iterable[Group], part: Part) -> str:
    """Names of the formats of one model's keys, the most frequent first."""
    names = Counter(
        match.format for group in groups for match in group.keys.values() if group.part == part
    )
    return "+".join(name for name, _ in names.most_common())


def _refuse(path: Path, refusal: refusals.Refusal | None) -> None:
    if refusal is not None:
        raise LoRAFormatError(f"{shown(path)} is {refusal.kind}; {refusal.advice}.")


def _check_sizes(
    path: Path, groups: Iterable[Group], family: str, table: LayerTable, lenient: bool = False
) -> None:
    """Check layers against each other and against the ratios that the family has."""
    listed = [group for group in groups if group.part == DENOISER and not group.row.is_norm]
    model = detect.title(family)
    shapes: dict[str, tuple[int, int]] = {}
    for group in listed:
        for place in group.places if group.algorithm else ():
            shape = (place.out_features, group.shape[1])
            _agree(path, group, place.layer, shape, shapes.setdefault(place.layer, shape))
            if max(shape) > MAX_FEATURES:
                raise LoRAFormatError(
                    f"{shown(path)} makes layer {place.layer} {list(shape)}, larger than any "
                    f"layer of {model}; use one made for {model}."
                )
    for group in listed:
        for place in group.places if not group.algorithm else ():
            if place.layer in shapes:
                shape = (place.out_features, shapes[place.layer][1])
                _agree(path, group, place.layer, shape, shapes[place.layer])
    modules = {g.first_key: (g.module, g.shape) for g in listed if g.algorithm}
    problem = detect.misfit(table, list(modules.values()), lenient)
    if problem is not None:
        raise LoRAFormatError(
            f"{shown(path)} {problem.format(model=model)}; it may be for another model: use one "
            f"made for {model}."
        )
    for module, shape in modules.values():
        refused = detect.refused_width(table, module, shape)
        if refused is not None:
            _refuse(path, refusals.Refusal(*refused))


def _agree(
    path: Path, group: Group, layer: str, shape: tuple[int, int], other: tuple[int, int]
) -> None:
    if shape != other:
        raise bad_key(
            path,
            _row_key(group),
            f"makes layer {layer} {list(shape)}, but other keys make it {list(other)}",
        )


def _check_repeats(
    path: Path,
    groups: Iterable[Group],
    repeats: Iterable[Group],
    tensors: Mapping[str, Tensor],
    configs: Mapping[Part, PeftConfig],
) -> None:
    """Make sure that modules that were set aside say the same as those that are used.

    Raises:
        LoRAFormatError: They do not, so that nobody can tell which is meant.
    """
    for repeat in repeats:
        again = build(path, [repeat], tensors, configs)[repeat.part].layers
        wanted = set(repeat.slices)
        own = [g for g in groups if g.algorithm and not wanted.isdisjoint(g.slices)]
        used = build(path, own, tensors, configs)[repeat.part].layers
        for layer, delta in again.items():
            if not _alike(delta, used[layer]):
                raise twice(path, own[0].first_key, repeat.first_key)


def _alike(one: LayerDelta, other: LayerDelta) -> bool:
    """Whether two changes of a layer are the same but for rounding."""
    if one.needs_base or other.needs_base or one.shape != other.shape:
        return False
    left, right = one.dense(), other.dense()
    return bool((left - right).norm() <= _ROUNDING * right.norm())


def _check_finite(path: Path, groups: Iterable[Group], tensors: Mapping[str, Tensor]) -> None:
    for group in groups:
        for role, match in group.keys.items():
            # Where alpha has no effect, trainers write anything there, such as ten billions.
            if role == "alpha" and not group.has_scale:
                continue
            tensor = tensors[match.key]
            if not is_finite(tensor, LARGEST_VALUE):
                large = f"values above {LARGEST_VALUE:g}"
                what = large if is_finite(tensor) else "NaN or infinite values"
                raise bad_key(path, match.key, f"holds {what}; the training went wrong")


def _nothing_matched(
    path: Path, family: str, dropped: Mapping[str, str], groups: Iterable[Group]
) -> LoRAFormatError:
    model = detect.title(family)
    text_keys = [match for group in groups for match in group.keys.values()]
    if text_keys:
        return LoRAFormatError(
            f"{shown(path)} changes only text encoders ({len(text_keys)} keys) and no layer of "
            f"{model}'s denoiser; load it with text_encoder_only=True, or use another LoRA."
        )
    return LoRAFormatError(
        f"{shown(path)} changes no layer of {model} ({_listed(dropped)}); use a LoRA made for "
        f"{model}."
    )


def _listed(dropped: Mapping[str, str]) -> str:
    """The most frequent reasons and the first keys."""
    reasons = Counter(dropped.values()).most_common(3)
    listed = "; ".join(f"{count} x {reason}" for reason, count in reasons)
    first = ", ".join(repr(shown(key, 80)) for key in list(dropped)[:3])
    return f"{listed}; first keys: {first}"
