"""Float8 storage of linear layers, through DiffSynth's own wrapper, on any device."""

from __future__ import annotations

import torch
from torch import nn

FLOAT8 = torch.float8_e4m3fn


def store_in_float8(module: nn.Module, compute_dtype: torch.dtype, device: torch.device) -> int:
    """Stores every Linear of ``module`` in float8 e4m3; each call computes in ``compute_dtype``.

    Weights and biases are rounded to the nearest float8 value, one byte each, and cast back one
    layer at a time while it runs (DiffSynth's ``AutoWrappedLinear``). In place.

    Args:
        module: A FLUX transformer.
        compute_dtype: Type of inputs and outputs, bfloat16 or float32.
        device: Where the weights are kept and computed on.

    Returns:
        How many layers were converted.
    """
    from diffsynth.core import AutoWrappedLinear, enable_vram_management

    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    for linear in linears:
        linear.to(dtype=FLOAT8)
    stored = {
        f"{stage}_{what}": value
        for stage in ("offload", "onload", "preparing")
        for what, value in (("dtype", FLOAT8), ("device", device))
    }
    config = {**stored, "computation_dtype": compute_dtype, "computation_device": device}
    enable_vram_management(module, {nn.Linear: AutoWrappedLinear}, vram_config=config)
    return len(linears)
