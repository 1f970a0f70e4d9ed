"""A header's alpha holds for every module, whatever stands before its name."""

import json

import pytest
import torch
from safetensors.torch import save_file

from autolora import LoRA


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_modules_at_the_top_take_it_too(tmp_path, prefix):
    factors, tensors = {}, {}
    for name, (rows, columns) in {
        "transformer_blocks.0.img_mod.1": (18432, 3072),
        "txt_in": (3072, 3584),
    }.items():
        a, b = torch.randn(4, columns), torch.randn(rows, 4)
        factors[name] = a, b
        tensors[f"{prefix}{name}.lora_A.weight"] = a
        tensors[f"{prefix}{name}.lora_B.weight"] = b
    config = {"transformer.lora_alpha": 2, "transformer.r": 4}
    file = tmp_path / "qwen.safetensors"
    save_file(tensors, str(file), metadata={"lora_adapter_metadata": json.dumps(config)})
    lora = LoRA.load(file)
    for name, (a, b) in factors.items():
        expected = 0.5 * (b.double() @ a.double())
        torch.testing.assert_close(lora.delta(name).double(), expected, rtol=1e-5, atol=1e-5)
