"""From the tensor names of published FLUX.1 files to the canonical ones.

The layer tables say, for every canonical layer, which layers of a file it is made of: one in BFL's
layout, several on top of each other where diffusers split q, k, v and the MLP. Nothing here needs
torch: a `Recipe` says what to read, `shape_of` what will come of it, and only `cook` touches data.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

from autolora.families.flux1.others import Layout
from autolora.families.flux1.sizes import count_blocks
from autolora.safetensors_io import Recipe, TensorInfo

if TYPE_CHECKING:
    pass


_STREAMS: tuple[tuple[str, str, str, tuple[str, ...], str], ...] = (
    ("a", "img", "", ("to_q", "to_k", "to_v"), "to_out.0"),
    ("b", "txt", "_context", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out"),
)
"""Per stream: our letter, BFL's word, and diffusers' suffix and names of the attention's layers."""


def _linear_sources() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Canonical template, BFL's name, and diffusers' names of every linear layer."""
    for stream, bfl, suffix, qkv, out in _STREAMS:
        ours, theirs, other = "blocks.{i}.", "double_blocks.{i}." + bfl, "transformer_blocks.{i}."
        ff = f"{other}ff{suffix}.net"
        yield f"{ours}attn.{stream}_to_qkv", f"{theirs}_attn.qkv", _of(other + "attn.", qkv)
        yield f"{ours}attn.{stream}_to_out", f"{theirs}_attn.proj", (f"{other}attn.{out}",)
        yield f"{ours}ff_{stream}.0", f"{theirs}_mlp.0", (f"{ff}.0.proj",)
        yield f"{ours}ff_{stream}.2", f"{theirs}_mlp.2", (f"{ff}.2",)
        yield f"{ours}norm1_{stream}.linear", f"{theirs}_mod.lin", (f"{other}norm1{suffix}.linear",)
    single, other = "single_blocks.{i}.", "single_transformer_blocks.{i}."
    fused = _of(other, ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"))
    yield f"{single}to_qkv_mlp", f"{single}linear1", fused
    yield f"{single}proj_out", f"{single}linear2", (f"{other}proj_out",)
    yield f"{single}norm.linear", f"{single}modulation.lin", (f"{other}norm.linear",)
    for ours, bfl, theirs in (
        ("time_embedder.timestep_embedder", "time_in", "timestep_embedder"),
        ("guidance_embedder.timestep_embedder", "guidance_in", "guidance_embedder"),
        ("pooled_text_embedder", "vector_in", "text_embedder"),
    ):
        yield f"{ours}.0", f"{bfl}.in_layer", (f"time_text_embed.{theirs}.linear_1",)
        yield f"{ours}.2", f"{bfl}.out_layer", (f"time_text_embed.{theirs}.linear_2",)
    yield "x_embedder", "img_in", ("x_embedder",)
    yield "context_embedder", "txt_in", ("context_embedder",)
    yield "final_proj_out", "final_layer.linear", ("proj_out",)
    yield "final_norm_out.linear", "final_layer.adaLN_modulation.1", ("norm_out.linear",)


def _norm_sources() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """The same for the norms of queries and keys, with the whole names of their one tensor."""
    for which, word in (("q", "query"), ("k", "key")):
        for stream, bfl, added in (("a", "img", ""), ("b", "txt", "added_")):
            yield (
                f"blocks.{{i}}.attn.norm_{which}_{stream}.weight",
                f"double_blocks.{{i}}.{bfl}_attn.norm.{word}_norm.scale",
                (f"transformer_blocks.{{i}}.attn.norm_{added}{which}.weight",),
            )
        yield (
            f"single_blocks.{{i}}.norm_{which}_a.weight",
            f"single_blocks.{{i}}.norm.{word}_norm.scale",
            (f"single_transformer_blocks.{{i}}.attn.norm_{which}.weight",),
        )


def _of(prefix: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(prefix + name for name in names)


def _table() -> dict[Layout, dict[str, tuple[str, ...]]]:
    bfl: dict[str, tuple[str, ...]] = {}
    diffusers: dict[str, tuple[str, ...]] = {}
    for ours, one, several in _linear_sources():
        for suffix in (".weight", ".bias"):
            bfl[ours + suffix] = (one + suffix,)
            diffusers[ours + suffix] = tuple(name + suffix for name in several)
    for ours, one, several in _norm_sources():
        bfl[ours], diffusers[ours] = (one,), several
    return {"bfl": bfl, "diffusers": diffusers}


_TABLE = _table()
_BLOCKS: Mapping[Layout, tuple[str, str]] = {
    "bfl": ("double_blocks", "single_blocks"),
    "diffusers": ("transformer_blocks", "single_transformer_blocks"),
}


def transformer_recipes(
    names: Collection[str], layout: Layout
) -> tuple[dict[str, Recipe], list[str]]:
    """Say what every canonical tensor of a transformer is made of.

    Args:
        names: Names in the file, without prefix.
        layout: The layout of the file.

    Returns:
        Recipes by canonical name, and the names that no recipe uses. What is made of several
        tensors and lacks one is not in the recipes, and its other sources are left over.
    """
    there = set(names)
    double, single = (count_blocks(there, kind) for kind in _BLOCKS[layout])
    recipes: dict[str, Recipe] = {}
    for ours, sources in _TABLE[layout].items():
        count = single if ours.startswith("single_blocks.") else double
        for i in range(count) if "{i}" in ours else (0,):
            wanted = tuple(name.replace("{i}", str(i)) for name in sources)
            if there.issuperset(wanted):
                swap = layout == "diffusers" and ours.startswith("final_norm_out.")
                recipes[ours.replace("{i}", str(i))] = Recipe(wanted, swap)
    used = {name for recipe in recipes.values() for name in recipe.sources}
    return recipes, sorted(there - used)


_VAE_RULES: tuple[tuple[str, str], ...] = (
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.group_norm\.", ".mid.attn_1.norm."),
    (r"\.mid_block\.attentions\.0\.to_out\.0\.", ".mid.attn_1.proj_out."),
    (r"\.mid_block\.attentions\.0\.to_([qkv])\.", r".mid.attn_1.\1."),
    (r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.up_blocks\.(\d+)\.resnets\.", r".up.\1.block."),
    (r"\.up_blocks\.(\d+)\.upsamplers\.0\.", r".up.\1.upsample."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
)


def autoencoder_names(tensors: Mapping[str, TensorInfo]) -> dict[str, Recipe]:
    """Say what the tensors of an autoencoder are made of, by BFL's names.

    Args:
        tensors: A file in BFL's or diffusers' layout.

    Returns:
        Recipes by BFL's names. Diffusers count the decoder's stages the other way round, and keep
        the attention's 1 x 1 convolutions as linear layers.
    """
    if not any(".mid_block." in name for name in tensors):
        return {name: Recipe((name,)) for name in tensors}
    stages = 1 + max(
        (int(m[1]) for name in tensors if (m := re.match(r"decoder\.up_blocks\.(\d+)\.", name))),
        default=0,
    )
    recipes = {}
    for name, info in tensors.items():
        renamed = name
        for pattern, replacement in _VAE_RULES:
            renamed = re.sub(pattern, replacement, renamed)
        renamed = re.sub(
            r"\.up\.(\d+)\.", lambda match: f".up.{stages - 1 - int(match[1])}.", renamed
        )
        linear = ".attn_1." in renamed and renamed.endswith(".weight") and len(info.shape) == 2
        recipes[renamed] = Recipe((name,), trailing=2 if linear else 0)
    return recipes
