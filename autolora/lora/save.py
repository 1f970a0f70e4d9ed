"""Writing LoRA files in the formats that other programs read.

The bytes depend on the content alone: keys and metadata are sorted, so that the same factors give
the same file hash.
"""

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autolora.errors import LoRAFormatError, shown
from autolora.families import detect
from autolora.families.layers import LayerTable, Share, Spelling
from autolora.files import replacing
from autolora.lora.deltas import check_pair, is_finite
from autolora.lora.formats import FORMATS, Format, format_named

_DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}


def save_lora(
    path: str | os.PathLike[str],
    factors: Mapping[str, tuple[Tensor, Tensor]],
    format: str = "kohya",
    *,
    family: str | None = None,
    alpha: float | None = None,
    metadata: Mapping[str, Any] | None = None,
    dtype: torch.dtype | str | None = None,
) -> Path:
    """Write a LoRA file, replacing an old one only when the new one is complete.

    The delta of a layer is ``B @ A``, whatever `alpha` is: with an alpha other than the rank, B is
    divided by the ``alpha / rank`` that readers will multiply by. Formats hold alpha as tensors,
    ``diffusers`` in its header; those without a place for it (``peft``, ``fal``, ``xlabs``,
    ``diffsynth``) are written at scale 1. Where a format divides fused layers, A is copied and B
    sliced; where it fuses layers, A is stacked and B block-diagonal.

    Args:
        path: File to write; missing folders are made.
        factors: ``A [r, in]`` and ``B [out, r]`` by canonical layer name, the scale folded in; A
            of a convolution is ``[r, in * height * width]`` or has the kernel's own dimensions.
        format: A name in `autolora.lora.formats.FORMATS`: ``kohya``, ``diffusers``,
            ``peft``, ``ai-toolkit``, ``fal``, ``xlabs``, ``onetrainer``, ``onetrainer-bfl``,
            ``lycoris``, ``lycoris-bfl``, ``bfl`` or ``diffsynth``.
        family: Name of the base-model family whose layers these are; None finds it from their
            names and sizes.
        alpha: Alpha of every layer; None for the rank of each.
        metadata: Header entries; values that are not text are written as JSON.
        dtype: ``float32``, ``float16`` or ``bfloat16``; None keeps that of the factors.

    Returns:
        The path written.

    Raises:
        LoRAFormatError: Unknown format or layer, or factors that cannot be written.
    """
    entry = format_named(format)
    if entry is None:
        known = ", ".join(known.name for known in FORMATS)
        raise LoRAFormatError(f"Unknown LoRA format {shown(format)!r}; choose one of {known}.")
    if alpha is not None and (alpha == 0 or not math.isfinite(alpha)):
        raise LoRAFormatError(f"Alpha is {alpha}; give a finite number other than 0.")
    if not factors:
        raise LoRAFormatError("There are no factors to write; give at least one layer.")
    target_dtype = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and target_dtype not in _DTYPE_NAMES:
        raise LoRAFormatError(f"Cannot write dtype {dtype}; choose float32, float16 or bfloat16.")
    if family is None:
        family = _family(factors)
    table = detect.layer_table(family)
    tensors: dict[str, Tensor] = {}
    header = {} if metadata is None else dict(metadata)
    peft_ranks: dict[str, int] = {}
    for module, (A, B, kernel) in _modules(Path(path).stem, entry, table, factors).items():
        rank = int(A.shape[0])
        if alpha is not None and entry.alpha != "nowhere":
            B = B.to(torch.float64) / (alpha / rank)
        kept = A.dtype if A.dtype in _DTYPE_NAMES else torch.float32
        if kernel:
            A, B = A.unflatten(1, (-1, *kernel)), B[..., None, None]
        tensors |= _piece_tensors(entry, module, A, B, alpha, target_dtype or kept)
        peft_ranks[module.partition(".")[2]] = rank
    if alpha is not None and entry.alpha == "header":
        component = "unet." if table.unet else "transformer."
        header.setdefault("lora_adapter_metadata", _peft_header(alpha, peft_ranks, component))
    return _write_atomically(Path(path), tensors, header)


def _family(factors: Mapping[str, tuple[Tensor, Tensor]]) -> str:
    """The family whose layers these are.

    Raises:
        LoRAFormatError: None has all of them, or several have.
    """
    shapes = {layer: (int(B.shape[0]), A[0].numel()) for layer, (A, B) in factors.items() if A.ndim}
    found = detect.detect(shapes, {})
    if found.family is not None:
        return found.family
    if found.candidates:
        raise LoRAFormatError(
            f"These layers may be those of {' or '.join(found.candidates)}; say which with family."
        )
    raise LoRAFormatError(
        f"Layer {shown(next(iter(factors)))!r} is of no known base model; only canonical layers "
        "can be written."
    )


_Module = tuple[Tensor, Tensor, tuple[int, ...]]
"""A, B and the kernel of a module of the file."""


