"""Files that PEFT itself saves, against what PEFT itself merges."""

import pytest
import torch
from torch import nn

from autolora.lora import LoRA
from tests.lora.lora_files import relative_error

peft = pytest.importorskip("peft")

WIDTH = 16


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention()
        self.proj_mlp = nn.Linear(WIDTH, 4 * WIDTH)
        self.proj_out = nn.Linear(5 * WIDTH, WIDTH)


class Transformer(nn.Module):
    """One single block, with diffusers' names."""

    def __init__(self):
        super().__init__()
        self.single_transformer_blocks = nn.ModuleList([Block()])

    def forward(self, x):
        return x


NAMES = ["to_q", "to_k", "to_v", "proj_mlp", "proj_out"]
LORA = {"r": 3, "lora_alpha": 5, "target_modules": NAMES, "init_lora_weights": False}
CONFIGS = {
    "plain": lambda: peft.LoraConfig(**LORA),
    "patterns": lambda: peft.LoraConfig(
        **LORA, rank_pattern={"attn.to_k": 5}, alpha_pattern={"to_v": 7}
    ),
    "rank-stabilized": lambda: peft.LoraConfig(**LORA, use_rslora=True),
    "bias": lambda: peft.LoraConfig(**LORA, lora_bias=True),
    "DoRA": lambda: peft.LoraConfig(**LORA, use_dora=True),
    "LoHa": lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=NAMES, init_weights=False),
    "LoKr": lambda: peft.LoKrConfig(
        r=1, alpha=5, target_modules=NAMES, init_weights=False, decompose_both=True
    ),
    "LoKr with full matrices": lambda: peft.LoKrConfig(
        r=40, alpha=5, target_modules=NAMES, init_weights=False, rank_pattern={"to_k": 20}
    ),
}


def fused(block):
    """Weights and biases by canonical layer."""
    parts = [block.attn.to_q, block.attn.to_k, block.attn.to_v, block.proj_mlp]
    joined = [
        torch.cat([getattr(part, kind).data for part in parts]) for kind in ("weight", "bias")
    ]
    return {
        "single_blocks.0.to_qkv_mlp": joined,
        "single_blocks.0.proj_out": [block.proj_out.weight.data, block.proj_out.bias.data],
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_delta_is_what_peft_merges(tmp_path, name):
    torch.manual_seed(0)
    model = Transformer().double()
    before = {
        layer: [value.clone() for value in pair]
        for layer, pair in fused(model.single_transformer_blocks[0]).items()
    }
    adapted = peft.get_peft_model(model, CONFIGS[name]())
    for key, value in adapted.named_parameters():
        if "lora_B.default.bias" in key or "magnitude" in key:
            nn.init.uniform_(value, 0.5, 1.5)
    adapted.save_pretrained(tmp_path)
    after = fused(adapted.merge_and_unload().single_transformer_blocks[0])
    lora = LoRA.load(tmp_path / "adapter_model.safetensors")
    assert lora.report.dropped == {} and lora.report.format == "peft"
    assert lora.layers == sorted(before)
    for layer, (weight, bias) in before.items():
        truth = after[layer][0] - weight
        assert relative_error(lora.delta(layer, weight), truth) < 1e-6
        if name == "bias":
            assert relative_error(lora.bias(layer), after[layer][1] - bias) < 1e-6
        else:
            assert lora.bias(layer) is None
