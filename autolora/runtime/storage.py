"""How the modules of a base model are filled from their files, stored and moved.

Layers stored otherwise than they compute, in float8 for instance, go through DiffSynth's wrapper,
on any device. Importing this module imports DiffSynth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffsynth.core import AutoWrappedModule, enable_vram_management
from diffsynth.core.vram.disk_map import DiskMap
from diffsynth.core.vram.initialization import skip_model_initialization
from torch import Tensor, nn
from transformers import T5EncoderModel
from transformers.models.t5.modeling_t5 import T5DenseGatedActDense

from autolora.errors import ConfigError, shown
from autolora.runtime.float8 import FLOAT8, Float8Linear, Float8Module
from autolora.safetensors_io import Recipe, Shapes, cook, shape_of

_FLOAT8_MAX = torch.finfo(FLOAT8).max

# T5's feed-forward looks at its weight's type and would cast its input to it: wrapped as a whole.
_STORED: Mapping[type[nn.Module], type[nn.Module]] = {
    T5DenseGatedActDense: Float8Module,
    nn.Linear: Float8Linear,
}


@dataclass(frozen=True)
class Keeping:
    """How a part is kept, and what it computes in.

    Attributes:
        linear: Type that linear layers are kept in.
        compute: Type that everything else is kept in, and that is computed in.
        device: Device that is computed on.
        home: Device that the part waits on.
        by_layer: Whether layers are moved to the device one by one as they are used.
        vram_limit: GiB of the device that may be filled before layers stay at home; None is no
            limit.
    """

    linear: torch.dtype
    compute: torch.dtype
    device: torch.device
    home: torch.device
    by_layer: bool = False
    vram_limit: float | None = None


def load_module(
    build: Callable[[Shapes], nn.Module],
    recipes: Mapping[str, Recipe],
    tensors: Mapping[str, Any],
    files: Sequence[Path],
    keeping: Keeping,
    names: Mapping[str, str] | None = None,
) -> nn.Module:
    """Build a module and fill it, one tensor at a time.

    Args:
        build: Makes the module for shapes.
        recipes: What its tensors are made of.
        tensors: Headers of the files (`autolora.safetensors_io.TensorInfo` by name).
        files: The file, or all shards.
        keeping: How it is kept.
        names: Names in the files by name in ``tensors``, where they differ.

    Returns:
        The module, in evaluation mode.

    Raises:
        ConfigError: Tensors are missing, or have another shape than the others demand.
    """
    where = files[0]
    shapes = {name: shape_of(recipe, tensors) for name, recipe in recipes.items()}
    try:
        with skip_model_initialization():
            model = build(shapes)
    except (KeyError, ValueError, IndexError) as error:
        raise ConfigError(
            f"The checkpoint {shown(where)} lacks what tells its sizes ({shown(error)}); "
            "download it again."
        ) from error
    _check(model, shapes, where)
    disk = DiskMap([str(file) for file in files], "cpu")

    def read(name: str) -> Tensor:
        tensor: Tensor = disk[name if names is None else names[name]]
        return tensor

    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    with torch.no_grad():
        state = {
            name: _cast(
                cook(recipes[name], read),
                keeping.linear if name.rpartition(".")[0] in linears else keeping.compute,
                keeping.home,
            )
            for name in model.state_dict()
        }
    model.load_state_dict(state, assign=True)
    model.eval().requires_grad_(False)
    if isinstance(model, T5EncoderModel):
        model.encoder.set_input_embeddings(model.shared)  # one table, not two copies of it
    return _managed(model, keeping)


def _check(model: nn.Module, shapes: Shapes, where: Path) -> None:
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    absent = sorted(set(wanted) - set(shapes))
    if absent:
        names = ", ".join(absent[:3])
        raise ConfigError(
            f"The checkpoint {shown(where)} lacks {len(absent)} of {len(wanted)} tensors, such as "
            f"{names}; download it again."
        )
    wrong = [name for name, shape in wanted.items() if shape != tuple(shapes[name])]
    if wrong:
        name = wrong[0]
        raise ConfigError(
            f"The checkpoint {shown(where)} does not fit together: {name} is "
            f"{list(shapes[name])}, not {list(wanted[name])}; it is for another program or damaged."
        )


def _cast(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Convert a tensor that was read for this; it may be overwritten."""
    tensor = tensor.to(device)  # first: a card converts faster than a CPU
    if dtype == FLOAT8 and tensor.dtype != FLOAT8:
        if tensor.dtype == torch.float8_e5m2:  # which cannot be clamped
            tensor = tensor.to(torch.bfloat16)
        # Beyond its range float8 has no infinity, and older torch makes not-a-number of it.
        tensor.clamp_(-_FLOAT8_MAX, _FLOAT8_MAX)
    return tensor.to(dtype)


def _managed(model: nn.Module, keeping: Keeping) -> nn.Module:
    """Wrap the layers that are not simply kept as they compute."""
    stored = keeping.linear != keeping.compute
    if not stored and not keeping.by_layer:
        return model
    plain: Mapping[type[nn.Module], type[nn.Module]] = {nn.Linear: _STORED[nn.Linear]}
    kinds = _STORED if stored else plain
    model = _wrap(model, kinds, keeping.linear, keeping)
    if keeping.by_layer:
        others = {
            type(module): AutoWrappedModule
            for module in model.modules()
            if not isinstance(module, (Float8Linear, AutoWrappedModule, nn.Linear))
            and next(module.children(), None) is None
            and next(module.parameters(), None) is not None
        }
        model = _wrap(model, others, keeping.compute, keeping)
    return model


def _wrap(
    model: nn.Module,
    kinds: Mapping[type[nn.Module], type[nn.Module]],
    dtype: torch.dtype,
    keeping: Keeping,
) -> nn.Module:
    waiting = keeping.home if keeping.by_layer else keeping.device
    vram_config = {
        "offload_dtype": dtype,
        "offload_device": waiting,
        "onload_dtype": dtype,
        "onload_device": waiting,
        "preparing_dtype": dtype,
        "preparing_device": keeping.device,
        "computation_dtype": keeping.compute,
        "computation_device": keeping.device,
    }
    wrapped: nn.Module = enable_vram_management(
        model, dict(kinds), vram_config=vram_config, vram_limit=keeping.vram_limit
    )
    # Turned on where the whole pipeline is managed.
    wrapped.vram_management_enabled = False  # type: ignore[assignment]
    return wrapped


def store_in_float8(module: nn.Module, compute_dtype: torch.dtype, device: torch.device) -> int:
    """Stores every Linear of ``module`` in float8 e4m3; each call computes in ``compute_dtype``.

    Weights and biases are rounded to the nearest float8 value, one byte each, and cast back one
    layer at a time while it runs (`Float8Linear`). In place.

    Args:
        module: A FLUX transformer.
        compute_dtype: Type of inputs and outputs, bfloat16 or float32.
        device: Where the weights are kept and computed on.

    Returns:
        How many layers were converted.
    """
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    for linear in linears:
        linear.to(dtype=FLOAT8)
    stored = {
        f"{stage}_{what}": value
        for stage in ("offload", "onload", "preparing")
        for what, value in (("dtype", FLOAT8), ("device", device))
    }
    config = {**stored, "computation_dtype": compute_dtype, "computation_device": device}
    enable_vram_management(module, {nn.Linear: Float8Linear}, vram_config=config)
    return len(linears)
