"""From a LoRA file to weight changes by canonical layer.

Every key is matched or dropped with a reason, and everything that would make a layer wrong is an
error that names the key: a factor without its partner, shapes that do not fit, NaN, integers. The
header alone decides; tensors are read once, when nothing can be wrong with them but their values.

From keys to modules: which tensors belong together, checked from the header alone.

From modules of a file to weight changes by layer.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

from autolora.errors import LoRAFormatError, shown
from autolora.families.flux1 import refusals
from autolora.families.flux1.dialects import Part, Target
from autolora.families.flux1.tables import (
    LayerType,
    fused_out_features,
    layer_sort_key,
    output_slices,
    parse_layer,
)
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
)
from autolora.lora.formats import KeyMatch, match_keys
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
_CORES = ("lokr_t1", "lokr_t2", "hada_t1", "hada_t2")
RANKED = ("B", "lokr_w2_b", "lokr_w1_b", "hada_w1_b")
"""Factors whose inner size is the rank that alpha is divided by, the first that is there."""

_NAMES: Mapping[str, str] = {"A": "factor A (down)", "B": "factor B (up)"}


@dataclass
class Group:
    """The tensors of one module of the file.

    Attributes:
        target: The layer, and the output slices of it, that the module stands for.
        keys: The key of each tensor by role.
        algorithm: ``lora``, ``lokr``, ``loha`` or ``diff``; empty when no tensor changes a weight.
        shape: Output rows and input channels of the module; set by `check_groups`.
    """

    target: Target
    keys: dict[str, KeyMatch] = field(default_factory=dict)
    algorithm: str = ""
    shape: tuple[int, int] = (0, 0)

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
    if role in _LORA:
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
    groups: dict[tuple[Target, str], Group] = {}
    adapters: dict[str, str] = {}
    for match in matches:
        group = groups.setdefault((match.target, match.prefix + match.path), Group(match.target))
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
        groups: Its modules; their shape is set.
        tensors: Element type and shape by key.

    Raises:
        LoRAFormatError: A tensor lacks its partner, does not fit it, or is no factor at all.
    """
    weights: dict[tuple[str, str, str], str] = {}
    biases: dict[tuple[str, str, str], str] = {}
    for group in groups:
        for role, match in group.keys.items():
            _check_tensor(path, match.key, role, tensors[match.key])
        if group.algorithm:
            _check_complete(path, group)
            group.shape = _module_shape(path, group, tensors)
        _check_vectors(path, group, tensors)
        for seen, used in ((weights, bool(group.algorithm)), (biases, "diff_b" in group.keys)):
            for name in slice_names(group.target) if used else ():
                place = (group.target.part, group.target.layer, name)
                earlier = seen.setdefault(place, group.first_key)
                if earlier != group.first_key:
                    raise twice(path, earlier, group.first_key)


def layer_type(target: Target) -> LayerType | None:
    """The kind of linear layer of the transformer, None for other targets."""
    layer = parse_layer(target.layer) if target.part == "dit" else None
    return None if layer is None else layer.type


def slice_names(target: Target) -> tuple[str, ...]:
    """The output slices of a target, all of the layer's where it names none."""
    kind = layer_type(target)
    return target.slices or (("",) if kind is None else tuple(name for name, _ in kind.slices))


def layer_rows(path: Path, group: Group) -> int:
    """Output channels of the whole layer that a module is part of.

    Args:
        path: The file, for errors.
        group: The module.

    Returns:
        Number of output channels.

    Raises:
        LoRAFormatError: The module's rows cannot be those slices of the layer.
    """
    kind = layer_type(group.target)
    if not group.target.slices or kind is None:
        return group.shape[0]
    try:
        return fused_out_features(kind, group.target.slices, group.shape[0])
    except ValueError as error:
        raise bad_key(path, _row_key(group), f"does not fit: {error}") from error


def _row_key(group: Group) -> str:
    """The key whose tensor has the module's rows, for errors."""
    return group.key("B") if "B" in group.keys else group.first_key


