"""Every format of FLUX.2, Z-Image, Qwen-Image and SDXL against the float64 truth."""

import pytest
import torch

from autolora import LoRA
from autolora.lora import save_lora
from tests.lora.truth.families import FAMILY_CASES


@pytest.mark.parametrize("name", FAMILY_CASES)
def test_every_layer_is_exact(tmp_path, name):
    truth = FAMILY_CASES[name]()
    lora = LoRA.load(truth.save(tmp_path))
    assert lora.family == truth.family
    assert set(lora.layers) == set(truth.changes)
    again = {"the same change again under another name"} if "at once" in name else set()
    assert set(lora.report.dropped.values()) == again
    for layer, change in truth.changes.items():
        assert lora.shape(layer) == tuple(change.shape)
        delta = lora.delta(layer)
        assert delta.dtype == torch.float32
        assert (delta - change).norm() <= 1e-6 * change.norm(), layer
        if lora.exact(layer):
            down, up = lora.factors(layer)
            product = (up.double() @ down.double()).reshape(change.shape)
            assert (product - change).norm() <= 1e-6 * change.norm(), layer


FORMATS = ("kohya", "diffusers", "peft", "ai-toolkit", "lycoris", "bfl", "diffsynth")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "family", ["flux2/kohya", "z_image/kohya", "qwen_image/kohya", "sdxl/LoCon"]
)
def test_what_is_saved_is_read_again(tmp_path, family, format):
    truth = FAMILY_CASES[family]()
    lora = LoRA.load(truth.save(tmp_path))
    factors = {layer: lora.factors(layer) for layer in lora.layers}
    path = save_lora(tmp_path / "again.safetensors", factors, format, family=truth.family, alpha=3)
    again = LoRA.load(path)
    assert again.family == truth.family
    assert again.layers == lora.layers
    for layer, change in truth.changes.items():
        assert (again.delta(layer) - change).norm() <= 1e-5 * change.norm(), layer


def test_some_of_a_fused_module_is_written_with_zeros(tmp_path):
    factors = {"transformer_blocks.0.attn.to_k": (torch.randn(2, 24), torch.randn(24, 2))}
    path = save_lora(tmp_path / "k.safetensors", factors, "ai-toolkit", family="flux2")
    lora = LoRA.load(path, family="flux2")
    truth = factors["transformer_blocks.0.attn.to_k"]
    for name in ("to_q", "to_k", "to_v"):
        delta = lora.delta(f"transformer_blocks.0.attn.{name}")
        wanted = truth[1] @ truth[0] if name == "to_k" else torch.zeros(24, 24)
        assert torch.allclose(delta, wanted, atol=1e-6)
