"""The gates of a model and their file."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from autolora.errors import FusionError
from autolora.fusion import GateBank, load_gates, save_gates
from tests.fusion.reference import random_gate, random_gate_tensors

LAYERS = ("blocks.0.attn.a_to_qkv", "single_blocks.11.norm.linear")


def make_bank() -> GateBank:
    generator = torch.Generator().manual_seed(0)
    gates = {layer: random_gate(5 + i, generator) for i, layer in enumerate(LAYERS)}
    return GateBank(gates, {"trained_on": "tiny"})


def published_tensors(prefix: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        f"{prefix}{layer.replace('.', '___')}.{name}": tensor
        for layer in LAYERS
        for name, tensor in random_gate_tensors(4, generator).items()
    }


def test_a_bank_is_a_mapping_by_canonical_name():
    bank = make_bank()
    assert bank.layers == LAYERS and list(bank) == list(LAYERS) and len(bank) == 2
    assert LAYERS[1] in bank and "blocks.0" not in bank and 3 not in bank
    assert bank[LAYERS[1]].out_features == 6
    assert bank.get("blocks.9.ff_a.0") is None
    assert dict(bank.items())[LAYERS[0]] is bank[LAYERS[0]]
    assert len(list(bank.parameters())) == 18


def test_save_and_load_keep_every_bit_and_the_metadata(tmp_path):
    bank = make_bank()
    path = tmp_path / "new" / "gates.safetensors"
    save_gates(bank, path, {"steps": "100"})
    loaded = load_gates(path)
    assert loaded.metadata == {"trained_on": "tiny", "steps": "100"}
    assert loaded.layers == bank.layers
    for name, tensor in bank.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_file_has_the_published_names(tmp_path):
    save_gates(make_bank(), tmp_path / "gates.safetensors")
    with safe_open(tmp_path / "gates.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(published_tensors("model_dict."))


@pytest.mark.parametrize("prefix", ["model_dict.", ""])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_published_files_load_with_and_without_prefix(tmp_path, prefix, dtype):
    tensors = {key: tensor.to(dtype) for key, tensor in published_tensors(prefix).items()}
    save_file(tensors, tmp_path / "gates.safetensors")
    bank = load_gates(tmp_path / "gates.safetensors")
    assert set(bank.layers) == set(LAYERS)
    weight = bank[LAYERS[0]].weight_base
    assert weight.dtype == torch.float32
    assert torch.equal(weight, tensors[f"{prefix}blocks___0___attn___a_to_qkv.weight_base"].float())


def test_neutral_gates_fit_the_layers():
    bank = GateBank.neutral({"blocks.0.ff_a.0": (8, 2)})
    assert bank["blocks.0.ff_a.0"].out_features == 8
    assert bank["blocks.0.ff_a.0"].is_neutral()


def spoil(change) -> dict[str, torch.Tensor]:
    tensors = published_tensors("")
    change(tensors)
    return tensors


FIRST = "blocks___0___attn___a_to_qkv.weight_base"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(FIRST), "layer blocks.0.attn.a_to_qkv: .*missing: weight_base"),
        (lambda t: t.update({"blocks___0___attn___a_to_qkv.extra": torch.ones(4)}), "extra"),
        (lambda t: t.update({"model_dict." + FIRST: torch.ones(4)}), "model_dict"),
        (lambda t: t.update({"weight_base": torch.ones(4)}), "1 of its 19 tensors"),
        (lambda t: t.update({FIRST: torch.ones(3)}), r"a_to_qkv: .*\[3\]"),
        (lambda t: t.clear(), "not a gate file"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, change, words):
    save_file(spoil(change), tmp_path / "gates.safetensors")
    with pytest.raises(FusionError, match=words) as caught:
        load_gates(tmp_path / "gates.safetensors")
    assert "gates.safetensors" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip", b"\xff" * 64])
def test_unreadable_files_are_refused(tmp_path, content):
    path = tmp_path / "gates.safetensors"
    path.write_bytes(content)
    with pytest.raises(FusionError, match="not a readable safetensors file"):
        load_gates(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FusionError, match=r"no gate file at .*nowhere"):
        load_gates(tmp_path / "nowhere")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "gates.safetensors"
    path.write_bytes(b"old")

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("autolora.fusion.gate.save_file", fail)
    with pytest.raises(FusionError, match="disk full"):
        save_gates(make_bank(), path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(FusionError, match="no gates"):
        save_gates(GateBank(), path)