def _modules(
    name: str, entry: Format, table: LayerTable, factors: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, _Module]:
    """What a format makes of the layers, by module path."""
    whole: dict[str, _Module] = {}
    parts: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    shares: dict[str, tuple[Share, ...]] = {}
    for layer, (A, B) in factors.items():
        check_pair(name, layer, A, B)
        A = A.flatten(1)
        for module, spelling, piece, kernel, held in _pieces(entry, table, layer, B):
            if len(held) == 1:
                whole[module] = (A, piece, kernel)
            else:
                parts.setdefault(module, {})[spelling.position] = (A, piece)
                shares[module] = held
    return whole | {module: (*_joined(shares[module], parts[module]), ()) for module in parts}


def _joined(
    shares: tuple[Share, ...], parts: Mapping[int, tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Factors of a module that holds several layers; rows of layers without factors are zero."""
    factors = [sum(n for _, n in share.row.out(share.slices).terms) for share in shares]
    known = next(iter(parts))
    unit = int(parts[known][1].shape[0]) // factors[known]
    first = next(iter(parts.values()))[0]
    shared = all(torch.equal(A, first) for A, _ in parts.values())
    kept = [first] if shared else [A for _, (A, _) in sorted(parts.items())]
    down = torch.cat(kept)
    up = torch.zeros(unit * sum(factors), down.shape[0], dtype=parts[known][1].dtype)
    row = column = 0
    for n, factor in enumerate(factors):
        if n in parts:
            B = parts[n][1]
            up[row : row + unit * factor, column : column + B.shape[1]] = B
            column += 0 if shared else B.shape[1]
        row += unit * factor
    return down, up


def _pieces(
    entry: Format, table: LayerTable, layer: str, B: Tensor
) -> list[tuple[str, Spelling, Tensor, tuple[int, ...], tuple[Share, ...]]]:
    """Modules that a format divides a layer into or puts it in, each with its rows of B."""
    modules = entry.module_paths(table, layer)
    parsed = table.parse(layer)
    if not modules or parsed is None:
        raise LoRAFormatError(
            f"Format {entry.name} has no name for layer {shown(layer)!r}; "
            "only canonical layers can be written."
        )
    row = parsed.row
    if not any(spelling.slices for _, spelling, _ in modules):
        return [(module, spelling, B, row.kernel, held) for module, spelling, held in modules]
    try:
        rows = row.output_slices(int(B.shape[0]))
    except ValueError as error:
        raise LoRAFormatError(f"Layer {shown(layer)} cannot be divided: {error}.") from error
    written = {name for _, spelling, _ in modules for name in spelling.slices}
    for name, where in rows.items():
        if name not in written and B[where].count_nonzero():
            raise LoRAFormatError(
                f"Format {entry.name} has no name for the {name} rows of layer {shown(layer)!r}; "
                "choose another format."
            )
    return [
        (module, spelling, torch.cat([B[rows[name]] for name in spelling.slices]), row.kernel, held)
        for module, spelling, held in modules
    ]


def _piece_tensors(
    entry: Format, module: str, A: Tensor, B: Tensor, alpha: float | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    down, up = entry.factor_names
    written = {f"{module}.{down}.weight": A.to(dtype), f"{module}.{up}.weight": B.to(dtype)}
    for key, tensor in written.items():
        if not is_finite(tensor):
            raise LoRAFormatError(f"{key} does not fit in {dtype}; write it as float32 instead.")
    if entry.alpha == "tensor" or (alpha is not None and entry.alpha == "optional tensor"):
        value = A.shape[0] if alpha is None else alpha
        written[f"{module}.alpha"] = torch.tensor(float(value), dtype=torch.float32)
    return written


def _peft_header(alpha: float, ranks: Mapping[str, int], component: str) -> str:
    """Spell alpha and ranks as diffusers does, patterns for layers of another rank."""
    common = max(sorted(set(ranks.values())), key=list(ranks.values()).count)
    pattern = {module: rank for module, rank in sorted(ranks.items()) if rank != common}
    entries = {
        f"{component}r": common,
        f"{component}lora_alpha": alpha,
        f"{component}rank_pattern": pattern,
        f"{component}alpha_pattern": {},
    }
    return json.dumps(entries)


def _serialize(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> tuple[bytes, list[bytes]]:
    """Header and data of a safetensors file, widest element type first to keep data aligned."""
    entries: dict[str, Any] = {}
    if metadata:
        entries["__metadata__"] = {
            str(key): value if isinstance(value, str) else json.dumps(value)
            for key, value in sorted(metadata.items())
        }
    data: list[bytes] = []
    position = 0
    for key in sorted(tensors, key=lambda key: (-tensors[key].element_size(), key)):
        tensor = tensors[key].detach().cpu().contiguous()
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        entries[key] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + len(raw)],
        }
        data.append(raw)
        position += len(raw)
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return header + b" " * (-len(header) % 8), data


def _write_atomically(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> Path:
    header, data = _serialize(tensors, metadata)
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(header)))
            file.write(header)
            file.writelines(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise LoRAFormatError(f"{shown(path)} cannot be written: {shown(error)}.") from error
    return path
