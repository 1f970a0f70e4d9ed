"""Attaching, strengths, merging, approximating and text encoders through the pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from autolora import AutoLoRAPipeline, LoRA
from autolora.config import AdapterSettings, PipelineConfig, load_config
from autolora.errors import ConfigError, FusionError
from autolora.fusion import attached_layers, base_weight, linear_shapes

NAMES = ("elephant", "neon", "rocket")
LAYER = "single_blocks.0.proj_out"


def make_pipe(folder: Path, weights: Path, **changes) -> AutoLoRAPipeline:
    values = {"device": "cpu", "steps": 2, "width": 64, "height": 64, **changes}
    return AutoLoRAPipeline(
        PipelineConfig(
            "random", weights=weights, pool=folder / "pool", index=folder / "index", **values
        )
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_pool, tiny_shapes) -> Path:
    folder = tmp_path_factory.mktemp("switching")
    make_pool(folder / "pool")
    write_lokr(folder / "pool" / "lokr.safetensors", tiny_shapes)
    write_dora(folder / "pool" / "dora.safetensors", tiny_shapes)
    return folder


@pytest.fixture(scope="module")
def exact(folder: Path, tiny_weights: Path) -> AutoLoRAPipeline:
    """A pipeline whose weights are stored in float32."""
    return make_pipe(
        folder, tiny_weights, storage="float32", adapters=AdapterSettings(approximate_rank=4)
    )


@pytest.fixture(scope="module")
def stored(folder: Path, tiny_weights: Path) -> AutoLoRAPipeline:
    """A pipeline whose weights are stored in float8."""
    return make_pipe(folder, tiny_weights)


@pytest.fixture(autouse=True)
def nothing_stays_attached(exact, stored):
    yield
    exact.detach()
    stored.detach()


def write_lokr(path: Path, shapes) -> None:
    """A LoKr of full Kronecker factors for one layer; its rank is far above 4."""
    out, inner = shapes[LAYER]
    generator = torch.Generator().manual_seed(5)
    save_file(
        {
            "lora_unet_single_blocks_0_linear2.lokr_w1": torch.randn(4, 4, generator=generator),
            "lora_unet_single_blocks_0_linear2.lokr_w2": 0.1
            * torch.randn(out // 4, inner // 4, generator=generator),
        },
        path,
    )


def write_dora(path: Path, shapes) -> None:
    """A DoRA for one layer, with lengths of output rows."""
    out, inner = shapes[LAYER]
    generator = torch.Generator().manual_seed(6)
    stem = "diffusion_model.single_blocks.0.linear2"
    save_file(
        {
            f"{stem}.lora_A.weight": torch.randn(2, inner, generator=generator) / inner**0.5,
            f"{stem}.lora_B.weight": torch.randn(out, 2, generator=generator),
            f"{stem}.lora_magnitude_vector": 2 + torch.rand(out, generator=generator),
        },
        path,
    )


def pixels(output) -> bytes:
    return np.asarray(output.image).tobytes()


def weights(pipe: AutoLoRAPipeline) -> dict[str, bytes]:
    state = pipe.base.dit.state_dict()
    return {name: t.view(torch.uint8).numpy().tobytes() for name, t in state.items()}


def draw(pipe: AutoLoRAPipeline, **options):
    # Trigger words would follow the order of asking into the prompt.
    return pipe("a red cat", seed=1, retrieve=False, use_triggers=False, **options)


def test_strengths_change_and_adapters_go_one_by_one(stored) -> None:
    stored.attach([(name, 1.0) for name in NAMES], strategy="sum")
    assert stored.attached == {"elephant": 1.0, "neon": 1.0, "rocket": 1.0}
    layers = attached_layers(stored.base.dit)
    factors = {layer: fused.factors for layer, fused in layers.items()}
    stored.set_strengths({"neon": 0.3, "rocket": 0.0})
    stored.detach("elephant")
    assert stored.attached == {"neon": 0.3, "rocket": 0.0}
    assert attached_layers(stored.base.dit) == layers, "the very same objects"
    for layer, fused in layers.items():
        assert fused.names == ("neon", "rocket")
        for (a, b), (c, d) in zip(fused.factors, factors[layer][1:], strict=True):
            assert a is c and b is d
    picture = draw(stored)
    assert [(used.name, used.strength) for used in picture.report.adapters] == [
        ("neon", 0.3),
        ("rocket", 0.0),
    ]
    stored.detach()
    asked = [("neon", 0.3), ("rocket", 0.0)]
    assert pixels(draw(stored, loras=asked, strategy="sum")) == pixels(picture)
    assert stored.attached == {}


def test_wrong_names_and_strengths_change_nothing(stored) -> None:
    stored.attach([("elephant", 0.8)])
    with pytest.raises(FusionError, match="'neon' is not attached; attached: elephant"):
        stored.set_strengths({"elephant": 0.1, "neon": 1.0})
    with pytest.raises(FusionError, match="strength nan"):
        stored.set_strengths({"elephant": float("nan")})
    with pytest.raises(FusionError, match="'neon' is not attached"):
        stored.detach("neon")
    assert stored.attached == {"elephant": 0.8}


def test_any_order_of_attaching_draws_the_same(stored) -> None:
    stored.attach([("rocket", 1.0)])
    stored.attach([("rocket", 0.5), ("elephant", 1.0)])
    stored.attach([("neon", 1.0), ("elephant", 1.0)])
    stored.attach([("neon", 1.0), ("elephant", 1.0), ("rocket", 0.5)])
    picture = pixels(draw(stored))
    stored.detach()
    stored.attach([("elephant", 1.0), ("neon", 1.0), ("rocket", 0.5)])
    assert pixels(draw(stored)) == picture


def test_a_warm_switch_reads_no_file_and_computes_no_factors(stored, monkeypatch) -> None:
    for name in NAMES:
        stored.attach([(name, 1.0)])

    def fail(*arguments: object) -> None:
        raise AssertionError("an adapter was read or its factors were computed again")

    monkeypatch.setattr(LoRA, "load", fail)
    monkeypatch.setattr(LoRA, "factors", fail)
    stored.attach([("neon", 0.5), ("elephant", 1.0)])
    draw(stored, loras=["rocket"])


@pytest.mark.parametrize("name", ["exact", "stored"])
def test_merging_for_one_picture_restores_every_bit(name, request) -> None:
    pipe = request.getfixturevalue(name)
    before, bare = weights(pipe), pixels(draw(pipe))
    asked = [("elephant", 0.08), ("neon", 0.06)]
    merged = draw(pipe, loras=asked, strategy="merged")
    summed = draw(pipe, loras=asked, strategy="sum")
    assert weights(pipe) == before and pixels(draw(pipe)) == bare != pixels(merged)
    assert merged.report.strategy == "merged"
    assert [used.layers for used in merged.report.adapters] == [16, 16]
    assert all(used.gate is None for used in merged.report.adapters)
    if name == "exact":
        close = [np.asarray(output.image, float) for output in (merged, summed)]
        np.testing.assert_allclose(*close, atol=1)
        assert merged.report.notes == []
    else:
        notes = " ".join(merged.report.notes)
        assert "Rounding the merged weights" in notes and "un-merged strategies" in notes
    with pytest.raises(KeyboardInterrupt):

        def interrupt(done: int, total: int) -> None:
            if done == 1:
                raise KeyboardInterrupt

        draw(pipe, loras=asked, strategy="merged", progress=interrupt)
    assert weights(pipe) == before


def test_merged_adapters_stay_until_they_are_detached(exact) -> None:
    before = weights(exact)
    report = exact.attach([("elephant", 0.8), ("neon", 0.6)], strategy="merged")
    assert report.strategy == "merged" and len(report.layers) == 16
    assert weights(exact) != before and not attached_layers(exact.base.dit)
    merged, state = pixels(draw(exact)), weights(exact)
    more = draw(exact, loras=[("rocket", 1.0)])
    assert pixels(more) != merged and len(more.report.adapters) == 3
    assert pixels(draw(exact, strategy="sum")) != b""
    assert weights(exact) == state and pixels(draw(exact)) == merged
    exact.set_strengths({"neon": 0.1})
    exact.detach("elephant")
    assert exact.attached == {"neon": 0.1}
    changed = pixels(draw(exact))
    exact.detach()
    assert weights(exact) == before
    assert pixels(draw(exact, loras=[("neon", 0.1)], strategy="merged")) == changed


def test_portraits_are_taken_of_the_bare_model_while_adapters_are_merged(exact) -> None:
    lora = exact.pool.load("rocket")
    bare = exact._search.portrait(lora)
    exact._search._portraits = None
    exact.attach([("neon", 1.0)], strategy="merged")
    merged = pixels(draw(exact))
    assert torch.equal(exact._search.portrait(lora), bare)
    assert pixels(draw(exact)) == merged
    exact._search.portrait(lora)
    exact.set_strengths({"neon": 0.5})
    half = pixels(draw(exact))
    exact.detach()
    exact.attach([("neon", 0.5)], strategy="merged")
    assert pixels(draw(exact)) == half != merged
    exact._search._portraits = None


def test_what_is_not_low_rank_is_approximated_and_said(exact) -> None:
    bare = pixels(draw(exact))
    for name in ("lokr", "dora"):
        output = draw(exact, loras=[(name, 1.0)], strategy="sum")
        assert pixels(output) != bare
        (note,) = output.report.notes
        assert note.startswith(f"{name} is not low-rank in 1 layers") and "merged is exact" in note
        exact.attach([(name, 0.5)], strategy="sum")
        exact.set_strengths({name: 1.0})
        standing = draw(exact)
        assert standing.report.notes == [note] and pixels(standing) == pixels(output)
        exact.detach()
    lora = exact.pool.load("dora")
    ready = exact.pool.cache.prepare(lora, 4)
    base = base_weight(exact.base.dit, LAYER)
    truth = lora.delta(LAYER, base)
    a, b = ready.factors(LAYER)
    error = float((b @ a - truth).norm() / truth.norm())
    assert a.shape[0] == 4 and ready.errors[LAYER] == pytest.approx(error, rel=1e-3) and error > 0


def test_merging_is_exact_also_for_what_is_not_low_rank(exact) -> None:
    base = base_weight(exact.base.dit, LAYER).clone()
    loras = {name: exact.pool.load(name) for name in ("lokr", "dora", "neon")}
    exact.attach([("lokr", 0.5), ("dora", 1.0), ("neon", -0.7)], strategy="merged")
    truth = (
        base.double()
        + 0.5 * loras["lokr"].delta(LAYER).double()
        + loras["dora"].delta(LAYER, base).double()
        - 0.7 * loras["neon"].delta(LAYER).double()
    )
    weight = exact.base.dit.get_submodule(LAYER).weight
    torch.testing.assert_close(weight.double(), truth, rtol=1e-6, atol=1e-6)
    assert torch.equal(base_weight(exact.base.dit, LAYER), base)
    assert draw(exact).report.notes == []


def with_text_part(exact, which: str, layers: dict[str, tuple[int, int]]) -> LoRA:
    """An adapter that changes nothing but a text encoder."""
    lora = LoRA.from_factors("texty", {LAYER: layer_pair(exact)})
    factors = {
        layer: (torch.randn(2, inner) / inner**0.5, torch.randn(out, 2))
        for layer, (out, inner) in layers.items()
    }
    lora._text_encoders = {which: LoRA.from_factors("part", factors)}
    return lora


def layer_pair(exact) -> tuple[torch.Tensor, torch.Tensor]:
    out, inner = linear_shapes(exact.base.dit)[LAYER]
    return torch.zeros(1, inner), torch.zeros(out, 1)


def test_text_encoders_are_changed_on_request_only(exact) -> None:
    bare, encoder = pixels(draw(exact)), exact.base.text_encoder_2
    before = linear_shapes(encoder)
    exact.attach([(with_text_part(exact, "t5", before), 1.0)], strategy="sum")
    assert pixels(draw(exact)) == bare
    output = draw(exact, text_encoders=True)
    assert pixels(output) != bare and output.report.text_encoders
    assert output.report.notes == [
        f"texty also acts on the text encoder T5 ({len(before)} layers)."
    ]
    assert not attached_layers(encoder) and pixels(draw(exact)) == bare
    assert not draw(exact).report.text_encoders


def test_a_base_model_without_that_text_encoder_is_said(exact) -> None:
    bare = pixels(draw(exact))
    lora = with_text_part(exact, "clip", {"encoders.0.attn.to_q": (8, 8)})
    exact.attach([(lora, 1.0)], strategy="sum")
    output = draw(exact, text_encoders=True)
    assert output.report.notes == ["This base model has no CLIP; that part of texty is left out."]
    assert pixels(output) == bare
    exact.attach([("neon", 1.0)], strategy="sum")
    notes = draw(exact, text_encoders=True).report.notes
    assert notes == ["None of the adapters has a part for the text encoders."]


def test_the_configuration_says_how_adapters_are_kept(make_config, folder, tiny_weights) -> None:
    values = {"cache_gb": 0.5, "pin": True, "approximate_rank": 8, "text_encoders": True}
    config = load_config(make_config(adapters=values))
    assert config.adapters == AdapterSettings(0.5, True, 8, True)
    with pytest.raises(ConfigError, match=r"cache_gb .* not -1.*approximate_rank must be between"):
        load_config(make_config(adapters={"cache_gb": -1, "approximate_rank": 0}))
    pipe = make_pipe(folder, tiny_weights, adapters=AdapterSettings(0.5, True, 8, True))
    assert pipe.pool.cache.max_bytes == 2**29
    output = draw(pipe, loras=["rocket"])  # pinning is a no-op on a CPU
    assert output.report.text_encoders and "None of the adapters" in " ".join(output.report.notes)
