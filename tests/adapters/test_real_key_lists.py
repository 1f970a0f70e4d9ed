"""Key lists of published files, where they are at hand: nothing is lost."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from autolora.adapters import LoRA
from autolora.adapters.formats import match_keys
from autolora.adapters.unused import UNKNOWN, reason_for
from autolora.flux.layers import LAYER_TYPES, parse_layer

FOLDER = Path(os.environ.get("AUTOLORA_FORMATS", Path(__file__).parents[3] / "shared" / "formats"))
LISTS = sorted(FOLDER.glob("*.json")) if FOLDER.is_dir() else []
KNOWN = {"kohya": "kohya", "diffusers": "diffusers", "ai_toolkit": "ai-toolkit"}

pytestmark = pytest.mark.skipif(not LISTS, reason=f"no key lists of published files in {FOLDER}")


def shapes_of(name) -> dict[str, list[int]]:
    (path,) = (path for path in LISTS if path.stem == name)
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", KNOWN)
def test_every_key_is_matched(name):
    shapes = shapes_of(name)
    matches = match_keys(shapes)
    assert set(matches) == set(shapes)
    assert {match.format.name for match in matches.values()} == {KNOWN[name]}
    for key, match in matches.items():
        layer = parse_layer(match.target.layer)
        if match.role == "A":
            assert shapes[key][1] == layer.type.in_ratio * 3072
        elif match.role == "B":
            ratios = dict(layer.type.slices)
            wanted = match.target.slices or tuple(ratios)
            assert shapes[key][0] == sum(ratios[part] for part in wanted) * 3072


@pytest.mark.parametrize("name", [path.stem for path in LISTS if path.stem not in KNOWN])
def test_other_lists_are_dropped_with_a_reason(name):
    for key in set(shapes_of(name)) - set(match_keys(shapes_of(name))):
        assert reason_for(key)


@pytest.mark.parametrize("name", KNOWN)
def test_random_values_load(tmp_path, name):
    """The same keys at a forty-eighth of the width, so that the file is small."""
    shapes = {
        key: [size // 48 if size >= 3072 else size for size in shape]
        for key, shape in shapes_of(name).items()
    }
    tensors = {key: torch.randn(shape, dtype=torch.bfloat16) for key, shape in shapes.items()}
    path = tmp_path / f"{name}.safetensors"
    save_file(tensors, path)
    lora = LoRA.load(path)
    assert lora.report.dropped == {}
    assert set(lora.report.matched) == set(shapes)
    assert len(lora.layers) >= 19 * 8 + 38 * 2
    inside = {row.template for row in LAYER_TYPES.values() if row.kind != "outer"}
    assert {parse_layer(layer).type.template for layer in lora.layers} <= inside
    assert UNKNOWN not in lora.report.dropped_reasons
    for layer in lora.layers[:: len(lora.layers) // 5]:
        assert torch.isfinite(lora.delta(layer)).all()
