"""From a LoRA file to weight changes by canonical layer.

Every key is matched or dropped with a reason, and everything that would make a layer wrong is an
error that names the key: a factor without its partner, shapes that do not fit, NaN, integers.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from torch import Tensor

from autolora.adapters import unused
from autolora.adapters.deltas import LayerDelta, LowRank, is_finite
from autolora.adapters.formats import KeyMatch, Role, Target, match_keys
from autolora.adapters.peft_config import PeftConfig, read_peft_config
from autolora.adapters.reader import (
    FLOAT_DTYPES,
    NUMBER_DTYPES,
    Header,
    TensorInfo,
    read_header,
    read_tensors,
)
from autolora.adapters.report import LoadReport
from autolora.errors import LoRAFormatError, shown
from autolora.flux.layers import LayerType, fused_out_features, output_slices, parse_layer


@dataclass
class _Group:
    """Keys that make one piece: A, B and perhaps alpha."""

    target: Target
    keys: dict[Role, KeyMatch] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return "A" in self.keys and "B" in self.keys


def load_layers(path: Path) -> tuple[dict[str, LayerDelta], LoadReport]:
    """Read a LoRA file.

    Args:
        path: A safetensors file of any format in `autolora.adapters.formats.FORMATS`.

    Returns:
        Weight changes by canonical layer name, and what became of every key.

    Raises:
        LoRAFormatError: The file is damaged, for another base model, ambiguous, or without any
            layer that can be used.
    """
    header = read_header(path)
    matches, dropped = _match_keys(header.tensors)
    other = unused.other_model(key for key, why in dropped.items() if why != unused.TEXT_ENCODER)
    if other is not None:
        raise _other_model(path, other)
    groups = _group(path, matches)
    for group in [group for group in groups.values() if not group.keys.keys() & {"A", "B"}]:
        dropped[group.keys["alpha"].key] = unused.NO_FACTORS
        del groups[group.target]
    if not groups:
        raise _nothing_matched(path, header, dropped)
    _check_groups(path, groups.values(), header.tensors)
    keys = [match.key for group in groups.values() for match in group.keys.values()]
    tensors = read_tensors(path, header, keys)
    _check_finite(path, tensors)
    layers = _build_layers(path, groups.values(), tensors, read_peft_config(path, header.metadata))
    return layers, _report(groups.values(), dropped, layers)


def _match_keys(keys: Collection[str]) -> tuple[list[KeyMatch], dict[str, str]]:
    """Divide keys into those that name factors and those that do not, with the reason."""
    dropped = {key: unused.TEXT_ENCODER for key in keys if unused.is_text_encoder(key)}
    matches = match_keys(key for key in keys if key not in dropped)
    dropped |= {
        key: unused.reason_for(key) for key in keys if key not in dropped and key not in matches
    }
    return [matches[key] for key in sorted(matches)], dropped


def _group(path: Path, matches: Iterable[KeyMatch]) -> dict[Target, _Group]:
    groups: dict[Target, _Group] = {}
    adapters: dict[str, str] = {}
    for match in matches:
        group = groups.setdefault(match.target, _Group(match.target))
        earlier = group.keys.setdefault(match.role, match)
        if match.adapter is not None:
            adapters.setdefault(match.adapter, match.key)
        if len(adapters) > 1:
            names = " and ".join(map(repr, map(shown, sorted(adapters))))
            raise LoRAFormatError(
                f"{shown(path)} holds several adapters, {names}; save each to its own file."
            )
        if earlier is not match:
            raise _twice(path, earlier.key, match.key)
    return groups


def _check_groups(path: Path, groups: Iterable[_Group], tensors: Mapping[str, TensorInfo]) -> None:
    """Check from the header alone, before data is read."""
    whole_or_slice: dict[tuple[str, str], str] = {}
    for group in groups:
        for role, match in group.keys.items():
            _check_tensor(path, match.key, role, tensors[match.key])
        if not group.complete:
            (present,) = group.keys.keys() & {"A", "B"}
            missing = "B (up)" if present == "A" else "A (down)"
            raise _bad_key(
                path,
                group.keys[present].key,
                f"has no partner: factor {missing} is not in the file",
            )
        down, up = (tensors[group.keys[role].key].shape for role in ("A", "B"))
        if down[0] != up[1]:
            raise _bad_key(
                path,
                group.keys["B"].key,
                f"has shape {list(up)}, which does not fit A of shape {list(down)}: "
                "the ranks differ",
            )
        for name in _slice_names(group.target):
            earlier = whole_or_slice.setdefault((group.target.layer, name), group.keys["B"].key)
            if earlier != group.keys["B"].key:
                raise _twice(path, earlier, group.keys["B"].key)


def _layer_type(target: Target) -> LayerType:
    layer = parse_layer(target.layer)
    assert layer is not None, "the format tables name canonical layers only"
    return layer.type


def _slice_names(target: Target) -> tuple[str, ...]:
    """The output slices of a target, all of the layer's where it names none."""
    return target.slices or tuple(name for name, _ in _layer_type(target).slices)


