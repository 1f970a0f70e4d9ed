"""From keys to modules: which tensors belong together, checked from the header alone."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from autolora.adapters import unused
from autolora.adapters.formats import KeyMatch
from autolora.adapters.namings import Target
from autolora.adapters.reader import FLOAT_DTYPES, NUMBER_DTYPES, TensorInfo
from autolora.errors import LoRAFormatError, shown
from autolora.flux.layers import LayerType, fused_out_features, parse_layer

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
            stray |= {match.key: unused.STRAY[role] for role, match in group.keys.items()}
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