def _check_tensor(path: Path, key: str, role: str, info: TensorInfo) -> None:
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
    if role in _CORES:
        if len(info.shape) < 2 or math.prod(info.shape[2:]) != 1:
            raise bad_key(
                path, key, f"has shape {list(info.shape)}, a core of a convolution; FLUX.1 has none"
            )
    elif _algorithm(role) and len(info.shape) != 2 and role != "diff":
        raise bad_key(path, key, f"has shape {list(info.shape)}; factors of a linear layer are 2-D")


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
    """Output rows and input channels of a module that changes a weight."""
    if group.algorithm == "diff":
        shape = tensors[group.key("diff")].shape
        if len(shape) != (1 if group.target.is_norm else 2):
            kind = "normalization" if group.target.is_norm else "linear"
            raise bad_key(
                path, group.key("diff"), f"has shape {list(shape)}, which is no {kind} weight"
            )
        return shape[0], shape[-1]
    if group.algorithm == "lora":
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
        p, q = tensors[group.key(side)].shape
        return p, q
    core = side.replace("_w", "_t")
    if core not in group.keys:
        return _product_shape(path, group, tensors, f"{side}_a", f"{side}_b")
    a, b = (tensors[group.key(f"{side}_{letter}")].shape for letter in "ab")
    if tensors[group.key(core)].shape[:2] != (a[0], b[0]):
        raise bad_key(
            path,
            group.key(core),
            f"has shape {list(tensors[group.key(core)].shape)}, which does not fit factors of "
            f"shape {list(a)} and {list(b)}",
        )
    return a[1], b[1]


def _product_shape(
    path: Path, group: Group, tensors: Mapping[str, TensorInfo], left: str, right: str
) -> tuple[int, int]:
    up, down = (tensors[group.key(role)].shape for role in (left, right))
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
        if group.algorithm == "diff" or magnitude_axis(shape, group.shape) is None:
            raise bad_key(
                path,
                group.key("magnitude"),
                f"has shape {list(shape)}, which is no DoRA magnitude of a weight of shape "
                f"{list(group.shape)}",
            )