def _check_tensor(path: Path, key: str, role: Role, info: TensorInfo) -> None:
    if role == "alpha":
        if math.prod(info.shape) != 1:
            raise _bad_key(path, key, f"has shape {list(info.shape)}; alpha is one number")
        if info.dtype not in NUMBER_DTYPES:
            raise _bad_key(path, key, f"has dtype {info.dtype}; alpha is a number")
        return
    if info.dtype not in FLOAT_DTYPES:
        raise _bad_key(path, key, f"has dtype {info.dtype}; factors are floating-point")
    if 0 in info.shape:
        raise _bad_key(path, key, f"has shape {list(info.shape)}, which holds no values")
    if len(info.shape) != 2:
        raise _bad_key(
            path, key, f"has shape {list(info.shape)}; factors of a linear layer are 2-D"
        )


def _check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if not is_finite(tensor):
            raise _bad_key(path, key, "holds NaN or infinite values; the training went wrong")


def _build_layers(
    path: Path, groups: Iterable[_Group], tensors: Mapping[str, Tensor], peft: PeftConfig
) -> dict[str, LayerDelta]:
    shapes: dict[str, tuple[int, int]] = {}
    pieces: dict[str, list[LowRank]] = {}
    for group in groups:
        down, up = (tensors[group.keys[role].key] for role in ("A", "B"))
        layer = group.target.layer
        rows, out_features = _rows(path, group, int(up.shape[0]))
        shape = (out_features, int(down.shape[1]))
        if shapes.setdefault(layer, shape) != shape:
            raise _bad_key(
                path,
                group.keys["B"].key,
                f"makes layer {layer} {list(shape)}, but other keys make it {list(shapes[layer])}",
            )
        scale = _scale(group, tensors, peft, int(down.shape[0]))
        pieces.setdefault(layer, []).append(LowRank(down, up, scale, rows))
    return {layer: LayerDelta(*shapes[layer], tuple(parts)) for layer, parts in pieces.items()}


def _rows(path: Path, group: _Group, rows: int) -> tuple[tuple[slice, ...], int]:
    """Output rows that a piece stands for, and how many the whole layer has."""
    if not group.target.slices:
        return (slice(0, rows),), rows
    layer_type = _layer_type(group.target)
    try:
        out_features = fused_out_features(layer_type, group.target.slices, rows)
    except ValueError as error:
        raise _bad_key(path, group.keys["B"].key, f"does not fit: {error}") from error
    slices = output_slices(layer_type, out_features)
    return tuple(slices[name] for name in group.target.slices), out_features


def _scale(group: _Group, tensors: Mapping[str, Tensor], peft: PeftConfig, rank: int) -> float:
    if "alpha" in group.keys:
        return float(tensors[group.keys["alpha"].key].item()) / rank
    match = group.keys["A"]
    return peft.scale(match.path, rank) if match.format.peft_header else 1.0


def _report(
    groups: Iterable[_Group], dropped: Mapping[str, str], layers: Mapping[str, LayerDelta]
) -> LoadReport:
    matched = {match.key: match.target.layer for group in groups for match in group.keys.values()}
    formats = Counter(match.format.name for group in groups for match in group.keys.values())
    pieces = list(chain.from_iterable(delta.pieces for delta in layers.values()))
    ranks = [piece.rank for piece in pieces]
    scales = [piece.scale for piece in pieces]
    return LoadReport(
        format="+".join(name for name, _ in formats.most_common()),
        matched=dict(sorted(matched.items())),
        dropped=dict(sorted(dropped.items())),
        layers=len(layers),
        ranks=(min(ranks), max(ranks)),
        scales=(min(scales), max(scales)),
    )


def _bad_key(path: Path, key: str, problem: str) -> LoRAFormatError:
    return LoRAFormatError(
        f"{shown(path)}: key {shown(key)!r} {problem}; save or download the file again."
    )


def _twice(path: Path, first: str, second: str) -> LoRAFormatError:
    return LoRAFormatError(
        f"{shown(path)} gives the same weights twice, as {shown(first)!r} and {shown(second)!r}; "
        "keep one of them."
    )


def _other_model(path: Path, model: str) -> LoRAFormatError:
    return LoRAFormatError(
        f"{shown(path)} is an adapter for {model}, not for FLUX.1; use one made for FLUX.1."
    )


def _nothing_matched(path: Path, header: Header, dropped: Mapping[str, str]) -> LoRAFormatError:
    if not dropped:
        return LoRAFormatError(f"{shown(path)} holds no tensors; download or save it again.")
    model = unused.header_model(header.metadata)
    if model is not None and "flux" not in model.lower():
        return _other_model(path, shown(model))
    reasons = Counter(dropped.values()).most_common(3)
    listed = "; ".join(f"{count} x {reason}" for reason, count in reasons)
    first = ", ".join(repr(shown(key, 80)) for key in list(dropped)[:3])
    return LoRAFormatError(
        f"{shown(path)} changes no layer of FLUX.1 ({listed}; first keys: {first}); "
        "use a LoRA made for FLUX.1."
    )
