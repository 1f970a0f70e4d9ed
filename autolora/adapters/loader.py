"""From a LoRA file to weight changes by canonical layer.

Every key is matched or dropped with a reason, and everything that would make a layer wrong is an
error that names the key: a factor without its partner, shapes that do not fit, NaN, integers. The
header alone decides; tensors are read once, when nothing can be wrong with them but their values.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from autolora.adapters import unused
from autolora.adapters.building import Contents, build
from autolora.adapters.deltas import LayerDelta, is_finite
from autolora.adapters.formats import KeyMatch, match_keys
from autolora.adapters.grouping import Group, bad_key, check_groups, group_keys, layer_rows
from autolora.adapters.namings import Part
from autolora.adapters.peft_config import PeftConfig, read_peft_config
from autolora.adapters.reader import LARGEST_VALUE, MAX_FEATURES, Header, read_header, read_tensors
from autolora.adapters.report import LoadReport, make_report
from autolora.errors import LoRAFormatError, shown
from autolora.flux.layers import layer_sort_key, parse_layer


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
        path: A safetensors file of any format in `autolora.adapters.formats`.
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
    dropped = {key: unused.reason_for(key) for key in header.tensors if key not in matches}
    _refuse(path, unused.refusal(dropped, matches))
    groups, stray = group_keys(path, [matches[key] for key in sorted(matches)])
    dropped |= stray
    if not any(text_encoder_only or group.target.part == "dit" for group in groups):
        raise _nothing_matched(path, header, dropped, groups)
    _refuse(path, unused.refusal_by_header(header.metadata))
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


def _refuse(path: Path, refusal: unused.Refusal | None) -> None:
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
    _refuse(path, unused.refusal_by_size(width, highest))
    if unused.is_control_input(width, shapes.get("x_embedder", (0, 0))[1]):
        _refuse(path, unused.CONTROL)


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
    refusal = unused.refusal_by_header(header.metadata)
    _refuse(path, refusal)
    model = unused.header_model(header.metadata)
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
