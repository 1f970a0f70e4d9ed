"""Reads the headers of a base model's files: sizes, layout and whether the model is the right one.

Needs neither torch nor DiffSynth.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from autolora.errors import ConfigError, shown
from autolora.families.base import Family
from autolora.families.flux1.others import PREFIXES, check_plain, other_family
from autolora.runtime.checkpoints import Located
from autolora.runtime.memory import ModelSizes
from autolora.safetensors_io import Recipe, TensorInfo, read_headers, shape_of

_LAST_NORM = ("decoder.norm_out.weight", "decoder.conv_norm_out.weight", "decoder.conv_in.bias")


@dataclass
class PartFiles:
    """Files of a part, and what its tensors are made of.

    Attributes:
        files: The file, or all shards.
        tensors: Headers by name.
        names: Names in the files by name in ``tensors``; None where they are the same.
        recipes: What the module's tensors are made of.
    """

    files: tuple[Path, ...]
    tensors: dict[str, TensorInfo]
    names: dict[str, str] | None = None
    recipes: dict[str, Recipe] = field(default_factory=dict)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the module's tensors."""
        return {name: shape_of(recipe, self.tensors) for name, recipe in self.recipes.items()}


@dataclass(frozen=True)
class HeaderSizes:
    """Sizes of a denoiser.

    Attributes:
        parameters: Its weights.
        width: Channels that most of its layers take.
        text_dim: Channels of the text that it reads; its width where no tensor tells.
        shapes: ``(out, in)`` of its linear layers by name.
        weights: Shapes of all its weights that are no vectors by name.
    """

    parameters: int
    width: int
    text_dim: int
    shapes: dict[str, tuple[int, int]]
    weights: dict[str, tuple[int, ...]]

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """``(out, in)`` of every linear layer by its name in the file."""
        return self.shapes


def inside(tensors: Mapping[str, TensorInfo], telling: tuple[str, ...]) -> dict[str, str]:
    """Names in a file by name without a program's prefix, where one prefix holds the denoiser.

    Args:
        tensors: All of the file.
        telling: Names of which the denoiser has one.
    """
    for prefix in PREFIXES:
        if any(prefix + name in tensors for name in telling):
            return {n[len(prefix) :]: n for n in tensors if n.startswith(prefix)}
    return {name: name for name in tensors}


def read_denoiser(family: Family, located: Located) -> dict[str, TensorInfo]:
    """Read the headers of a denoiser's files, without prefix.

    Raises:
        ConfigError: A file is incomplete, packed, or of another model.
    """
    tensors = read_headers(located.paths)
    names = inside(tensors, family.telling)
    if names.keys().isdisjoint(family.telling):
        raise wrong_model(located.paths[0], tensors, f"{family.title}'s denoiser", family)
    found = {plain: tensors[name] for plain, name in names.items()}
    check_plain(found, located.paths[0])
    return found


def wrong_model(
    path: Path, tensors: Mapping[str, TensorInfo], title: str, family: Family
) -> ConfigError:
    """Say what a file is where it is not what was looked for."""
    other = other_family(tensors)
    if other is not None:
        return ConfigError(
            f"{shown(path)} is {other}, not {title}; give a checkpoint of {family.title}."
        )
    few = ", ".join(shown(name, 60) for name in list(tensors)[:3])
    return ConfigError(
        f"{shown(path)} is not {title} (its tensors are named {few}, ...); give a checkpoint of "
        f"{family.title}."
    )


def model_sizes(family: Family, located: Mapping[str, Located]) -> ModelSizes | None:
    """Sizes of all parts; None where the denoiser is not there.

    Raises:
        ConfigError: A file is incomplete or of another model.
    """
    there = {name: entry for name, entry in located.items() if entry.complete}
    if "transformer" not in there:
        return None
    denoiser = read_denoiser(family, there["transformer"])
    linears = {
        name.removesuffix(".weight"): (info.shape[0], info.shape[1])
        for name, info in denoiser.items()
        if name.endswith(".weight") and len(info.shape) == 2
    }
    weights = {
        name.removesuffix(".weight"): info.shape
        for name, info in denoiser.items()
        if name.endswith(".weight") and len(info.shape) > 1
    }
    width = Counter(inner for _, inner in linears.values()).most_common(1)[0][0]
    parameters = sum(i.size for i in denoiser.values())
    everything = read_headers(there["transformer"].paths).values()
    headers = {
        name: read_headers(there[name].paths)
        for name in ("text_encoder", "text_encoder_2", "vae")
        if name in there
    }
    counts = {name: sum(i.size for i in found.values()) for name, found in headers.items()}
    last = [headers["vae"][n].shape[0] for n in _LAST_NORM if n in headers.get("vae", {})]
    return ModelSizes(
        denoiser=HeaderSizes(parameters, width, width, linears, weights),
        # A file with all parts is counted as a whole.
        text_encoder=counts.get("text_encoder", 0) + sum(i.size for i in everything) - parameters,
        text_encoder_2=counts.get("text_encoder_2", 0),
        vae=counts.get("vae", 0),
        vae_channels=last[0] if last else 128,
    )


def check_part(family: Family, located: Located) -> None:
    """Look at the headers of a part's files.

    Raises:
        ConfigError: One is incomplete, packed, or of another model.
    """
    if located.part == "transformer":
        read_denoiser(family, located)
    else:
        check_plain(read_headers(located.paths), located.paths[0])
