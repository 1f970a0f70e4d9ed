"""A FLUX.1 checkpoint as a DiffSynth pipeline.

Files are found and checked first, then types and memory are settled, and only then is anything
loaded. Modules and forward passes are DiffSynth's own; where a constructor knows one size only, the
module is made on the meta device and its layers are given the checkpoint's shapes, so that a
checkpoint of any width goes through the same code as the published ones. Importing this module
imports DiffSynth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
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
from diffsynth.pipelines.flux_image import FluxImagePipeline
from diffsynth.utils.state_dict_converters.flux_text_encoder_clip import (
    FluxTextEncoderClipStateDictConverter,
)
from diffsynth.utils.state_dict_converters.flux_vae import (
    FluxVAEDecoderStateDictConverter,
    FluxVAEEncoderStateDictConverter,
)
from torch import nn
from transformers import CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from autolora.config import PACKED_STORAGES, MemorySettings, PipelineConfig
from autolora.errors import ConfigError, shown
from autolora.families.flux1.checkpoint_names import autoencoder_names
from autolora.families.flux1.others import check_plain
from autolora.families.flux1.part_files import PartFiles, model_sizes, read_transformer
from autolora.families.flux1.sizes import FluxSizes, clip_sizes, t5_sizes
from autolora.families.flux1.tables import linear_layers, parse_layer
from autolora.runtime.checkpoints import Located, download, locate, locate_part, require
from autolora.runtime.hardware import METHODS, hardware_of, machine_memory, settle_types
from autolora.runtime.memory import plan_memory
from autolora.runtime.storage import FLOAT8, Keeping, load_module
from autolora.safetensors_io import Recipe, Shapes, TensorInfo, read_headers

ROPE_THETA = 10_000
DEV, SCHNELL = "dev", "schnell"
TEXT_LENGTHS = {DEV: 512, SCHNELL: 256}
"""T5 tokens that the published models were trained with."""
MANAGED = ("cuda", "npu", "xpu")
"""Kinds of device that DiffSynth's pipeline can move parts to and from."""
_TYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_POSITIONS = "text_model.embeddings.position_embedding.weight"


class Flux1Pipeline(FluxImagePipeline):
    """DiffSynth's FLUX pipeline with what is known of its checkpoint.

    Attributes:
        variant: ``dev`` for a model that takes guidance as an input, ``schnell`` for one that
            does not.
        text_length: T5 tokens that a prompt is padded to.
        notes: What a user should know of how the model was loaded.
        tiled: Whether pictures are decoded in tiles.
    """

    variant: str
    text_length: int
    notes: list[str]
    tiled: bool


def build_flux1(config: PipelineConfig, device: torch.device) -> Flux1Pipeline:
    """Load a FLUX.1 model.

    Args:
        config: A configuration of kind ``flux1``.
        device: Where to compute.

    Returns:
        The pipeline, in evaluation mode.

    Raises:
        ConfigError: Files are missing, incomplete or of another model, or memory is too small.
    """
    located = _find(config, None)
    sizes = model_sizes(located)
    parts = _read_parts(located)
    hardware = hardware_of(device)
    storage, compute_name, notes = settle_types(config, hardware)
    compute = _TYPES[compute_name]
    _, machine_free = machine_memory()
    memory, more = plan_memory(config, storage, sizes, hardware, compute.itemsize, machine_free)
    modules = _load_modules(parts, storage, memory, compute, device)
    pipe = Flux1Pipeline(device=device, torch_dtype=compute)
    pipe.tokenizer_1 = _tokenizer(CLIPTokenizer, located["tokenizer"])
    pipe.tokenizer_2 = _tokenizer(T5TokenizerFast, located["tokenizer_2"])
    for name, module in modules.items():
        setattr(pipe, name, module)
    pipe.variant = DEV if sizes.flux.guidance else SCHNELL
    pipe.text_length = TEXT_LENGTHS[pipe.variant]
    pipe.notes = notes + more
    pipe.tiled = memory.tiled
    _manage(pipe, modules, memory, device)
    return pipe


def load_clip(config: PipelineConfig) -> tuple[Any, nn.Module]:
    """Load CLIP's text encoder alone, in float32 on the CPU, to read texts for a search.

    Args:
        config: A configuration of kind ``flux1``.

    Returns:
        Tokenizer and model; the model gives pooled vectors first.

    Raises:
        ConfigError: Its files are missing or damaged.
    """
    located = _find(config, ("text_encoder", "tokenizer"))
    part = _read_clip(located["text_encoder"])
    cpu = torch.device("cpu")
    keeping = Keeping(torch.float32, torch.float32, cpu, cpu)
    model = load_module(build_clip, part.recipes, part.tensors, part.files, keeping, part.names)
    return _tokenizer(CLIPTokenizer, located["tokenizer"]), model


def _find(config: PipelineConfig, names: Iterable[str] | None) -> dict[str, Located]:
    def look() -> dict[str, Located]:
        return locate(config) if names is None else {n: locate_part(config, n) for n in names}

    located = look()
    if config.checkpoint.download and not all(e.complete for e in located.values()):
        download(config, located.values())
        located = look()
    if names is not None and not all(e.complete for e in located.values()):
        # Everything that a picture is going to need, so that one command gets it all.
        require(config, locate(config).values())
    require(config, located.values())
    return located


def _read_parts(located: Mapping[str, Located]) -> dict[str, PartFiles]:
    """Read all headers: everything that can be wrong with a file shows before it is loaded."""
    return {
        "dit": read_transformer(located["transformer"]),
        "text_encoder_1": _read_clip(located["text_encoder"]),
        "text_encoder_2": _read_t5(located["text_encoder_2"]),
        "vae_encoder": _read_vae(located["vae"], FluxVAEEncoderStateDictConverter),
        "vae_decoder": _read_vae(located["vae"], FluxVAEDecoderStateDictConverter),
    }


