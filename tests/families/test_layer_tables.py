"""Every row of every table, at full size, against the class that runs the model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from autolora.families.detect import tables
from autolora.families.layers import CANONICAL, LayerTable, Size, weight_shape

FLUX2 = {
    "klein 4B": {
        "num_layers": 5,
        "num_single_layers": 20,
        "num_attention_heads": 24,
        "joint_attention_dim": 7680,
        "guidance_embeds": False,
    },
    "klein 9B": {
        "num_layers": 8,
        "num_single_layers": 24,
        "num_attention_heads": 32,
        "joint_attention_dim": 12288,
        "guidance_embeds": False,
    },
    "dev": {},
}


def _flux1(variant: str) -> nn.Module:
    from diffsynth.models.flux_dit import FluxDiT

    return FluxDiT()


def _flux2(variant: str) -> nn.Module:
    from diffsynth.models.flux2_dit import Flux2DiT

    return Flux2DiT(**FLUX2[variant])


def _z_image(variant: str) -> nn.Module:
    from diffsynth.models.z_image_dit import ZImageDiT

    return ZImageDiT()


def _qwen_image(variant: str) -> nn.Module:
    from diffsynth.models.qwen_image_dit import QwenImageDiT

    return QwenImageDiT()


def _sdxl(variant: str) -> nn.Module:
    from diffsynth.configs.model_configs import stable_diffusion_xl_series
    from diffsynth.models.stable_diffusion_xl_unet import SDXLUNet2DConditionModel

    return SDXLUNet2DConditionModel(**stable_diffusion_xl_series[0]["extra_kwargs"])


CLASSES: dict[str, Callable[[str], nn.Module]] = {
    "flux1": _flux1,
    "flux2": _flux2,
    "z_image": _z_image,
    "qwen_image": _qwen_image,
    "sdxl": _sdxl,
}
MODELS = [(name, variant.name) for name in CLASSES for variant in tables()[name].variants]


def expected_shape(table: LayerTable, name: str, widths: dict[str, int]) -> tuple[int, ...]:
    parsed = table.parse(name)
    assert parsed is not None, name
    out = parsed.row.out().value(widths)
    inner = parsed.row.inputs.value(widths) if parsed.row.inputs is not None else None
    assert out is not None
    return (out,) if inner is None else (out, inner, *parsed.row.kernel)


@pytest.mark.parametrize(("family", "variant"), MODELS)
def test_table_is_the_model_at_full_size(family: str, variant: str) -> None:
    table = tables()[family]
    sizes = next(known for known in table.variants if known.name == variant)
    with torch.device("meta"):
        model = CLASSES[family](variant)
    present: dict[str, Any] = dict(model.named_modules())
    weights = {
        name: tuple(module.weight.shape)
        for name, module in present.items()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }
    listed = table.shapes(model)
    assert listed == {name: weights[name] for name in listed}
    assert set(listed) == set(weights), "a layer of the model is in no row"
    for name, shape in weights.items():
        assert shape == expected_shape(table, name, dict(sizes.widths)), name
        parsed = table.parse(name)
        assert parsed is not None
        if parsed.row.group:
            assert parsed.block is not None
            assert parsed.block < sizes.blocks[parsed.row.group], name
    for row in table.rows:
        if "guidance" in row.template and "klein" in variant:
            continue
        last = sizes.blocks.get(row.group, 1) - 1
        module = present[row.template.replace("{i}", str(last))]
        if row.is_norm:
            assert tuple(module.weight.shape) == (row.out().value(dict(sizes.widths)),)


@pytest.mark.parametrize("family", tables())
def test_every_spelling_leads_back(family: str) -> None:
    table = tables()[family]
    for row in table.rows:
        name = row.template.replace("{i}", "3")
        for dialect in table.dialects:
            for path, spelling, shares in table.spell(name, dialect):
                for joint in ("_", "."):
                    found = [
                        module
                        for module in table.find(path.replace(".", joint))
                        if module.dialect == dialect
                    ]
                    assert len(found) == 1, path
                    assert found[0].shares == shares
                    assert found[0].shares[spelling.position].row is row
                    assert found[0].shares[spelling.position].name(found[0].block) == name


@pytest.mark.parametrize("family", tables())
def test_every_dialect_names_each_output_row_once(family: str) -> None:
    table = tables()[family]
    for dialect in set(table.dialects) - {"xlabs"}:
        named: dict[str, list[str]] = {}
        for shares in table.modules(dialect).values():
            for share in shares:
                names = share.slices or share.row.slice_names
                named.setdefault(share.row.template, []).extend(names)
        for row in table.rows:
            if row.template in named:
                assert sorted(named[row.template]) == sorted(row.slice_names), row.template


def test_canonical_names_are_found_in_order() -> None:
    table = tables()["flux2"]
    names = ["proj_out", "transformer_blocks.10.attn.to_q", "transformer_blocks.2.attn.to_q"]
    assert sorted(names, key=table.sort_key) == [names[2], names[1], names[0]]
    assert table.parse("transformer_blocks.07.attn.to_q") is None
    assert table.parse("transformer_blocks.{i}.attn.to_q") is None
    assert CANONICAL in table.dialects


def test_sizes_are_sums_of_multiples() -> None:
    assert Size.parse("c2+3c1").value({"c1": 10, "c2": 5}) == 35
    assert Size.parse("4d").value({}) is None
    with pytest.raises(ValueError, match="not a sum"):
        Size.parse("4*d")


def test_grouped_convolutions_have_no_shape() -> None:
    assert weight_shape(nn.Conv2d(4, 8, 3)) == (8, 4, 3, 3)
    assert weight_shape(nn.Conv2d(4, 8, 3, groups=2)) is None
    assert weight_shape(nn.LayerNorm(4)) is None


@given(st.sampled_from(sorted(tables())), st.integers(0, 10_000), st.integers(1, 500))
def test_slices_cover_the_output_once(family: str, pick: int, width: int) -> None:
    rows = [row for row in tables()[family].rows if len(row.slices) > 1]
    if not rows:
        return
    row = rows[pick % len(rows)]
    out = sum(factor for _, factor in row.out().terms) * width
    slices = row.output_slices(out)
    flat = [n for part in slices.values() for n in range(part.start, part.stop)]
    assert flat == list(range(out))
    for name, part in slices.items():
        assert row.fused_out_features([name], part.stop - part.start) == out


def test_slices_of_linear1() -> None:
    parsed = tables()["flux1"].parse("single_blocks.3.to_qkv_mlp")
    assert parsed is not None
    assert parsed.row.output_slices(21504) == {
        "q": slice(0, 3072),
        "k": slice(3072, 6144),
        "v": slice(6144, 9216),
        "mlp": slice(9216, 21504),
    }
    with pytest.raises(ValueError, match="100 output channels of to_qkv_mlp"):
        parsed.row.output_slices(100)
    with pytest.raises(ValueError, match="10 rows cannot be the mlp part"):
        parsed.row.fused_out_features(["mlp"], 10)


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
def test_other_names_are_not_canonical(name: str) -> None:
    table = tables()["flux1"]
    assert table.parse(name) is None
    assert table.sort_key(name) > table.sort_key("final_norm_out.linear")


@pytest.mark.parametrize("family", ["flux2", "z_image", "sdxl"])
def test_a_checkpoint_in_original_names_has_the_models_shapes(family: str) -> None:
    """What a header says, in the reference code's names, is what the class has."""
    table = tables()[family]
    sizes = table.variants[-1]
    with torch.device("meta"):
        wanted = table.shapes(CLASSES[family](sizes.name))
    weights: dict[str, tuple[int, ...]] = {"unknown.layer": (3, 3)}
    for path, shares in table.modules("original").items():
        row = shares[0].row
        if row.is_norm:
            continue
        outs = [share.row.out(share.slices).value(sizes.widths) for share in shares]
        inner = row.inputs.value(sizes.widths) if row.inputs else None
        for block in range(sizes.blocks.get(row.group, 1)):
            shape = (sum(outs), inner, *row.kernel)  # type: ignore[arg-type]
            weights[path.replace("{i}", str(block))] = shape  # type: ignore[assignment]
    assert table.canonical(weights) == wanted
