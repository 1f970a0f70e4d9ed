"""Seeded mutations of LoRA files: of bytes, of the header's JSON, of keys, shapes and types."""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import lru_cache
from typing import Any

from scripts.fuzzing.corpus import (
    ALL_DTYPES,
    DTYPES,
    FILES,
    METADATA,
    OTHER_DTYPES,
    Shapes,
    lay_out,
    pack,
)

SIZES = (0, 1, 2, 3, 4, 8, 12, 16, 28, -1, 64, 255, 2**16, 2**31, 2**62, 2**63, 10**40)
ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 0.5, 1e308, "", "x", "NaN", [], [0], {}, [[]], {"a": 1}, 2**64,
)  # fmt: skip
SUFFIXES = (
    ".lora_down.weight", ".lora_up.weight", ".lora_A.weight", ".lora_B.weight", ".alpha",
    ".lora_A.default.weight", ".lora_B.dog.weight", ".lora.down.weight", ".lora.up.weight",
    ".lokr_w1", ".lokr_w2", ".lokr_w1_a", ".lokr_w1_b", ".lokr_w2_a", ".lokr_w2_b", ".lokr_t2",
    ".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b", ".hada_t1", ".hada_t2",
    ".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.default.weight", ".magnitude",
    ".diff", ".diff_b", ".w_norm", ".b_norm", ".lora_B.bias", ".lora_mid.weight", ".bias",
    ".oft_blocks", ".down.weight", ".up.weight", ".weight", "",
)  # fmt: skip
PREFIXES = (
    "lora_unet_", "transformer.", "diffusion_model.", "base_model.model.", "lycoris_", "dit.",
    "lora_transformer_", "base_model.model.transformer.", "lora_te1_", "lora_te2_", "lora_te3_",
    "text_encoder.", "text_encoders.t5xxl.transformer.", "unet.", "model.diffusion_model.", "",
)  # fmt: skip
VALUES = {
    "one": struct.pack("<f", 1.0),
    "small": struct.pack("<e", 0.125) * 2,
    "nan": struct.pack("<f", math.nan),
    "inf": struct.pack("<e", math.inf) * 2,
    "noise": bytes(random.Random(0).randrange(256) for _ in range(4096)),
    "zero": b"",
}

Tensors = dict[str, tuple[str, tuple[int, ...]]]


class Mutator:
    """Makes one file for each number, the same one every time.

    Args:
        seed: Chooses the sequence of files.
        more: Further lists of keys to begin with.
    """

    def __init__(self, seed: int, more: dict[str, Shapes] | None = None) -> None:
        self._seed = seed
        self._files: list[Shapes] = [*FILES.values(), *(more or {}).values()]

    def make(self, number: int) -> bytes:
        """Bytes of a file."""
        rng = random.Random(self._seed * 1_000_000_007 + number)
        tensors = _begin(rng, self._files)
        for _ in range(rng.choice((0, 0, 0, 1, 1, 1, 2, 3))):
            rng.choice(_TABLE)(rng, tensors, self._files)
        entries, data = lay_out(tensors, VALUES[rng.choice(_VALUE_NAMES)])
        header: dict[str, Any] = {"__metadata__": dict(rng.choice(METADATA)), **entries}
        for _ in range(rng.choice((0, 0, 0, 0, 0, 1, 2))):
            rng.choice(_HEADER)(rng, header)
        content = pack(_spelled(rng, header), data)
        for _ in range(rng.choice((0, 0, 0, 0, 0, 0, 1, 2, 4))):
            content = rng.choice(_BYTES)(rng, content)
        return content


_VALUE_NAMES = ("one",) * 6 + ("small",) * 3 + ("zero", "nan", "inf", "noise")


def _begin(rng: random.Random, files: Sequence[Shapes]) -> Tensors:
    """Some layers of a file; a group of keys stays together more often than not."""
    shapes = rng.choice(files)
    modules = list(dict.fromkeys(map(_module, shapes)))
    start = rng.randrange(max(1, len(modules) - 2))
    chosen = frozenset(modules[start : start + rng.choice((1, 1, 2, 3, 4))])
    keys = [key for key in shapes if _module(key) in chosen]
    dtype = rng.choice(("F32", "BF16", "F16", *DTYPES))
    return {key: (dtype, shapes[key]) for key in keys}


