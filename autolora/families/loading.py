"""Loads a family's model from its files, whatever the family: find, check, settle, fill.

Files are found and their headers read first, then types and memory are settled, and only then is
anything loaded. Importing this module imports DiffSynth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any, Literal

import torch
from torch import nn

from autolora.config import PACKED_STORAGES, MemorySettings, PipelineConfig
from autolora.errors import ConfigError, shown
from autolora.families.base import Family
from autolora.families.flux1.others import PREFIXES, check_plain
from autolora.families.headers import PartFiles, model_sizes, wrong_model
from autolora.runtime.checkpoints import Located, download, locate_part, require
from autolora.runtime.hardware import METHODS, hardware_of, machine_memory, settle_types
from autolora.runtime.memory import plan_memory
from autolora.runtime.storage import FLOAT8, Keeping, load_module
from autolora.safetensors_io import Recipe, Shapes, TensorInfo, read_headers

MANAGED = ("cuda", "npu", "xpu")
"""Kinds of device that DiffSynth's pipeline can move parts to and from."""
_TYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
Role = Literal["denoiser", "text", "autoencoder"]


class _Name(str):
    """A tensor's name in the place of the tensor, for converters that only rename."""

    dtype = None


@dataclass(frozen=True)
class Component:
    """One of a pipeline's models.

    Attributes:
        attribute: The pipeline's attribute.
        part: Its files.
        title: What sentences call it.
        build: Makes the module on the meta device for the shapes of its tensors.
        telling: A name that it must have, as the module calls it.
        convert: DiffSynth's converter from the names in the files.
        role: How it is kept.
        recipes: What its tensors are made of, where renaming is not enough.
        read: Reads its headers, where its files need more than that.
    """

    attribute: str
    part: str
    title: str
    build: Callable[[Shapes], nn.Module]
    telling: str
    convert: Callable[[dict[str, Any]], dict[str, Any]] = dict
    role: Role = "denoiser"
    recipes: Callable[[Mapping[str, TensorInfo]], dict[str, Recipe]] | None = None
    read: Callable[[Located], PartFiles] | None = None


@dataclass(frozen=True)
class Reader:
    """A library's object that is read from a folder: a tokenizer or a processor.

    Attributes:
        attribute: The pipeline's attribute.
        part: Its folder.
        load: Reads the folder.
    """

    attribute: str
    part: str
    load: Callable[[str], Any]


def load_family(
    family: Family,
    config: PipelineConfig,
    device: torch.device,
    components: Sequence[Component],
    readers: Sequence[Reader],
) -> Any:
    """Load a model from its files.

    Args:
        family: The family.
        config: A configuration of its kind.
        device: Where to compute.
        components: Its models.
        readers: Its tokenizers and processors.

    Returns:
        DiffSynth's pipeline in evaluation mode, with the attributes ``family``, ``notes`` (what a
        user should know of how it was loaded) and ``tiled``.

    Raises:
        ConfigError: Files are missing, incomplete or of another model, or memory is too small.
    """
    located = find_parts(
        config, family, [*(c.part for c in components), *(r.part for r in readers)]
    )
    sizes = family.sizes(located) if family.sizes else model_sizes(family, located)
    assert sizes is not None  # what is missing was refused above
    present = [entry for entry in components if located[entry.part].complete]
    files = {entry.attribute: read_component(family, entry, located) for entry in present}
    hardware = hardware_of(device)
    storage, compute_name, notes = settle_types(config, hardware)
    compute = _TYPES[compute_name]
    memory, more = plan_memory(
        config, storage, sizes, hardware, compute.itemsize, machine_memory()[1]
    )
    modules = {
        entry.attribute: _load(entry, files[entry.attribute], storage, memory, compute, device)
        for entry in present
    }
    pipe = pipeline_class(family)(device=device, torch_dtype=compute)
    for reader in readers:
        if located[reader.part].complete:
            setattr(pipe, reader.attribute, _read(reader, located[reader.part]))
    for name, module in modules.items():
        setattr(pipe, name, module)
    pipe.family, pipe.notes, pipe.tiled = family, notes + more, memory.tiled
    manage(pipe, modules, memory, device)
    return pipe


def pipeline_class(family: Family) -> Any:
    """DiffSynth's pipeline class of a family."""
    module, _, name = family.pipeline.partition(":")
    return getattr(import_module(module), name)


def load_alone(
    family: Family, config: PipelineConfig, component: Component, reader: Reader
) -> tuple[Any, nn.Module]:
    """Load one component with its reader, in float32 on the CPU.

    Raises:
        ConfigError: Files are missing or damaged.
    """
    located = find_parts(config, family, [component.part, reader.part])
    part = read_component(family, component, located)
    cpu = torch.device("cpu")
    keeping = Keeping(torch.float32, torch.float32, cpu, cpu)
    model = load_module(
        component.build, part.recipes, part.tensors, part.files, keeping, part.names
    )
    return _read(reader, located[reader.part]), model