def magnitude_axis(shape: tuple[int, ...], module: tuple[int, int]) -> str | None:
    """Find what DoRA magnitudes are lengths of.

    Args:
        shape: Their shape in the file.
        module: Output rows and input channels of the module.

    Returns:
        ``rows``, ``columns``, or None when they fit neither.
    """
    rows, columns = module
    if shape in ((rows, 1), (rows,)):
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
    """
    found: dict[Part, Contents] = {}
    shapes: dict[tuple[Part, str], tuple[int, int]] = {}
    pieces: dict[tuple[Part, str], list[Piece]] = {}
    for group in groups:
        part, layer = group.target.part, group.target.layer
        contents = found.setdefault(part, Contents())
        contents.matched |= {match.key: layer for match in group.keys.values()}
        if group.target.is_norm:
            contents.norms[layer] = tensors[group.key("diff")].to(torch.float32)
            continue
        rows, out_features = _rows(path, group)
        scale = _scale(group, tensors, configs.get(part, PeftConfig()))
        if group.algorithm:
            shapes[part, layer] = (out_features, group.shape[1])
            piece = Piece(_change(group, tensors, scale), rows, _magnitude(group, tensors))
            pieces.setdefault((part, layer), []).append(piece)
        _add_biases(group, tensors, scale, rows, out_features, contents.biases)
    for (part, layer), parts in pieces.items():
        found[part].layers[layer] = LayerDelta(*shapes[part, layer], tuple(parts))
    return found


def _rows(path: Path, group: Group) -> tuple[tuple[slice, ...], int]:
    """Output rows that a module stands for, and how many the whole layer has."""
    out_features = layer_rows(path, group)
    kind = layer_type(group.target)
    if not group.target.slices or kind is None:
        return (slice(0, out_features),), out_features
    slices = output_slices(kind, out_features)
    return tuple(slices[name] for name in slice_names(group.target)), out_features


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
    return peft.scale(match.path, rank) if match.format.reads_peft else 1.0


def _whole_scale(match: KeyMatch, peft: PeftConfig) -> float:
    return peft.whole_scale(match.path) if match.format.reads_peft else 1.0


def _change(group: Group, tensors: Mapping[str, Tensor], scale: float) -> Change:
    def tensor(role: str) -> Tensor | None:
        return tensors[group.key(role)] if role in group.keys else None

    def side(prefix: str, number: int) -> Matrix:
        name = f"{prefix}_w{number}"
        core = tensor(f"{prefix}_t{number}")
        return Matrix(tensor(name), tensor(f"{name}_a"), tensor(f"{name}_b"), core)

    if group.algorithm == "lora":
        return LowRank(tensors[group.key("A")], tensors[group.key("B")], scale)
    if group.algorithm == "lokr":
        return Kronecker(side("lokr", 1), side("lokr", 2), scale)
    if group.algorithm == "loha":
        return Hadamard(side("hada", 1), side("hada", 2), scale)
    return Full(tensors[group.key("diff")])


def _magnitude(group: Group, tensors: Mapping[str, Tensor]) -> Magnitude | None:
    if "magnitude" not in group.keys:
        return None
    values = tensors[group.key("magnitude")]
    axis = magnitude_axis(tuple(values.shape), group.shape)
    return Magnitude(values.flatten(), cast(Literal["rows", "columns"], axis))


def _add_biases(
    group: Group,
    tensors: Mapping[str, Tensor],
    scale: float,
    rows: tuple[slice, ...],
    out_features: int,
    biases: dict[str, Tensor],
) -> None:
    """Add a module's bias (PEFT's is part of B, so scaled like it) to that of its layer."""
    for role, factor in (("bias", scale), ("diff_b", 1.0)):
        if role not in group.keys:
            continue
        bias = biases.setdefault(group.target.layer, torch.zeros(out_features))
        values = tensors[group.key(role)].flatten().to(torch.float64) * factor
        parts = values.split([where.stop - where.start for where in rows])
        for where, part in zip(rows, parts, strict=True):
            bias[where] += part.to(torch.float32)


@dataclass(frozen=True)
class Loaded:
    """A file that was read.

    Attributes:
        parts: What it changes, by model; always with an entry for the transformer.
        reports: What became of every key, as ``dit``; of each text encoder's keys alone.
    """

    parts: Mapping[Part, Contents]
    reports: Mapping[Part, LoadReport]


def load_file(path: Path, text_encoder_only: bool = False) -> Loaded:
    """Read a LoRA file.

    Args:
        path: A safetensors file of any format in `autolora.lora.formats`.
        text_encoder_only: Also accept a file that changes text encoders and no layer of the
            transformer.

    Returns:
        Weight changes by model and canonical layer name, and what became of every key.

    Raises:
        LoRAFormatError: The file is damaged, for another base model, ambiguous, or without any
            layer that can be used.
    """
    header = read_header(path)
    matches = match_keys(header.tensors)
    dropped = {key: refusals.reason_for(key) for key in header.tensors if key not in matches}
    _refuse(path, refusals.refusal(dropped, matches))
    groups, stray = group_keys(path, [matches[key] for key in sorted(matches)])
    dropped |= stray
    if not any(text_encoder_only or group.target.part == "dit" for group in groups):
        raise _nothing_matched(path, header, dropped, groups)
    _refuse(path, refusals.refusal_by_header(header.metadata))
    check_groups(path, groups, header.tensors)
    _check_sizes(path, groups)
    keys = [match.key for group in groups for match in group.keys.values()]
    tensors = read_tensors(path, header, keys)
    _check_finite(path, groups, tensors)
    present = {group.target.part for group in groups}
    configs = {part: read_peft_config(path, header.metadata, part) for part in present}
    parts = build(path, groups, tensors, configs)
    parts.setdefault("dit", Contents())
    reports: dict[Part, LoadReport] = {
        part: make_report(_format(groups, part), {part: contents}, {}, of=part)
        for part, contents in parts.items()
        if part != "dit"
    }
    reports["dit"] = make_report(_format(groups, "dit"), parts, dropped)
    return Loaded(parts, reports)


def load_first_layer(path: Path) -> tuple[str, LayerDelta] | None:
    """Read one layer of a LoRA file, the first in the order of `layer_sort_key`.

    Args:
        path: A safetensors file of any format; the rest of it is not looked at.

    Returns:
        The canonical name and the change; None where no weight of the transformer is changed.

    Raises:
        LoRAFormatError: The file is damaged, or this layer cannot be used.
    """
    header = read_header(path)
    groups, _ = group_keys(path, match_keys(header.tensors).values())
    layers = {g.target.layer for g in groups if g.algorithm and g.target.part == "dit"}
    layers = {layer for layer in layers if parse_layer(layer) is not None}
    if not layers:
        return None
    first = min(layers, key=layer_sort_key)
    chosen = [g for g in groups if g.target.part == "dit" and g.target.layer == first]
    check_groups(path, chosen, header.tensors)
    _check_sizes(path, chosen)
    keys = [match.key for group in chosen for match in group.keys.values()]
    tensors = read_tensors(path, header, keys)
    _check_finite(path, chosen, tensors)
    configs: dict[Part, PeftConfig] = {"dit": read_peft_config(path, header.metadata)}
    return first, build(path, chosen, tensors, configs)["dit"].layers[first]


def _format(groups: Iterable[Group], part: Part) -> str:
    """Names of the formats of one model's keys, the most frequent first."""
    names = Counter(
        match.format.name
        for group in groups
        for match in group.keys.values()
        if group.target.part == part
    )
    return "+".join(name for name, _ in names.most_common())