@lru_cache(maxsize=100_000)
def _module(key: str) -> str:
    """A key without the suffix that tells the parts of a module apart."""
    return next((key[: -len(s)] for s in SUFFIXES if s and key.endswith(s)), key)


def _pick(rng: random.Random, tensors: Tensors) -> str | None:
    return rng.choice(list(tensors)) if tensors else None


def _reshape(rng: random.Random, tensors: Tensors, _: Sequence[Shapes]) -> None:
    key = _pick(rng, tensors)
    if key is None:
        return
    dtype, shape = tensors[key]
    sizes = list(shape)
    match rng.randrange(5):
        case 0 if sizes:
            sizes[rng.randrange(len(sizes))] = rng.choice(SIZES[:9])
        case 1:
            sizes.insert(rng.randint(0, len(sizes)), rng.choice((0, 1, 1, 2)))
        case 2 if sizes:
            sizes.pop()
        case 3:
            sizes.reverse()
        case _:
            sizes = [rng.choice((1, 2, 3, 4, 8)) for _ in range(rng.randint(0, 5))]
    tensors[key] = (dtype, tuple(sizes))


def _retype(rng: random.Random, tensors: Tensors, _: Sequence[Shapes]) -> None:
    if (key := _pick(rng, tensors)) is not None:
        tensors[key] = (rng.choice([*DTYPES, *OTHER_DTYPES]), tensors[key][1])


def _drop(rng: random.Random, tensors: Tensors, _: Sequence[Shapes]) -> None:
    if (key := _pick(rng, tensors)) is not None:
        del tensors[key]


def _mix(rng: random.Random, tensors: Tensors, files: Sequence[Shapes]) -> None:
    tensors |= _begin(rng, files)


def _resuffix(rng: random.Random, tensors: Tensors, _: Sequence[Shapes]) -> None:
    key = _pick(rng, tensors)
    if key is None:
        return
    stem = _module(key)
    value = tensors[key] if rng.random() < 0.5 else tensors.pop(key)
    tensors[stem + rng.choice(SUFFIXES)] = value


def _reprefix(rng: random.Random, tensors: Tensors, _: Sequence[Shapes]) -> None:
    """All keys of a file, or one, under another prefix or joint."""
    old = next((p for p in PREFIXES if p and all(key.startswith(p) for key in tensors)), "")
    new = rng.choice(PREFIXES)
    chosen = list(tensors) if rng.random() < 0.7 else [key for key in [_pick(rng, tensors)] if key]
    swap = rng.choice((("", ""), (".", "_"), ("_", "."), ("blocks", "block")))
    for key in chosen:
        value = tensors.pop(key)
        inner = key[len(old) :]
        tensors[new + (inner.replace(*swap) if swap[0] else inner)] = value


def _respell(rng: random.Random, tensors: Tensors, _: Sequence[Shapes]) -> None:
    key = _pick(rng, tensors)
    if key is None:
        return
    place = rng.randrange(len(key) + 1)
    part = rng.choice(
        ("0", "9", "99999", "-1", "007", ".", "_", "\n", "\0", "\ud800", "é", "q", "٣", "'", "%s")
    )
    cut = rng.randrange(3)
    tensors[key[:place] + part + key[place + cut :]] = tensors.pop(key)


_TABLE: tuple[Callable[[random.Random, Tensors, Sequence[Shapes]], None], ...] = (
    _reshape, _reshape, _retype, _drop, _mix, _resuffix, _resuffix, _reprefix, _respell,
)  # fmt: skip


def _break_entry(rng: random.Random, header: dict[str, Any]) -> None:
    key = rng.choice(list(header))
    entry = header[key]
    if not isinstance(entry, dict) or not entry or rng.random() < 0.1:
        header[key] = deepcopy(rng.choice(ODD))
        return
    name = rng.choice(list(entry))
    value = entry[name]
    if isinstance(value, list) and value and rng.random() < 0.7:
        place = rng.randrange(len(value))
        # Copied, or a later mutation of this file would change the table itself.
        value[place] = deepcopy(rng.choice((*SIZES, *ODD, value[place])))
        if rng.random() < 0.3:
            value[place] = max(
                0, int(struct.unpack("<I", rng.randbytes(4))[0]) >> rng.randrange(32)
            )
    elif rng.random() < 0.2:
        del entry[name]
    else:
        sizes = [rng.choice(SIZES)] * rng.randint(0, 40)
        entry[name] = deepcopy(rng.choice((*ODD, *ALL_DTYPES, "f32", sizes)))


