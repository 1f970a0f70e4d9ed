"""Files that we write: read back by us, and looked at with the safetensors library."""

import json

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from autolora.errors import LoRAFormatError
from autolora.lora import LoRA, save_lora
from autolora.lora.formats import FORMATS as TABLE
from tests.lora.lora_files import (
    SPELLINGS,
    WIDTH,
    assert_same_deltas,
    canonical_shapes,
    make_file,
    relative_error,
)

FORMATS = [entry.name for entry in TABLE]
WITHOUT_ALPHA = ("peft", "fal", "xlabs", "diffsynth")
WITH_ALPHA_TENSORS = ("kohya", "onetrainer", "onetrainer-bfl", "lycoris", "lycoris-bfl")


def draw_factors(ranks=(4,), seed=0, dtype=torch.float32, format="kohya"):
    """Random factors of every layer that the format has a name for."""
    random = torch.Generator().manual_seed(seed)
    factors = {}
    named = {module.layer for module in SPELLINGS[format][0]()}
    for n, (layer, (out_features, in_features)) in enumerate(canonical_shapes().items()):
        if layer not in named:
            continue
        rank = ranks[n % len(ranks)]
        factors[layer] = (
            torch.randn(rank, in_features, generator=random).to(dtype),
            torch.randn(out_features, rank, generator=random).to(dtype),
        )
        if format == "xlabs" and layer.endswith("to_qkv_mlp"):
            factors[layer][1][3 * WIDTH :] = 0
    return factors


def dense(factors):
    return {layer: B.double() @ A.double() for layer, (A, B) in factors.items()}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("alpha", [None, 1.0, 3.0, -2.5])
def test_round_trip_keeps_the_delta(tmp_path, format, alpha):
    factors = draw_factors(ranks=(4, 1, 6), format=format)
    path = save_lora(tmp_path / "new" / "a.safetensors", factors, format, alpha=alpha)
    lora = LoRA.load(path)
    assert_same_deltas(lora, dense(factors))
    assert lora.report.format == format
    assert lora.report.dropped == {}
    # Split files give the rank of the fused layer back.
    assert all(lora.rank(layer) == len(A) for layer, (A, _) in factors.items())
    if alpha is not None and format not in WITHOUT_ALPHA:
        assert lora.report.scales == tuple(sorted((alpha, alpha / 6)))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("bf16", 6e-3), (torch.float16, 8e-4)])
def test_round_trip_in_half_precision(tmp_path, format, dtype, tolerance):
    factors = draw_factors(format=format)
    lora = LoRA.load(save_lora(tmp_path / "a.safetensors", factors, format, dtype=dtype))
    for layer, truth in dense(factors).items():
        assert 0 < relative_error(lora.delta(layer), truth) < tolerance


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    format=st.sampled_from(FORMATS),
    layers=st.sets(st.sampled_from(sorted(canonical_shapes())), min_size=1),
    rank=st.integers(1, 9),
)
def test_any_subset_of_layers(tmp_path, format, layers, rank):
    drawn = draw_factors(ranks=(rank,), format=format)
    factors = {layer: drawn[layer] for layer in layers if layer in drawn}
    assume(factors)
    path = save_lora(tmp_path / "a.safetensors", factors, format, alpha=2)
    assert_same_deltas(LoRA.load(path), dense(factors))


@pytest.mark.parametrize("format", FORMATS)
def test_keys_are_those_of_the_programs(tmp_path, format):
    path = save_lora(tmp_path / "a.safetensors", draw_factors(format=format), format)
    alphas = (4.0,) if format in WITH_ALPHA_TENSORS else (None,)
    expected = make_file(format, ranks=(4,), alphas=alphas).tensors
    written = load_file(path)
    assert {key: value.shape for key, value in written.items()} == {
        key: value.shape for key, value in expected.items()
    }
    assert set(SPELLINGS) == set(FORMATS)


def test_diffsynth_reads_our_kohya_file_as_we_do(tmp_path):
    loader = pytest.importorskip("diffsynth.utils.lora.flux").FluxLoRALoader()
    factors = {
        layer: pair for layer, pair in draw_factors().items() if layer.startswith(("b", "s"))
    }
    path = save_lora(tmp_path / "a.safetensors", factors, "kohya", alpha=2)
    theirs = loader.convert_state_dict(load_file(path))
    for layer, truth in dense(factors).items():
        A, B = theirs[f"{layer}.lora_A.weight"], theirs[f"{layer}.lora_B.weight"]
        assert relative_error(B.double() @ A.double(), truth) < 1e-6


