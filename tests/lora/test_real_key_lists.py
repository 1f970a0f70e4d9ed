"""Key lists of published files, where they are at hand: nothing is lost."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from autolora.families.detect import layer_table
from autolora.lora import LoRA
from autolora.lora.formats import detect_family, match_keys
from autolora.safetensors_io import TensorInfo

FOLDER = Path(os.environ.get("AUTOLORA_FORMATS", Path(__file__).parents[3] / "shared" / "formats"))
LISTS = sorted(FOLDER.glob("*.json")) if FOLDER.is_dir() else []
# Format and number of layers that each list changes. The XLabs one has blocks 0, 1 and 10 only.
KNOWN = {
    "kohya": ("kohya", 19 * 10 + 38 * 3),
    "diffusers": ("diffusers", 19 * 10 + 38 * 3),
    "ai_toolkit": ("ai-toolkit", 19 * 8 + 38 * 2),
    "xlabs": ("xlabs", 3 * 4),
}
# The same lists with text-encoder layers, as sd-scripts writes them.
TEXT_ENCODER_SHAPES = {
    "lora_te1_text_model_encoder_layers_11_self_attn_q_proj": (768, 768),
    "lora_te1_text_model_encoder_layers_0_mlp_fc2": (768, 3072),
    "lora_te3_encoder_block_23_layer_0_SelfAttention_o": (4096, 4096),
    "lora_te3_encoder_block_0_layer_1_DenseReluDense_wi_1": (10240, 4096),
}

pytestmark = pytest.mark.skipif(not LISTS, reason=f"no key lists of published files in {FOLDER}")


def shapes_of(name) -> dict[str, list[int]]:
    (path,) = (path for path in LISTS if path.stem == name)
    return json.loads(path.read_text())


def save_random(shapes, path):
    """The keys at a forty-eighth of the width, so that the file is small."""
    tensors = {
        key: torch.randn(
            [size // 48 if size >= 768 else size for size in shape], dtype=torch.bfloat16
        )
        for key, shape in shapes.items()
    }
    save_file(tensors, path)
    return tensors


def test_all_lists_are_known():
    assert set(KNOWN) == {path.stem for path in LISTS}


@pytest.mark.parametrize("name", KNOWN)
def test_every_key_is_matched(name):
    shapes = shapes_of(name)
    matches = match_keys(shapes, layer_table("flux1"))
    assert set(matches) == set(shapes)
    assert {match.format for match in matches.values()} == {KNOWN[name][0]}
    for key, match in matches.items():
        (share,) = match.module.shares
        if match.role == "A":
            assert shapes[key][1] == share.row.inputs.value({"d": 3072})
        elif match.role == "B":
            assert shapes[key][0] == share.row.out(share.slices).value({"d": 3072})


@pytest.mark.parametrize("name", KNOWN)
def test_family_is_found(name):
    tensors = {key: TensorInfo("F32", tuple(shape), 0) for key, shape in shapes_of(name).items()}
    assert detect_family(tensors, {"ss_base_model_version": "sd_1.5"}).family == "flux1"


@pytest.mark.parametrize("name", KNOWN)
def test_random_values_load(tmp_path, name):
    shapes = shapes_of(name)
    path = tmp_path / f"{name}.safetensors"
    save_random(shapes, path)
    lora = LoRA.load(path)
    assert lora.report.dropped == {}
    assert set(lora.report.matched) == set(shapes)
    assert lora.report.format == KNOWN[name][0]
    assert len(lora.layers) == lora.report.layers == KNOWN[name][1]
    assert all(lora.exact(layer) for layer in lora.layers)
    for layer in lora.layers[:: len(lora.layers) // 5]:
        assert torch.isfinite(lora.delta(layer)).all()


def test_text_encoder_keys_are_matched(tmp_path):
    shapes = dict(shapes_of("kohya"))
    for module, (out_features, in_features) in TEXT_ENCODER_SHAPES.items():
        shapes[f"{module}.lora_down.weight"] = [8, in_features]
        shapes[f"{module}.lora_up.weight"] = [out_features, 8]
        shapes[f"{module}.alpha"] = []
    path = tmp_path / "te.safetensors"
    save_random(shapes, path)
    lora = LoRA.load(path)
    assert lora.report.dropped == {}
    assert set(lora.report.matched) == set(shapes)
    assert lora.report.text_encoders == {"clip": 2, "t5": 2}
    assert lora.text_encoder("clip").layers == ["encoders.0.fc2", "encoders.11.attn.to_q"]


def test_true_size_is_counted_against_all_layers_of_the_transformer():
    """From the shapes alone: 19 double blocks of 10, 38 single blocks of 3, and 10 outside."""
    layers = {"blocks.3.attn.a_to_qkv": (9216, 3072)}
    assert layer_table("flux1").count(layers) == 19 * 10 + 38 * 3 + 10