def _move_offsets(rng: random.Random, header: dict[str, Any]) -> None:
    """Let a tensor overlap others, leave a gap, or lie outside."""
    entry = header[rng.choice(list(header))]
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if isinstance(offsets, list) and all(isinstance(o, int) for o in offsets):
        by = rng.choice((-8, -4, -1, 1, 4, 8, 1 << 20, 1 << 62))
        entry["data_offsets"] = [offset + by for offset in offsets]


def _break_metadata(rng: random.Random, header: dict[str, Any]) -> None:
    odd = deepcopy(rng.choice((*ODD, "[" * 2000, '{"a": NaN}', "\ud800", '{"transformer.r": 0}')))
    name = rng.choice(("lora_adapter_metadata", "ss_tag_frequency", "format", "\n", "x"))
    if rng.random() < 0.5:
        pattern = {f"transformer.{rng.choice(('alpha_pattern', 'lora_alpha', 'r'))}": odd}
        odd = json.dumps(pattern)
    header["__metadata__"] = {name: odd}


def _nest(rng: random.Random, header: dict[str, Any]) -> None:
    value: Any = 0
    for _ in range(rng.choice((5, 50, 900))):
        value = [value]
    header[rng.choice((*header, "deep"))] = value


_HEADER: tuple[Callable[[random.Random, dict[str, Any]], None], ...] = (
    _break_entry, _break_entry, _move_offsets, _break_metadata, _nest,
)  # fmt: skip


def _spelled(rng: random.Random, header: dict[str, Any]) -> bytes:
    """The header as JSON text, now and then with a key twice or with blanks behind it."""
    raw = json.dumps(header, ensure_ascii=rng.random() < 0.9).encode("utf-8", "replace")
    roll = rng.random()
    if roll < 0.02 and len(header) > 1:
        key = json.dumps(rng.choice(list(header))).encode()
        raw = raw[:-1] + b", " + key + b": 1}"
    elif roll < 0.1:
        raw += b" " * rng.randrange(16)
    return raw


def _flip(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _overwrite(rng: random.Random, content: bytes) -> bytes:
    place = rng.randrange(len(content) + 1)
    part = rng.randbytes(rng.choice((1, 2, 4, 8, 32)))
    return content[:place] + part + content[place + len(part) :]


def _insert(rng: random.Random, content: bytes) -> bytes:
    place = rng.randrange(len(content) + 1)
    return content[:place] + rng.choice((b",", b"}", b"[", b'"', b"\\", b"0")) + content[place:]


def _cut(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def _remove(rng: random.Random, content: bytes) -> bytes:
    place = rng.randrange(len(content) + 1)
    return content[:place] + content[place + rng.choice((1, 2, 8, 64)) :]


def _grow(rng: random.Random, content: bytes) -> bytes:
    return content + rng.randbytes(rng.choice((1, 8, 512)))


def _relength(rng: random.Random, content: bytes) -> bytes:
    """Another header length: off by a few, huge, or none."""
    if len(content) < 8:
        return content
    length = struct.unpack("<Q", content[:8])[0]
    other = rng.choice(
        (length - 1, length + 1, length - 8, length + 64, 0, 1, 2**32, 2**63, 2**64 - 1)
    )
    return struct.pack("<Q", other % 2**64) + content[8:]


def _foreign(rng: random.Random, content: bytes) -> bytes:
    start = rng.choice((b"PK\x03\x04", b"\x80\x02", b"\x80\x04\x95", b"GGUF", b"<html>", b"{", b""))
    return start + content[len(start) :] if rng.random() < 0.5 else start + content


_BYTES: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    _flip, _flip, _overwrite, _insert, _cut, _remove, _grow, _relength, _foreign,
)  # fmt: skip
