"""Adapters' parts for CLIP and T5, against checkpoints that the same changes are written into."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from autolora import AutoLoRAPipeline
from autolora.config import PipelineConfig
from autolora.fusion import attached_layers
from autolora.unit import LoRAUnit
from tests.families.flux1 import real_format

CLIP = {
    "encoder.layers.0.mlp.fc1": "lora_te1_text_model_encoder_layers_0_mlp_fc1",
    "encoder.layers.1.self_attn.q_proj": ("lora_te1_text_model_encoder_layers_1_self_attn_q_proj"),
}
T5 = {
    "encoder.block.0.layer.0.SelfAttention.q": "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
    "encoder.block.1.layer.1.DenseReluDense.wo": (
        "lora_te3_encoder_block_1_layer_1_DenseReluDense_wo"
    ),
}
TRANSFORMER = "lora_unet_single_blocks_0_linear2"
STRENGTH = 0.7


def change_folder(folder: Path, names: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
    """Add deltas to a text encoder's files and to the adapter's tensors."""
    generator = torch.Generator().manual_seed(len(tensors))
    left = dict(names)
    for file in sorted(folder.glob("*.safetensors")):
        # Clones, as the file that is written over may be what the tensors lie in.
        state = {name: tensor.clone() for name, tensor in load_file(file).items()}
        for name in [n for n in left if {f"{n}.weight", f"text_model.{n}.weight"} & set(state)]:
            stored = f"{name}.weight" if f"{name}.weight" in state else f"text_model.{name}.weight"
            key, weight = left.pop(name), state[stored]
            out, inner = weight.shape
            down = torch.randn(2, inner, generator=generator)
            up = torch.randn(out, 2, generator=generator) / inner**0.5
            state[stored] = weight + STRENGTH * 0.5 * up @ down
            tensors[f"{key}.lora_down.weight"] = down
            tensors[f"{key}.lora_up.weight"] = up
            tensors[f"{key}.alpha"] = torch.tensor(1.0)
        save_file(state, file, metadata={"format": "pt"})
    assert not left


@pytest.fixture(scope="module")
def pipes(tmp_path_factory) -> tuple[AutoLoRAPipeline, AutoLoRAPipeline]:
    """The model with an adapter beside it, and one whose text encoders have its changes inside."""
    root = tmp_path_factory.mktemp("texts")
    files = real_format.write(root)
    changed = root / "changed"
    shutil.copytree(files.bfl, changed)
    transformer = load_file(files.transformer)["single_blocks.0.linear2.weight"]
    tensors = {
        f"{TRANSFORMER}.lora_down.weight": torch.zeros(1, transformer.shape[1]),
        f"{TRANSFORMER}.lora_up.weight": torch.zeros(transformer.shape[0], 1),
    }
    change_folder(changed / "text_encoder", CLIP, tensors)
    change_folder(changed / "text_encoder_2", T5, tensors)
    (root / "pool").mkdir()
    save_file(tensors, root / "pool" / "words.safetensors")
    config = PipelineConfig(
        "small",
        kind="flux1",
        weights=files.bfl,
        storage="float32",
        device="cpu",
        width=64,
        height=64,
        steps=2,
        pool=root / "pool",
        index=root / "index",
    )
    return AutoLoRAPipeline(config), AutoLoRAPipeline(replace(config, weights=changed))


def draw(pipe: AutoLoRAPipeline, **options):
    return pipe("a red rocket", seed=3, retrieve=False, use_triggers=False, **options)


def test_both_text_encoders_act_as_if_the_changes_were_in_their_weights(pipes) -> None:
    pipe, truth = pipes
    asked = {"loras": [("words", STRENGTH)], "strategy": "sum"}
    bare, without = draw(pipe), draw(pipe, **asked)
    acting, expected = draw(pipe, **asked, text_encoders=True), draw(truth)
    pictures = [np.asarray(out.image, float) for out in (bare, without, acting, expected)]
    assert np.array_equal(pictures[0], pictures[1])
    assert np.abs(pictures[3] - pictures[0]).mean() > 0.2, "the change must be seen"
    np.testing.assert_allclose(pictures[2], pictures[3], atol=1)
    notes = " ".join(acting.report.notes)
    assert "text encoder CLIP (2 layers)" in notes and "text encoder T5 (2 layers)" in notes
    assert not attached_layers(pipe.base.text_encoder_1)
    assert not attached_layers(pipe.base.text_encoder_2)
    assert np.array_equal(np.asarray(draw(pipe).image, float), pictures[0])


def test_a_unit_weighs_its_part_for_text_encoders(pipes) -> None:
    pipe, _ = pipes
    acting = draw(pipe, loras=[("words", STRENGTH)], strategy="sum", text_encoders=True)
    unit = LoRAUnit("words", 0.1, text_encoder=STRENGTH)
    alone = draw(pipe, loras=[unit], strategy="sum")
    assert alone.image.tobytes() == acting.image.tobytes()
    assert alone.report.adapters[0].text_encoder == STRENGTH
    silent = draw(pipe, loras=[LoRAUnit("words", text_encoder=0)], text_encoders=True)
    assert silent.image.tobytes() == draw(pipe).image.tobytes()
