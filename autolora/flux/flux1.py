"""A FLUX.1 checkpoint as a DiffSynth pipeline.

Files are found and checked first, then types and memory are settled, and only then is anything
loaded. Importing this module imports DiffSynth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffsynth.pipelines.flux_image import FluxImagePipeline
from diffsynth.utils.state_dict_converters.flux_text_encoder_clip import (
    FluxTextEncoderClipStateDictConverter,
)
from diffsynth.utils.state_dict_converters.flux_vae import (
    FluxVAEDecoderStateDictConverter,
    FluxVAEEncoderStateDictConverter,
)
from torch import nn
from transformers import CLIPTokenizer, T5TokenizerFast

from autolora.errors import ConfigError, shown
from autolora.flux import build
from autolora.flux.checkpoints import Located, download, locate, locate_part, require
from autolora.flux.config import PACKED_STORAGES, PipelineConfig
from autolora.flux.families import check_plain
from autolora.flux.hardware import hardware_of, machine_memory
from autolora.flux.headers import TensorInfo, read_headers
from autolora.flux.inspecting import PartFiles, model_sizes, read_transformer
from autolora.flux.layers import linear_layers, parse_layer
from autolora.flux.memory import plan_memory
from autolora.flux.names import Recipe, autoencoder_names
from autolora.flux.settings import MemorySettings
from autolora.flux.sizes import Shapes
from autolora.flux.types import METHODS, settle_types

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
    keeping = build.Keeping(torch.float32, torch.float32, cpu, cpu)
    model = build.load_module(
        build.build_clip, part.recipes, part.tensors, part.files, keeping, part.names
    )
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
    plain = build.Keeping(
        linear=compute,
        compute=compute,
        device=device,
        home=home,
        by_layer=memory.offload == "layers",
        vram_limit=memory.vram_limit,
    )
    text = replace(plain, linear=build.FLOAT8 if memory.text_storage == "float8" else compute)
    packed = storage in PACKED_STORAGES
    kept = {"float8": build.FLOAT8}.get(storage, compute)
    dit = replace(plain, linear=kept, home=torch.device("cpu") if packed else home)
    rows: tuple[tuple[str, Callable[[Shapes], nn.Module], build.Keeping], ...] = (
        ("dit", build.build_transformer, dit),
        ("text_encoder_1", build.build_clip, text),
        ("text_encoder_2", build.build_t5, text),
        ("vae_encoder", build.build_vae_encoder, plain),
        ("vae_decoder", build.build_vae_decoder, plain),
    )
    modules = {}
    for name, make, keeping in rows:
        part = parts[name]
        modules[name] = build.load_module(
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
