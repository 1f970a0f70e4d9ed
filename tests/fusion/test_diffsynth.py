"""Fusion beside DiffSynth's own code: its gates, its float8 layers, its FLUX blocks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autolora.fusion import FusedLinear, Gate, GateBank, attach, detach, load_gates
from tests.fusion.reference import (
    double,
    double_factors,
    gated_sum,
    model_shapes,
    random_adapter,
    random_factors,
    random_gate,
    random_gate_tensors,
)

# `import diffsynth` alone takes several seconds.
pytestmark = pytest.mark.slow


def test_published_gates_give_what_diffsynths_merger_gives(tmp_path):
    from diffsynth.models.flux_lora_patcher import FluxLoraPatcher
    from safetensors.torch import save_file

    torch.manual_seed(0)
    layers = {"blocks.0.attn.a_to_qkv": 24, "single_blocks.3.norm.linear": 12}
    patcher = FluxLoraPatcher([{"name": name, "dim": dim} for name, dim in layers.items()])
    for merger in patcher.model_dict.values():
        for norm in (merger.norm_base, merger.norm_lora):
            nn.init.normal_(norm.weight, 1, 0.3)
            nn.init.normal_(norm.bias)
    save_file(patcher.state_dict(), tmp_path / "model.safetensors")
    gates = load_gates(tmp_path / "model.safetensors")
    assert set(gates.layers) == set(layers)
    assert gates.state_dict().keys() == patcher.state_dict().keys()
    for layer, out in layers.items():
        base = nn.Linear(8, out)
        factors = random_factors([2, 4], 8, out, torch.Generator().manual_seed(1))
        x = torch.randn(2, 7, 8)
        with torch.no_grad():
            outputs = torch.stack([x @ a.T @ b.T for a, b in factors])
            theirs = patcher(base(x), outputs, layer)
            ours = FusedLinear(base, factors, gates[layer])(x)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("computation", [torch.bfloat16, torch.float32])
def test_float8_storage_stays_inside_and_untouched(computation):
    from diffsynth.core.vram.layers import AutoWrappedLinear

    torch.manual_seed(0)
    linear = nn.Linear(32, 48).to(torch.float8_e4m3fn).requires_grad_(False)
    stored = linear.weight.view(torch.uint8).clone()
    config = {"offload": torch.float8_e4m3fn, "onload": torch.float8_e4m3fn}
    config |= {"preparing": torch.float8_e4m3fn, "computation": computation}
    base = AutoWrappedLinear(
        linear,
        **{f"{stage}_dtype": dtype for stage, dtype in config.items()},
        **{f"{stage}_device": "cpu" for stage in config},
    )
    model = nn.Sequential(base)
    generator = torch.Generator().manual_seed(2)
    adapters = [(random_adapter(f"l{i}", {"0": (48, 32)}, 4, i), 0.7) for i in range(3)]
    tensors = random_gate_tensors(48, generator)
    x = torch.randn(2, 9, 32, generator=generator).to(computation)
    with torch.no_grad():
        y = base(x)
        attach(model, adapters, "gated", GateBank({"0": Gate.from_diffsynth(tensors)}))
        fused = model(x)
    factors = double_factors([adapter.factors("0") for adapter, _ in adapters])
    truth = gated_sum(y.double(), x.double(), factors, [0.7] * 3, double(tensors))
    assert fused.dtype == computation
    error = (fused.double() - truth).norm() / truth.norm()
    assert error < (3e-3 if computation == torch.bfloat16 else 1e-6)
    detach(model)
    assert model[0] is base
    assert base.weight.dtype == torch.float8_e4m3fn
    assert torch.equal(base.weight.view(torch.uint8), stored)


def test_flux_blocks_run_and_are_restored():
    from diffsynth.models.flux_dit import (
        FluxJointTransformerBlock,
        FluxSingleTransformerBlock,
        RoPEEmbedding,
    )

    torch.manual_seed(0)
    model = nn.Module()
    model.blocks = nn.ModuleList([FluxJointTransformerBlock(64, 1)])
    model.single_blocks = nn.ModuleList([FluxSingleTransformerBlock(64, 1)])
    model.requires_grad_(False)
    rope = RoPEEmbedding(64, 10000, [16, 24, 24])(torch.randn(1, 10, 3))
    image, text, emb = torch.randn(1, 6, 64), torch.randn(1, 4, 64), torch.randn(1, 64)

    def run():
        a, b = model.blocks[0](image, text, emb, rope)
        return model.single_blocks[0](torch.cat([b, a], 1), b, emb, rope)[0]

    shapes = model_shapes(model)
    before = run()
    generator = torch.Generator().manual_seed(3)
    gates = GateBank({layer: random_gate(out, generator) for layer, (out, _) in shapes.items()})
    report = attach(model, [(random_adapter("a", shapes, 4, 0), 1.0)], "gated", gates)
    assert set(report.layers) == set(shapes) and len(shapes) == 13
    assert report.ungated == ()
    after = run()
    assert torch.isfinite(after).all() and not torch.allclose(after, before)
    detach(model)
    assert torch.equal(run(), before)
