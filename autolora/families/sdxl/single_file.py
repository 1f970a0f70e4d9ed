"""SDXL as people own it: one file with UNet, both CLIPs and autoencoder, by the names of sgm.

The layer table says what the UNet's layers are called there; normalizations stand beside them. The
second CLIP is open_clip's, which keeps q, k and v as one tensor and its projection transposed.
Importing this module imports DiffSynth.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache

from diffsynth.core.vram.initialization import skip_model_initialization
from diffsynth.models.stable_diffusion_xl_unet import SDXLUNet2DConditionModel

from autolora.families.detect import layer_table
from autolora.safetensors_io import Recipe, TensorInfo, count_blocks

UNET = "model.diffusion_model."
CLIP_L = "conditioner.embedders.0.transformer."
CLIP_G = "conditioner.embedders.1.model."
AUTOENCODER = "first_stage_model."
"""What stands before the names of each part."""
_Tensors = Mapping[str, TensorInfo]

# A normalization, the layer beside it, and what to replace in that layer's name.
_BESIDE = (
    (r"(.*resnets\.\d+)\.norm1", ".conv1", "in_layers.2", "in_layers.0"),
    (r"(.*resnets\.\d+)\.norm2", ".conv2", "out_layers.3", "out_layers.0"),
    (r"(.*attentions\.\d+)\.norm", ".proj_in", "proj_in", "norm"),
    (r"(.*transformer_blocks\.\d+)\.norm1", ".attn1.to_q", "attn1.to_q", "norm1"),
    (r"(.*transformer_blocks\.\d+)\.norm2", ".attn1.to_q", "attn1.to_q", "norm2"),
    (r"(.*transformer_blocks\.\d+)\.norm3", ".attn1.to_q", "attn1.to_q", "norm3"),
    (r"()conv_norm_out", "conv_out", "out.2", "out.0"),
)
_AUTOENCODER = (
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.block\.", r".up_blocks.\1.resnets."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
)
_CLIP_G = (
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
    ("attn.out_proj", "self_attn.out_proj"),
)


def unet_recipes(tensors: _Tensors) -> dict[str, Recipe]:
    """What the UNet's tensors are made of."""
    found = {ours: UNET + theirs for ours, theirs in _unet_names().items()}
    return {ours: Recipe((theirs,)) for ours, theirs in found.items() if theirs in tensors}


@lru_cache(maxsize=1)
def _unet_names() -> dict[str, str]:
    """Names of all tensors of the published UNet, as DiffSynth and as sgm call them."""
    with skip_model_initialization():
        model = SDXLUNet2DConditionModel(
            attention_head_dim=[5, 10, 20],
            transformer_layers_per_block=[1, 2, 10],
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    names = {}
    for name in model.state_dict():
        path, _, kind = name.rpartition(".")
        names[name] = f"{_sgm_path(path)}.{kind}"
    return names


def _sgm_path(path: str) -> str:
    for pattern, beside, old, new in _BESIDE:
        if match := re.fullmatch(pattern, path):
            return _spelled(match[1] + beside).replace(old, new)
    return _spelled(path)


def _spelled(path: str) -> str:
    return layer_table("sdxl").spell(path, "original")[0][0]


def clip_l_recipes(tensors: _Tensors) -> dict[str, Recipe]:
    """What the first CLIP's tensors are made of."""
    return {
        f"model.{name.removeprefix(CLIP_L)}": Recipe((name,))
        for name in tensors
        if name.startswith(CLIP_L) and not name.endswith("position_ids")
    }


def clip_g_recipes(tensors: _Tensors) -> dict[str, Recipe]:
    """What the second CLIP's tensors are made of."""
    recipes = {
        f"model.{ours}": Recipe((CLIP_G + theirs,))
        for ours, theirs in (
            ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
            ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
            ("text_model.final_layer_norm.weight", "ln_final.weight"),
            ("text_model.final_layer_norm.bias", "ln_final.bias"),
        )
        if CLIP_G + theirs in tensors
    }
    if CLIP_G + "text_projection" in tensors:
        source = (CLIP_G + "text_projection",)
        recipes["model.text_projection.weight"] = Recipe(source, transposed=True)
    blocks = f"{CLIP_G}transformer.resblocks"
    for i in range(count_blocks(tensors, blocks)):
        recipes |= dict(_clip_g_block(f"{blocks}.{i}.", f"model.text_model.encoder.layers.{i}."))
    return recipes


def _clip_g_block(theirs: str, ours: str) -> Iterator[tuple[str, Recipe]]:
    for kind in ("weight", "bias"):
        for their_name, our_name in _CLIP_G:
            yield f"{ours}{our_name}.{kind}", Recipe((f"{theirs}{their_name}.{kind}",))
        fused = (f"{theirs}attn.in_proj_{kind}",)
        for n, letter in enumerate("qkv"):
            yield f"{ours}self_attn.{letter}_proj.{kind}", Recipe(fused, part=(n, 3))


def autoencoder_recipes(tensors: _Tensors) -> dict[str, Recipe]:
    """What the autoencoder's tensors are made of; sgm counts the decoder's stages backwards."""
    inside = {n.removeprefix(AUTOENCODER): n for n in tensors if n.startswith(AUTOENCODER)}
    last = count_blocks(inside, "decoder.up") - 1
    recipes = {}
    for name, source in inside.items():
        renamed = re.sub(r"\.up\.(\d+)\.", lambda m: f".up.{last - int(m[1])}.", name)
        for pattern, replacement in _AUTOENCODER:
            renamed = re.sub(pattern, replacement, renamed)
        # Linear layers in DiffSynth, 1 x 1 convolutions here.
        flat = ".attentions.0.to_" in renamed and len(tensors[source].shape) == 4
        recipes[renamed] = Recipe((source,), trailing=-2 if flat else 0)
    return recipes
