"""From the tensor names of published FLUX.1 files to the canonical ones.

The layer tables say, for every canonical layer, which layers of a file it is made of: one in BFL's
layout, several on top of each other where diffusers split q, k, v and the MLP. Nothing here needs
torch: a `Recipe` says what to read, `shape_of` what will come of it, and only `cook` touches data.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from autolora.families.flux1.layers import LAYERS
from autolora.families.flux1.others import Layout
from autolora.families.flux1.sizes import count_blocks
from autolora.safetensors_io import Recipe, TensorInfo

_DIALECTS: tuple[tuple[Layout, str, str], ...] = (
    ("bfl", "original", "scale"),
    ("diffusers", "diffusers", "weight"),
)
"""Per layout: its dialect, and what it calls a normalization's only tensor."""


def _table() -> dict[Layout, dict[str, tuple[str, ...]]]:
    """What every canonical tensor is made of in each layout, from the table of layers."""
    found: dict[Layout, dict[str, tuple[str, ...]]] = {"bfl": {}, "diffusers": {}}
    for row in LAYERS.rows:
        for layout, dialect, norm in _DIALECTS:
            paths = [spelling.path for spelling in row.spellings[dialect]]
            for suffix in ("weight",) if row.is_norm else ("weight", "bias"):
                theirs = norm if row.is_norm else suffix
                found[layout][f"{row.template}.{suffix}"] = tuple(f"{p}.{theirs}" for p in paths)
    return found


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
