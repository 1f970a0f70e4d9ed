"""Reads the headers of FLUX.1's files. Needs neither torch nor DiffSynth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from autolora.errors import ConfigError, shown
from autolora.families.flux1.checkpoint_names import transformer_recipes
from autolora.families.flux1.others import check_plain, check_transformer, strip_prefix
from autolora.families.flux1.sizes import FLUX1_DEV, PUBLISHED, FluxSizes
from autolora.families.headers import PartFiles
from autolora.runtime.checkpoints import Located
from autolora.runtime.memory import ModelSizes
from autolora.safetensors_io import TensorInfo, read_headers

_CLIP_TABLE = ("text_model.embeddings.token_embedding.weight", "embeddings.token_embedding.weight")
_T5_TABLE = ("shared.weight", "encoder.embed_tokens.weight")
_LAST_NORM = ("decoder.norm_out.weight", "decoder.conv_norm_out.weight")


def read_transformer(located: Located) -> PartFiles:
    """Read the headers of a transformer and say what the canonical tensors are made of.

    Raises:
        ConfigError: It is incomplete, or no FLUX.1 transformer.
    """
    everything = read_headers(located.paths)
    names = strip_prefix(everything)
    tensors = {plain: everything[name] for plain, name in names.items()}
    layout = check_transformer(tensors, located.paths[0])
    recipes, leftover = transformer_recipes(tensors, layout)
    if leftover:
        few = ", ".join(shown(name, 80) for name in leftover[:3])
        raise ConfigError(
            f"The checkpoint {shown(located.paths[0])} has {len(leftover)} tensors that FLUX.1 "
            f"does not have or that lack their counterparts, such as {few}; it is for another "
            "model or damaged."
        )
    return PartFiles(located.paths, tensors, names, recipes)


def flux_sizes(located: Located) -> FluxSizes:
    """Sizes of a transformer.

    Raises:
        ConfigError: It is incomplete, or no FLUX.1 transformer.
    """
    part = read_transformer(located)
    try:
        return FluxSizes.from_shapes(part.shapes())
    except (KeyError, ValueError, IndexError) as error:
        raise _no_sizes(part.files[0], error) from error


def model_sizes(located: Mapping[str, Located]) -> ModelSizes:
    """Sizes of all parts; the published ones for parts that are not there.

    Args:
        located: Parts by name, as `autolora.runtime.checkpoints.locate` gives them.

    Raises:
        ConfigError: A file is incomplete or of another model, or they do not belong together.
    """
    there = {name: entry for name, entry in located.items() if entry.complete}
    flux = flux_sizes(there["transformer"]) if "transformer" in there else PUBLISHED
    headers: dict[str, Mapping[str, TensorInfo]] = {
        name: read_headers(there[name].paths)
        for name in ("text_encoder", "text_encoder_2", "vae")
        if name in there
    }
    if "transformer" in there:
        _check_widths(flux, headers, there)
    counts = {name: _count(tensors) for name, tensors in headers.items()}
    norms = [headers["vae"][n].shape[0] for n in _LAST_NORM if n in headers.get("vae", {})]
    return ModelSizes(
        denoiser=flux,
        text_encoder=counts.get("text_encoder", FLUX1_DEV.text_encoder),
        text_encoder_2=counts.get("text_encoder_2", FLUX1_DEV.text_encoder_2),
        vae=counts.get("vae", FLUX1_DEV.vae),
        vae_channels=norms[0] if norms else FLUX1_DEV.vae_channels,
    )


def check_part(located: Located) -> None:
    """Look at the headers of a part's files.

    Raises:
        ConfigError: One is incomplete, packed, or of another model.
    """
    if located.part == "transformer":
        flux_sizes(located)
    else:
        check_plain(read_headers(located.paths), located.paths[0])


def _count(tensors: Mapping[str, TensorInfo]) -> int:
    """Number of weights; T5's table of words counts once where a file has it twice."""
    twice = all(name in tensors for name in _T5_TABLE)
    return sum(info.size for name, info in tensors.items() if not (twice and name == _T5_TABLE[1]))


def _check_widths(
    flux: FluxSizes,
    headers: Mapping[str, Mapping[str, TensorInfo]],
    located: Mapping[str, Located],
) -> None:
    for part, tables, wanted, word in (
        ("text_encoder", _CLIP_TABLE, flux.pooled_dim, "CLIP"),
        ("text_encoder_2", _T5_TABLE, flux.text_dim, "T5"),
    ):
        tensors = headers.get(part)
        if tensors is None:
            continue
        widths = [tensors[name].shape[-1] for name in tables if name in tensors]
        if widths and widths[0] != wanted:
            raise ConfigError(
                f"The checkpoint {shown(located['transformer'].paths[0])} reads {wanted} channels "
                f"from {word}, but {shown(located[part].paths[0])} gives {widths[0]}; take the "
                "text encoders that belong to it."
            )


def _no_sizes(path: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"The checkpoint {shown(path)} lacks what tells its sizes ({shown(error)}); download it "
        "again."
    )