def _refuse(path: Path, refusal: refusals.Refusal | None) -> None:
    if refusal is not None:
        raise LoRAFormatError(f"{shown(path)} is {refusal.kind}; {refusal.advice}.")


def _check_sizes(path: Path, groups: Iterable[Group]) -> None:
    """Check layers against each other and against FLUX.1, whose names other models share."""
    shapes: dict[str, tuple[int, int]] = {}
    highest: dict[str, int] = {}
    for group in groups:
        layer = parse_layer(group.target.layer) if group.target.part == "dit" else None
        if layer is not None and group.algorithm:
            shape = (layer_rows(path, group), group.shape[1])
            _agree(path, group, shape, shapes.setdefault(layer.name, shape))
            if layer.block is not None:
                highest[layer.kind] = max(highest.get(layer.kind, 0), layer.block)
    for group in groups:
        if not group.algorithm and group.target.layer in shapes:
            out_features, in_features = shapes[group.target.layer]
            _agree(path, group, (layer_rows(path, group), in_features), (out_features, in_features))
    width: int | None = None
    for name, (out_features, in_features) in shapes.items():
        layer = parse_layer(name)
        assert layer is not None
        if max(out_features, in_features) > MAX_FEATURES:
            raise LoRAFormatError(
                f"{shown(path)} makes layer {name} [{out_features}, {in_features}], larger than "
                "any layer of FLUX.1; use one made for FLUX.1."
            )
        if layer.type.in_ratio is not None:
            width = in_features // layer.type.in_ratio
            if in_features * layer.type.out_ratio != out_features * layer.type.in_ratio:
                raise LoRAFormatError(
                    f"{shown(path)} makes layer {name} [{out_features}, {in_features}], where "
                    f"FLUX.1 has {layer.type.out_ratio} outputs to {layer.type.in_ratio} inputs; "
                    "it may be for another model, such as FLUX.2: use one made for FLUX.1."
                )
    _refuse(path, refusals.refusal_by_size(width, highest))
    if refusals.is_control_input(width, shapes.get("x_embedder", (0, 0))[1]):
        _refuse(path, refusals.CONTROL)


def _agree(path: Path, group: Group, shape: tuple[int, int], other: tuple[int, int]) -> None:
    if shape != other:
        raise bad_key(
            path,
            group.key("B") if "B" in group.keys else group.first_key,
            f"makes layer {group.target.layer} {list(shape)}, but other keys make it {list(other)}",
        )


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
    path: Path, header: Header, dropped: Mapping[str, str], groups: Iterable[Group]
) -> LoRAFormatError:
    if not header.tensors:
        return LoRAFormatError(f"{shown(path)} holds no tensors; download or save it again.")
    text_keys: list[KeyMatch] = [match for group in groups for match in group.keys.values()]
    if text_keys:
        return LoRAFormatError(
            f"{shown(path)} changes only text encoders ({len(text_keys)} keys) and no layer of "
            "FLUX.1's transformer; load it with text_encoder_only=True, or use a LoRA for FLUX.1."
        )
    refusal = refusals.refusal_by_header(header.metadata)
    _refuse(path, refusal)
    model = refusals.header_model(header.metadata)
    if model is not None and "flux" not in model.lower():
        return LoRAFormatError(
            f"{shown(path)} is an adapter for {shown(model)}, not for FLUX.1; "
            "use one made for FLUX.1."
        )
    reasons = Counter(dropped.values()).most_common(3)
    listed = "; ".join(f"{count} x {reason}" for reason, count in reasons)
    first = ", ".join(repr(shown(key, 80)) for key in list(dropped)[:3])
    return LoRAFormatError(
        f"{shown(path)} changes no layer of FLUX.1 ({listed}; first keys: {first}); "
        "use a LoRA made for FLUX.1."
    )
