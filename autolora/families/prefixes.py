"""What programs put before a model's module paths in LoRA files and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

FLAT = ("lora_unet_", "lora_transformer_", "lora_prior_unet_", "lycoris_")
"""Prefixes of paths whose parts are joined by ``_``."""

_INSIDE_FLAT = ("_", "model_diffusion_model_", "diffusion_model_", "unet_", "transformer_")
_DOTTED = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "conditional_transformer.",
    "transformer.",
    "unet.",
    "pipe.",
    "dit.",
    "model.",
    "module.",
)


def inner_paths(path: str) -> Iterator[tuple[str, str]]:
    """Take prefixes off a module path, one after the other.

    Args:
        path: Module path as a file has it, such as ``base_model.model.transformer.proj_out``.

    Yields:
        Prefix and the rest, from no prefix to all there are. An underscore at the end of a path
        is no part of it, and ``sformer_blocks`` is what some exporter made of
        ``transformer_blocks``.
    """
    flat = next((prefix for prefix in FLAT if path.startswith(prefix)), "")
    words = _INSIDE_FLAT if flat else _DOTTED
    rest = path[len(flat) :]
    yield flat, _mended(rest)
    while (word := next((word for word in words if rest.startswith(word)), "")) != "":
        rest = rest[len(word) :]
        yield path[: len(path) - len(rest)], _mended(rest)


def _mended(path: str) -> str:
    if path.startswith("sformer_blocks."):
        path = "tran" + path
    return path[:-1] if path.endswith("_") else path
