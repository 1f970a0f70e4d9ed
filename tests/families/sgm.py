"""Writes a small SDXL as the one file that people share, from its folders; names by hand."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTER = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_path(path: str) -> str:
    """The path of a module of a UNet with two resnets per stage."""
    if path in _OUTER:
        return _OUTER[path]
    mid = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", path)
    if mid:
        number = 1 if mid[1] == "attentions" else 2 * int(mid[2])
        return f"middle_block.{number}.{_RESNET.get(mid[3], mid[3])}"
    side, stage, kind, number, rest = re.fullmatch(
        r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", path
    ).groups()
    i, j = int(stage), int(number)
    if kind == "downsamplers":
        return f"input_blocks.{3 * (i + 1)}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{3 * i + 2}.2.conv"  # the stages that grow have transformers
    block = f"input_blocks.{3 * i + j + 1}" if side == "down" else f"output_blocks.{3 * i + j}"
    return f"{block}.{0 if kind == 'resnets' else 1}.{_RESNET.get(rest, rest)}"


def autoencoder_name(name: str, stages: int) -> str:
    """The name of an autoencoder's tensor."""
    name = re.sub(r"up_blocks\.(\d)", lambda m: f"up_blocks.{stages - 1 - int(m[1])}", name)
    for ours, theirs in (
        ("mid_block.resnets.0", "mid.block_1"),
        ("mid_block.resnets.1", "mid.block_2"),
        ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
        ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
        ("mid_block.attentions.0.to_", "mid.attn_1."),
        ("downsamplers.0", "downsample"),
        ("upsamplers.0", "upsample"),
        ("_blocks", ""),
        ("resnets", "block"),
        ("conv_shortcut", "nin_shortcut"),
        ("conv_norm_out", "norm_out"),
    ):
        name = name.replace(ours, theirs)
    return name


def open_clip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """CLIP with a projection, as open_clip keeps it."""
    tensors = {n.removeprefix("text_model."): t for n, t in tensors.items()}
    found = {
        "token_embedding.weight": tensors["embeddings.token_embedding.weight"],
        "positional_embedding": tensors["embeddings.position_embedding.weight"],
        "ln_final.weight": tensors["final_layer_norm.weight"],
        "ln_final.bias": tensors["final_layer_norm.bias"],
        "text_projection": tensors["text_projection.weight"].T.contiguous(),
        "logit_scale": torch.tensor(4.6),
    }
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc"}
    names |= {"mlp.fc2": "mlp.c_proj", "self_attn.out_proj": "attn.out_proj"}
    for i in range(3):
        here, there = f"encoder.layers.{i}.", f"transformer.resblocks.{i}."
        for kind in ("weight", "bias"):
            for ours, theirs in names.items():
                found[f"{there}{theirs}.{kind}"] = tensors[f"{here}{ours}.{kind}"]
            rows = [tensors[f"{here}self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            found[f"{there}attn.in_proj_{kind}"] = torch.cat(rows)
    return found


def write_one_file(folders: Path, root: Path) -> Path:
    """Write the model in diffusers' folders as one file, beside its tokenizers."""
    root.mkdir(parents=True)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(folders / name, root / name)
    tensors: dict[str, Tensor] = {}
    for name, value in load_file(folders / "unet/diffusion_pytorch_model.safetensors").items():
        path, _, kind = name.rpartition(".")
        tensors[f"model.diffusion_model.{unet_path(path)}.{kind}"] = value
    for name, value in load_file(folders / "vae/diffusion_pytorch_model.safetensors").items():
        if ".attentions.0.to_" in name and value.dim() == 2:
            value = value[..., None, None].contiguous()
        tensors[f"first_stage_model.{autoencoder_name(name, 4)}"] = value
    for name, value in load_file(folders / "text_encoder/model.safetensors").items():
        inner = name.removeprefix("text_model.")
        tensors[f"conditioner.embedders.0.transformer.text_model.{inner}"] = value
    second = open_clip(load_file(folders / "text_encoder_2/model.safetensors"))
    tensors |= {f"conditioner.embedders.1.model.{n}": t for n, t in second.items()}
    save_file(tensors, str(root / "anything-xl.safetensors"))
    return root
