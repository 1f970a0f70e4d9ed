"""Files that hold no LoRA for any family, with words that the refusal must contain.

Key names are those of the programs: Black Forest Labs' Control LoRAs, sd-scripts' OFT, Nunchaku's
converted files, and LoRAs for other base models as their trainers name them.
"""

import torch
from torch import Tensor

RANK = 4


def _pairs(
    paths: list[str], names: tuple[str, str] = ("lora_A.weight", "lora_B.weight"), width: int = 32
) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for path in paths:
        tensors[f"{path}.{names[0]}"] = torch.randn(RANK, width, generator=random)
        tensors[f"{path}.{names[1]}"] = torch.randn(width, RANK, generator=random)
    return tensors


def _control() -> dict[str, Tensor]:
    tensors = _pairs(
        ["double_blocks.0.img_attn.qkv", "single_blocks.0.linear1", "final_layer.linear"]
    )
    tensors["double_blocks.0.img_attn.qkv.lora_B.bias"] = torch.zeros(32)
    tensors["double_blocks.0.img_attn.norm.query_norm.scale"] = torch.ones(8)
    tensors["double_blocks.0.img_attn.norm.key_norm.scale"] = torch.ones(8)
    tensors["img_in.lora_A.weight"] = torch.randn(RANK, 128)
    tensors["img_in.lora_B.weight"] = torch.randn(32, RANK)
    return tensors


def _oft() -> dict[str, Tensor]:
    path = "oft_unet_double_blocks_0_img_attn_proj"
    return {f"{path}.oft_blocks": torch.randn(4, 8, 8), f"{path}.alpha": torch.tensor(1.0)}


def _timestep() -> dict[str, Tensor]:
    path = "base_model.model.transformer_blocks.0.attn.to_q"
    tensors = _pairs([path])
    for name in ("gamma", "beta"):
        tensors[f"{path}.lora_time_{name}.weight"] = torch.randn(RANK, 16)
        tensors[f"{path}.lora_time_{name}.bias"] = torch.randn(RANK)
    return tensors


def _nunchaku() -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for part in ("qkv_proj", "out_proj", "mlp_fc1", "mlp_fc2"):
        tensors[f"single_transformer_blocks.0.{part}.lora_down"] = torch.randn(32, 16)
        tensors[f"single_transformer_blocks.0.{part}.lora_up"] = torch.randn(32, 16)
    tensors["transformer_blocks.0.mlp_context_fc1.lora_down"] = torch.randn(32, 16)
    tensors["transformer_blocks.0.mlp_context_fc1.lora_up"] = torch.randn(32, 16)
    return tensors


KOHYA = ("lora_down.weight", "lora_up.weight")

REFUSED: dict[str, tuple[dict[str, Tensor], tuple[str, ...]]] = {
    "BFL Control": (_control(), ("control",)),
    "OFT": (_oft(), ("oft",)),
    "timestep LoRA": (_timestep(), ("timestep",)),
    "token embeddings": (
        {"clip_l": torch.ones(2, 768), "t5": torch.ones(2, 4096)},
        ("token embedding",),
    ),
    "Nunchaku": (_nunchaku(), ("nunchaku",)),
    "Stable Diffusion 1.5": (
        _pairs(["lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"], KOHYA),
        ("stable diffusion",),
    ),
    "Stable Diffusion 3": (
        _pairs(["lora_unet_joint_blocks_0_x_block_attn_qkv"], KOHYA),
        ("stable diffusion 3",),
    ),
    "Wan": (
        _pairs(["diffusion_model.blocks.0.self_attn.q", "diffusion_model.blocks.0.ffn.0"]),
        ("wan",),
    ),
    "HunyuanVideo": (
        _pairs(
            [
                "transformer.double_blocks.0.img_attn_qkv",
                "transformer.double_blocks.0.img_attn_proj",
                "transformer.single_blocks.0.linear1",
            ]
        ),
        ("hunyuan",),
    ),
    "Chroma": (
        _pairs(
            [
                "diffusion_model.distilled_guidance_layer.layers.0.in_layer",
                "diffusion_model.double_blocks.0.img_attn.proj",
            ]
        ),
        ("chroma",),
    ),
}
"""Tensors by what they are, and words of the message in lower case."""