def _read_plain(located: Located) -> dict[str, TensorInfo]:
    tensors = read_headers(located.paths)
    check_plain(tensors, located.paths[0])
    return tensors


def _read_clip(located: Located) -> PartFiles:
    tensors = _read_plain(located)
    names = {
        name if name.startswith("text_model.") else f"text_model.{name}": name for name in tensors
    }
    if _POSITIONS not in names:
        raise ConfigError(f"{shown(located.paths[0])} is not CLIP's text encoder.")
    renamed = FluxTextEncoderClipStateDictConverter({n: n for n in names if n != _POSITIONS})
    recipes = {ours: Recipe((theirs,)) for ours, theirs in renamed.items()}
    recipes["position_embeds"] = Recipe((_POSITIONS,), leading=1)
    infos = {plain: tensors[name] for plain, name in names.items()}
    return PartFiles(located.paths, infos, names, recipes)


def _read_t5(located: Located) -> PartFiles:
    tensors = _read_plain(located)
    table = "shared.weight" if "shared.weight" in tensors else "encoder.embed_tokens.weight"
    if table not in tensors or not any(name.startswith("encoder.block.") for name in tensors):
        raise ConfigError(f"{shown(located.paths[0])} is not a T5 text encoder.")
    recipes = {name: Recipe((name,)) for name in tensors if name.startswith("encoder.")}
    recipes["shared.weight"] = recipes["encoder.embed_tokens.weight"] = Recipe((table,))
    return PartFiles(located.paths, tensors, recipes=recipes)


def _read_vae(located: Located, convert: Callable[[dict[str, str]], dict[str, str]]) -> PartFiles:
    tensors = _read_plain(located)
    recipes = autoencoder_names(tensors)
    renamed = convert({name: name for name in recipes})
    if not renamed:
        raise ConfigError(f"{shown(located.paths[0])} is not FLUX.1's autoencoder.")
    return PartFiles(
        located.paths, tensors, recipes={ours: recipes[bfl] for ours, bfl in renamed.items()}
    )


def _load_modules(
    parts: Mapping[str, PartFiles],
    storage: str,
    memory: MemorySettings,
    compute: torch.dtype,
    device: torch.device,
) -> dict[str, nn.Module]:
    home = torch.device("cpu") if memory.offload != "none" else device
    plain = Keeping(
        linear=compute,
        compute=compute,
        device=device,
        home=home,
        by_layer=memory.offload == "layers",
        vram_limit=memory.vram_limit,
    )
    text = replace(plain, linear=FLOAT8 if memory.text_storage == "float8" else compute)
    packed = storage in PACKED_STORAGES
    kept = {"float8": FLOAT8}.get(storage, compute)
    dit = replace(plain, linear=kept, home=torch.device("cpu") if packed else home)
    rows: tuple[tuple[str, Callable[[Shapes], nn.Module], Keeping], ...] = (
        ("dit", build_transformer, dit),
        ("text_encoder_1", build_clip, text),
        ("text_encoder_2", build_t5, text),
        ("vae_encoder", build_vae_encoder, plain),
        ("vae_decoder", build_vae_decoder, plain),
    )
    modules = {}
    for name, make, keeping in rows:
        part = parts[name]
        modules[name] = load_module(
            make, part.recipes, part.tensors, part.files, keeping, part.names
        )
        if name == "dit" and packed:
            modules[name] = _pack(modules[name], storage, device, home)
    return modules


def _pack(dit: nn.Module, storage: str, device: torch.device, home: torch.device) -> nn.Module:
    """Let a library pack the linear layers in the blocks, one at a time, through the device.

    The few layers outside the blocks are small, and quality hangs on them. Nobody may put a LoRA on
    the result by DiffSynth's own loader: it would add to the packed numbers.
    """
    from diffsynth.core.quant import QuantizeConfig

    inside = [
        name
        for name in linear_layers(dit)
        if (layer := parse_layer(name)) is not None and layer.kind != "outer"
    ]
    try:
        quantize = QuantizeConfig(method=METHODS[storage], target_modules=inside)
        dit = quantize.quantize_model(dit, compute_device=device, model_device=home)
    except (ImportError, RuntimeError, NotImplementedError, ValueError) as error:
        reason = shown(" ".join(str(error).split()))
        raise ConfigError(
            f"storage {storage} does not work on {device}: {reason}; use storage float8."
        ) from error
    return dit.to(home).requires_grad_(False)


def _tokenizer(kind: Any, located: Located) -> Any:
    folder = located.paths[0]
    try:
        return kind.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # whatever the file makes of the tokenizer library
        reason = shown(" ".join(str(error).split()))
        raise ConfigError(
            f"The tokenizer in {shown(folder)} cannot be read ({reason}); download it again."
        ) from error


def _manage(
    pipe: Flux1Pipeline,
    modules: Mapping[str, nn.Module],
    memory: MemorySettings,
    device: torch.device,
) -> None:
    """Let DiffSynth's pipeline move parts or layers while it works."""
    if memory.offload == "none" or device.type not in MANAGED:
        return
    for module in modules.values():
        module.vram_management_enabled = True  # type: ignore[assignment]
        if memory.offload == "parts":
            module.onload = partial(module.to, device=device)  # type: ignore[assignment]
            module.offload = partial(module.to, device="cpu")  # type: ignore[assignment]
    pipe.vram_management_enabled = True


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