def test_header_and_bytes(tmp_path):
    factors = draw_factors(ranks=(4, 4, 2), dtype=torch.bfloat16)
    metadata = {"modelspec.title": "Neon", "software": {"name": "x"}, "n": 3}
    first = save_lora(tmp_path / "a.safetensors", factors, metadata=metadata)
    backwards = dict(reversed(factors.items()))
    second = save_lora(tmp_path / "b.safetensors", backwards, metadata=metadata)
    assert first.read_bytes() == second.read_bytes()
    with safe_open(first, framework="pt") as file:
        assert file.metadata() == {
            "modelspec.title": "Neon",
            "software": '{"name": "x"}',
            "n": "3",
        }
        key = "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"
        assert file.get_tensor(key).dtype == torch.bfloat16


def test_diffusers_alpha_is_in_the_header(tmp_path):
    path = save_lora(tmp_path / "a.safetensors", draw_factors((4, 4, 2)), "diffusers", alpha=8)
    with safe_open(path, framework="pt") as file:
        entries = json.loads(file.metadata()["lora_adapter_metadata"])
        assert not any(key.endswith("alpha") for key in file.keys())  # noqa: SIM118
    assert entries["transformer.lora_alpha"] == 8
    assert entries["transformer.r"] == 4
    assert set(entries["transformer.rank_pattern"].values()) == {2}


def test_an_old_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.safetensors"
    save_lora(path, draw_factors())
    before = path.read_bytes()
    bad = draw_factors() | {"blocks.0.ff_a.0": (torch.ones(1, 8), torch.ones(32, 1) * 1e30)}
    with pytest.raises(LoRAFormatError, match=r"does not fit in torch\.float16"):
        save_lora(path, bad, dtype="fp16")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "folder").mkdir()
    with pytest.raises(LoRAFormatError, match="cannot be written"):
        save_lora(tmp_path / "folder", draw_factors())
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.safetensors", "folder"]


PAIR = (torch.ones(1, 8), torch.ones(8, 1))


@pytest.mark.parametrize(
    ("factors", "options", "words"),
    [
        ({}, {}, "at least one layer"),
        ({"blocks.0.attn.a_to_out": PAIR}, {"format": "sdxl"}, "'sdxl'; choose one of kohya"),
        ({"blocks.0.attn.a_to_out": PAIR}, {"alpha": 0}, "other than 0"),
        ({"blocks.0.attn.a_to_out": PAIR}, {"alpha": float("nan")}, "Alpha is nan"),
        ({"blocks.0.attn.a_to_out": PAIR}, {"dtype": "int8"}, "Cannot write dtype int8"),
        ({"blocks.0.attn.a_to_out": PAIR}, {"dtype": torch.int8}, "Cannot write dtype"),
        ({"encoder.fc": PAIR}, {}, "Layer 'encoder.fc' is of no known base model"),
        ({"blocks.0.attn.a_to_qkv": PAIR}, {"format": "diffusers"}, "cannot be divided"),
        ({"blocks.0.ff_a.0": PAIR}, {"format": "xlabs"}, "no name for layer 'blocks.0.ff_a.0'"),
        (
            {"single_blocks.0.to_qkv_mlp": (torch.ones(1, 8), torch.ones(56, 1))},
            {"format": "xlabs"},
            "no name for the mlp rows of layer 'single_blocks.0.to_qkv_mlp'",
        ),
        ({"blocks.0.ff_a.2": (torch.ones(2, 8), torch.ones(8, 1))}, {}, "A [2, 8]"),
        ({"blocks.0.ff_a.2": (PAIR[0] / 0, PAIR[1])}, {}, "infinite"),
    ],
)
def test_what_cannot_be_written(tmp_path, factors, options, words):
    with pytest.raises(LoRAFormatError) as caught:
        save_lora(tmp_path / "a.safetensors", factors, **options)
    assert words in str(caught.value)
    assert list(tmp_path.iterdir()) == []
