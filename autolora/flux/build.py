"""The modules of a full-size base model, built at the sizes of a checkpoint and filled from it.

Modules and forward passes are DiffSynth's own; where a constructor knows one size only, the module
is made on the meta device and its layers are given the checkpoint's shapes, so that a checkpoint of
any width goes through the same code as the published ones. Importing this module imports DiffSynth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffsynth.core import AutoWrappedLinear, AutoWrappedModule, enable_vram_management
from diffsynth.core.vram.disk_map import DiskMap
from diffsynth.core.vram.initialization import skip_model_initialization
from diffsynth.models.flux_dit import (
    AdaLayerNormContinuous,
    FluxDiT,
    FluxJointTransformerBlock,
    FluxSingleTransformerBlock,
    RoPEEmbedding,
)
from diffsynth.models.flux_text_encoder_clip import FluxTextEncoderClip
from diffsynth.models.flux_text_encoder_t5 import FluxTextEncoderT5
from diffsynth.models.flux_vae import FluxVAEDecoder, FluxVAEEncoder
from diffsynth.models.general_modules import TimestepEmbeddings
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel
from transformers.models.t5.modeling_t5 import T5DenseGatedActDense

from autolora.errors import ConfigError, shown
from autolora.flux.names import Recipe, cook, shape_of
from autolora.flux.sizes import FluxSizes, Shapes, clip_sizes, t5_sizes

FLOAT8 = torch.float8_e4m3fn
ROPE_THETA = 10_000
_FLOAT8_MAX = torch.finfo(FLOAT8).max

# T5's feed-forward looks at its weight's type and would cast its input to it: wrapped as a whole.
_STORED: Mapping[type[nn.Module], type[nn.Module]] = {
    T5DenseGatedActDense: AutoWrappedModule,
    nn.Linear: AutoWrappedLinear,
}


class SizedFluxDiT(FluxDiT):
    """DiffSynth's FLUX transformer at any size."""

    def __init__(self, sizes: FluxSizes) -> None:
        nn.Module.__init__(self)
        width = sizes.width
        self.sizes = sizes
        self.input_dim = sizes.patch
        self.pos_embedder = RoPEEmbedding(width, ROPE_THETA, list(sizes.rope_axes))
        self.time_embedder = TimestepEmbeddings(sizes.time_dim, width)
        self.guidance_embedder = (
            TimestepEmbeddings(sizes.time_dim, width) if sizes.guidance else None
        )
        self.pooled_text_embedder = nn.Sequential(
            nn.Linear(sizes.pooled_dim, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.context_embedder = nn.Linear(sizes.text_dim, width)
        self.x_embedder = nn.Linear(sizes.patch, width)
        self.blocks = nn.ModuleList(
            FluxJointTransformerBlock(width, sizes.heads) for _ in range(sizes.double_blocks)
        )
        self.single_blocks = nn.ModuleList(
            FluxSingleTransformerBlock(width, sizes.heads) for _ in range(sizes.single_blocks)
        )
        self.final_norm_out = AdaLayerNormContinuous(width)
        self.final_proj_out = nn.Linear(width, sizes.patch)


class SizedT5(FluxTextEncoderT5):
    """DiffSynth's T5 encoder at any size."""

    def __init__(self, **sizes: int | float) -> None:
        T5EncoderModel.__init__(
            self,
            T5Config(
                feed_forward_proj="gated-gelu",
                relative_attention_max_distance=128,
                layer_norm_epsilon=1e-6,
                tie_word_embeddings=False,
                **sizes,
            ),
        )


def build_transformer(shapes: Shapes) -> SizedFluxDiT:
    """Build the transformer on the meta device for canonical shapes."""
    return SizedFluxDiT(FluxSizes.from_shapes(shapes))


def build_t5(shapes: Shapes) -> SizedT5:
    """Build T5 on the meta device."""
    return SizedT5(**t5_sizes(shapes))


def build_clip(shapes: Shapes) -> FluxTextEncoderClip:
    """Build CLIP's text encoder on the meta device; all CLIP models have heads of one size."""
    model = FluxTextEncoderClip(**clip_sizes(shapes))
    _fit_layers(model, shapes)
    for layer in model.encoders:
        layer.attn.num_heads = layer.attn.to_q.out_features // layer.attn.head_dim
    return model


def build_vae_encoder(shapes: Shapes) -> FluxVAEEncoder:
    """Build the autoencoder's encoder on the meta device."""
    return _fit_vae(FluxVAEEncoder(), shapes)


def build_vae_decoder(shapes: Shapes) -> FluxVAEDecoder:
    """Build the autoencoder's decoder on the meta device."""
    return _fit_vae(FluxVAEDecoder(), shapes)


def _fit_vae(model: Any, shapes: Shapes) -> Any:
    _fit_layers(model, shapes)
    for module in model.modules():
        if hasattr(module, "head_dim"):  # the attention in the middle, over all channels
            module.head_dim = module.to_q.out_channels // module.num_heads
    return model


def _fit_layers(model: nn.Module, shapes: Shapes) -> None:
    """Tell layers on the meta device the sizes that their weights are going to have."""
    for name, module in model.named_modules():
        shape = shapes.get(f"{name}.weight")
        if shape is None:
            continue
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = shape
        elif isinstance(module, nn.Conv2d):
            module.out_channels, module.in_channels = shape[:2]
        elif isinstance(module, nn.GroupNorm):
            module.num_channels = shape[0]
        for key in ("weight", "bias"):
            if f"{name}.{key}" in shapes and getattr(module, key, None) is not None:
                empty = torch.empty(shapes[f"{name}.{key}"], device="meta")
                setattr(module, key, nn.Parameter(empty, requires_grad=False))


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
        tensors: Headers of the files (`autolora.flux.headers.TensorInfo` by name).
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
            if not isinstance(module, (AutoWrappedLinear, AutoWrappedModule, nn.Linear))
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