def find_parts(config: PipelineConfig, family: Family, names: Iterable[str]) -> dict[str, Located]:
    """Find the files of parts, and download what is missing where that is configured.

    Raises:
        ConfigError: Some are missing.
    """
    names = list(dict.fromkeys(names))

    def look() -> dict[str, Located]:
        return {name: locate_part(config, name, family.parts) for name in names}

    def missing(located: Mapping[str, Located]) -> list[Located]:
        return [
            entry
            for name, entry in located.items()
            if not (entry.complete or _can_be_without(config, family, name))
        ]

    located = look()
    if config.checkpoint.download and missing(located):
        download(config, missing(located))
        located = look()
    if missing(located):
        # Everything that a picture is going to need, so that one command gets it all.
        names = list(family.parts)
        require(config, missing(look()))
    return located


def _can_be_without(config: PipelineConfig, family: Family, name: str) -> bool:
    return family.parts[name].optional and getattr(config.checkpoint, name) is None


def read_component(
    family: Family, component: Component, located: Mapping[str, Located]
) -> PartFiles:
    """Read the headers of a component's files: what is wrong with them shows before loading.

    Raises:
        ConfigError: A file is incomplete, packed, or of another model.
    """
    if component.read is not None:
        return component.read(located[component.part])
    paths = located[component.part].paths
    tensors = read_headers(paths)
    names = _inside(tensors, component)
    inside = {plain: tensors[name] for plain, name in names.items()}
    if component.recipes is not None:
        recipes = component.recipes(inside)
    else:
        converted = component.convert({name: _Name(name) for name in inside})
        recipes = {ours: Recipe((str(theirs),)) for ours, theirs in converted.items()}
    if component.telling not in recipes:
        raise wrong_model(paths[0], tensors, component.title, family)
    check_plain(inside, paths[0])
    return PartFiles(paths, inside, names, recipes)


def part_names(located: Located) -> set[str]:
    """Names of all tensors in a part's files."""
    return set(read_headers(located.paths))


def _inside(tensors: Mapping[str, TensorInfo], component: Component) -> dict[str, str]:
    """Names in the file by name without a program's prefix."""
    if component.role == "denoiser":
        for prefix in PREFIXES:
            inside = {n[len(prefix) :]: n for n in tensors if n.startswith(prefix)}
            if component.telling in component.convert({n: _Name(n) for n in inside}):
                return inside
    return {name: name for name in tensors}


def _load(
    component: Component,
    part: PartFiles,
    storage: str,
    memory: MemorySettings,
    compute: torch.dtype,
    device: torch.device,
) -> nn.Module:
    home = torch.device("cpu") if memory.offload != "none" else device
    keeping = Keeping(
        linear=compute,
        compute=compute,
        device=device,
        home=home,
        by_layer=memory.offload == "layers",
        vram_limit=memory.vram_limit,
    )
    packed = component.role == "denoiser" and storage in PACKED_STORAGES
    if component.role == "text" and memory.text_storage == "float8":
        keeping = replace(keeping, linear=FLOAT8)
    elif component.role == "denoiser":
        kept = FLOAT8 if storage == "float8" else compute
        keeping = replace(keeping, linear=kept, home=torch.device("cpu") if packed else home)
    module = load_module(
        component.build, part.recipes, part.tensors, part.files, keeping, part.names
    )
    return pack(module, storage, device, home) if packed else module


def pack(dit: nn.Module, storage: str, device: torch.device, home: torch.device) -> nn.Module:
    """Let a library pack the linear layers in blocks, one at a time, through the device.

    The few layers outside the blocks are small, and quality depends on them. No LoRA may
    be put on the result by DiffSynth's own loader: it would add to the packed numbers.

    Raises:
        ConfigError: The library does not work here.
    """
    from diffsynth.core.quant import QuantizeConfig

    inside = [
        name
        for name, module in dit.named_modules()
        if isinstance(module, nn.Linear) and any(piece.isdigit() for piece in name.split("."))
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


def _read(reader: Reader, located: Located) -> Any:
    folder = located.paths[0]
    try:
        return reader.load(str(folder))
    except Exception as error:  # whatever the file makes of the library
        reason = shown(" ".join(str(error).split()))
        raise ConfigError(
            f"The tokenizer in {shown(folder)} cannot be read ({reason}); download it again."
        ) from error


def manage(
    pipe: Any, modules: Mapping[str, nn.Module], memory: MemorySettings, device: torch.device
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
