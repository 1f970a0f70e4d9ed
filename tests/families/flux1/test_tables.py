"""The layer table against DiffSynth's FLUX, and its arithmetic."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autolora.families.flux1.tables import (
    LAYER_TYPES,
    fused_out_features,
    layer_sort_key,
    linear_layer_names,
    linear_layers,
    output_slices,
    parse_layer,
)


@pytest.fixture(scope="module")
def flux():
    torch = pytest.importorskip("torch")
    models = pytest.importorskip("diffsynth.models.flux_dit")
    with torch.device("meta"):
        return models.FluxDiT()


def test_table_lists_every_linear_of_flux_and_nothing_else(flux):
    import torch

    linears = {
        name: (module.out_features, module.in_features)
        for name, module in flux.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert linear_layers(flux) == linears
    # 19 double blocks of 10 layers, 38 single blocks of 3, 10 outside.
    assert len(linears) == 19 * 10 + 38 * 3 + 10
    assert {parse_layer(name).type.template for name in linears} == set(LAYER_TYPES)


def test_ratios_are_those_of_flux(flux):
    width = flux.x_embedder.out_features
    for name, (out_features, in_features) in linear_layers(flux).items():
        layer = parse_layer(name)
        if layer.kind != "outer":
            assert out_features == layer.type.out_ratio * width, name
        if layer.type.in_ratio is not None:
            assert in_features == layer.type.in_ratio * width, name


def test_names_come_in_block_order():
    class Linear:
        out_features, in_features = 3, 1

    class Module:
        def named_modules(self):
            for name in (
                "x_embedder",
                "single_blocks.2.proj_out",
                "blocks.10.ff_a.0",
                "blocks.9.ff_a.0",
                "blocks.9.attn.a_to_qkv",
                "blocks.9.attn.a_to_qkv.base",
                "vae.conv",
            ):
                yield name, Linear()
            yield "blocks.9.ff_b.0", object()

    assert linear_layer_names(Module()) == [
        "blocks.9.attn.a_to_qkv",
        "blocks.9.ff_a.0",
        "blocks.10.ff_a.0",
        "single_blocks.2.proj_out",
        "x_embedder",
    ]


def test_parse():
    layer = parse_layer("blocks.12.attn.b_to_qkv")
    assert (layer.kind, layer.block, layer.stream, layer.type.part) == (
        "double",
        12,
        "b",
        "attn.b_to_qkv",
    )
    layer = parse_layer("final_norm_out.linear")
    assert (layer.kind, layer.block, layer.stream) == ("outer", None, None)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "blocks.{i}.attn.a_to_qkv",
        "blocks.01.attn.a_to_qkv",
        "blocks.x.attn.a_to_qkv",
        "blocks.1.attn.a_to_q",
        "blocks.1.to_qkv_mlp",
        "single_blocks.1.attn.a_to_qkv",
        "dit.blocks.1.attn.a_to_qkv",
        "blocks.1.attn.a_to_qkv.base",
        "blocks.\u0661.attn.a_to_qkv",
    ],
)
def test_other_names_are_not_canonical(name):
    assert parse_layer(name) is None
    assert layer_sort_key(name) > layer_sort_key("final_norm_out.linear")


@given(st.sampled_from(sorted(LAYER_TYPES)), st.integers(1, 5000))
def test_slices_cover_the_output_once(template, width):
    layer_type = LAYER_TYPES[template]
    rows = output_slices(layer_type, layer_type.out_ratio * width)
    flat = [row for part in rows.values() for row in range(part.start, part.stop)]
    assert flat == list(range(layer_type.out_ratio * width))
    for name, part in rows.items():
        size = part.stop - part.start
        assert fused_out_features(layer_type, [name], size) == layer_type.out_ratio * width


def test_slices_of_linear1():
    layer_type = LAYER_TYPES["single_blocks.{i}.to_qkv_mlp"]
    assert output_slices(layer_type, 21504) == {
        "q": slice(0, 3072),
        "k": slice(3072, 6144),
        "v": slice(6144, 9216),
        "mlp": slice(9216, 21504),
    }
    with pytest.raises(ValueError, match="100 output channels of to_qkv_mlp"):
        output_slices(layer_type, 100)
    with pytest.raises(ValueError, match="10 rows cannot be the mlp part"):
        fused_out_features(layer_type, ["mlp"], 10)
