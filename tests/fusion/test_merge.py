"""Merging: exact sums, honest rounding, and weights that come back to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autolora.errors import FusionError
from autolora.fusion import (
    MergeReport,
    attach,
    attached,
    attached_layers,
    attached_names,
    base_weight,
    detach,
    merge_,
    merged,
    restore,
    set_strengths,
)
from tests.fusion.dense import DenseFake, random_dense
from tests.fusion.reference import TinyModel, model_shapes, random_adapter

LAYER = "single_blocks.0.proj_out"
FLOAT8 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.bfloat16, torch.float16, FLOAT8, torch.float8_e5m2]


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = TinyModel().eval().requires_grad_(False)
    model.single_blocks[0].norm.scale = nn.RMSNorm(16)
    return model


def stored_as(model, dtype):
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def bits(model):
    return {
        name: (t.dtype, t.data_ptr(), t.view(torch.uint8).numpy().tobytes())
        for name, t in model.state_dict().items()
    }


def low_and_dense(model):
    shapes = model_shapes(model)
    low = random_adapter("low", shapes, 3, seed=1)
    dense = random_dense("dense", {LAYER: shapes[LAYER]}, seed=2, biases=True)
    return [(low, 0.8), (dense, -0.5)]


def exact_weight(weight, pairs, layer):
    """``W + sum_i s_i dW_i`` in float64."""
    total = weight.double()
    for adapter, strength in pairs:
        if layer not in adapter.layers:
            continue
        if isinstance(adapter, DenseFake):
            total = total + strength * adapter.delta(layer).double()
        else:
            a, b = adapter.factors(layer)
            total = total + strength * b.double() @ a.double()
    return total


def nearest(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Distance of each value to the closest number that a one-byte type has."""
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    numbers = numbers[numbers.isfinite()]
    return (values.double().flatten()[:, None] - numbers).abs().min(1).values.view_as(values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_hundred_merges_and_restores_leave_every_bit(model, dtype):
    stored_as(model, dtype)
    before, pairs = bits(model), low_and_dense(model)
    for turn in range(100):
        if turn % 3 == 0:
            with pytest.raises(ZeroDivisionError), merged(model, pairs):
                raise ZeroDivisionError
        else:
            report = merge_(model, pairs)
            assert restore(model) == len(report.layers) + 1  # and one bias
    assert bits(model) == before
    assert restore(model) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_merged_weight_is_the_exact_sum_rounded_once(model, dtype):
    stored_as(model, dtype)
    pairs, originals = low_and_dense(model), {k: v.clone() for k, v in model.state_dict().items()}
    with merged(model, pairs) as report:
        assert isinstance(report, MergeReport) and set(report.layers) == set(model_shapes(model))
        for layer in report.layers:
            weight = model.get_submodule(layer).weight
            exact = exact_weight(originals[f"{layer}.weight"], pairs, layer)
            assert weight.dtype == dtype
            lost = (weight.double() - exact).abs()
            if dtype.itemsize == 1:
                # Float32 sums may fall on the other side of a tie.
                assert (lost <= nearest(exact, dtype) + 1e-6).all()
            else:
                assert (lost <= torch.finfo(dtype).eps * exact.abs() + 1e-6).all()
            if dtype != torch.float32:
                added = exact - originals[f"{layer}.weight"].double()
                assert report.rounding[layer] == pytest.approx(
                    float(lost.norm() / added.norm()), rel=1e-3
                )
    assert bool(report.rounding) == (dtype != torch.float32)


def test_what_is_beyond_the_range_of_float8_becomes_its_largest(model):
    stored_as(model, FLOAT8)
    shape = model_shapes(model)[LAYER]
    with merged(model, [(DenseFake("huge", {LAYER: torch.full(shape, 1e4)}), 1.0)]):
        assert (model.get_submodule(LAYER).weight.float() == 448).all()


def test_a_small_change_that_float8_cannot_hold_is_told(model):
    stored_as(model, FLOAT8)
    shape = model_shapes(model)[LAYER]
    with merged(model, [(DenseFake("faint", {LAYER: torch.full(shape, 1e-6)}), 1.0)]) as report:
        assert report.rounding[LAYER] == pytest.approx(1, abs=1e-3)


def test_merged_draws_what_the_plain_sum_draws(model):
    inputs = torch.randn(2, 5, 16), torch.randn(2, 16)
    pairs = [(random_adapter(f"l{i}", model_shapes(model), 4, i), 0.7) for i in range(2)]
    with attached(model, pairs, "sum"):
        summed = model(*inputs)
    with attached(model, pairs, "merged") as report:
        torch.testing.assert_close(model(*inputs), summed, rtol=1e-4, atol=1e-5)
        assert report.strategy == "merged" and len(report.layers) == 6 and not report.ungated
    assert not attached_names(model)


def test_biases_and_norms_are_merged_too(model):
    shape = model_shapes(model)[LAYER]
    bias, norm = torch.randn(16), torch.randn(16)
    norms = {"single_blocks.0.norm.scale": norm, "single_blocks.7.norm.scale": norm}
    adapter = DenseFake("all", {LAYER: torch.zeros(shape)}, {LAYER: bias}, norms)
    old_bias, old_norm = model.get_submodule(LAYER).bias.clone(), torch.ones(16)
    before = bits(model)
    with merged(model, [(adapter, 0.5)]) as report:
        torch.testing.assert_close(model.get_submodule(LAYER).bias, old_bias + 0.5 * bias)
        scale = model.get_submodule("single_blocks.0.norm.scale").weight
        torch.testing.assert_close(scale, old_norm + 0.5 * norm)
        assert set(report.adapters[0].skipped) == {"single_blocks.7.norm.scale.weight"}
    assert bits(model) == before
    model.get_submodule(LAYER).register_parameter("bias", None)
    with merged(model, [(adapter, 0.5)]) as report:
        assert f"{LAYER}.bias" in report.adapters[0].skipped
    only = DenseFake("only", {}, {"single_blocks.1.proj_out": bias})
    old_bias = model.single_blocks[1].proj_out.bias.clone()
    with merged(model, [(only, 2.0)]) as report:
        torch.testing.assert_close(model.single_blocks[1].proj_out.bias, old_bias + 2 * bias)
        assert report.layers == ()


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT8], ids=str)
def test_a_delta_of_the_weight_sees_it_without_the_others(model, dtype):
    stored_as(model, dtype)
    original = model.get_submodule(LAYER).weight.float().clone()
    seen = []

    def double(base):
        seen.append(base.clone())
        return base * 2

    shape = model_shapes(model)[LAYER]
    dora = DenseFake("dora", {LAYER: torch.zeros(shape)}, of_base={LAYER: double})
    other = random_dense("other", {LAYER: shape}, 3)
    with merged(model, [(other, 1.0), (dora, 0.5)]):
        exact = original + other.delta(LAYER) + original
        error = (model.get_submodule(LAYER).weight.float() - exact).abs()
        assert (error <= (1e-6 if dtype == torch.float32 else exact.abs() / 16 + 1e-3)).all()
        assert torch.equal(base_weight(model, LAYER), original)
    assert len(seen) == 1 and torch.equal(seen[0], original)
    with attached(model, [(random_adapter("low", model_shapes(model), 2, 0), 1.0)]):
        assert torch.equal(base_weight(model, LAYER), original)


def test_an_error_on_the_way_restores_all(model):
    class Breaks(DenseFake):
        left = 3

        def delta(self, layer, base=None):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return super().delta(layer, base)

    before, shapes = bits(model), model_shapes(model)
    deltas = {layer: torch.ones(shape) for layer, shape in shapes.items()}
    with pytest.raises(KeyboardInterrupt):
        merge_(model, [(Breaks("breaks", deltas), 1.0)])
    assert bits(model) == before
    merge_(model, low_and_dense(model))
    restore(model)


def test_a_merge_that_fails_leaves_what_was_attached(model):
    low = random_adapter("low", model_shapes(model), 2, 0)
    attach(model, [(low, 1.0)], "sum")
    layers = attached_layers(model)
    packed = nn.Parameter(torch.zeros(8, 4, dtype=torch.uint8), requires_grad=False)
    layers[LAYER].base.weight = packed
    with pytest.raises(FusionError, match=r"proj_out.weight is packed as uint8.*sum or gated"):
        attach(model, [(low, 1.0)], "merged")
    assert attached_layers(model) == layers


def test_nothing_is_merged_on_top_of_a_merge_or_of_attached_adapters(model):
    pairs = low_and_dense(model)
    before = bits(model)
    with merged(model, pairs):
        for part in (model, model.single_blocks[0]):
            with pytest.raises(FusionError, match="merged into this model already"):
                merge_(part, pairs)
    with (
        attached(model, pairs[:1], "sum"),
        pytest.raises(FusionError, match="detach them before merging"),
    ):
        merge_(model, pairs)
    assert bits(model) == before


class Subclass(torch.Tensor):
    """Stands for a tensor that a quantization library packs."""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: setattr(m, "weight_scale", torch.ones(1)), "quantized with scales"),
        (lambda m: m.to("meta"), "not in memory"),
        (
            lambda m: setattr(
                m, "weight", nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
            ),
            "packed as int8",
        ),
        (
            lambda m: m._parameters.update(weight=torch.zeros(16, 32).as_subclass(Subclass)),
            "packed as Subclass",
        ),
        (lambda m: m._parameters.update(weight=nn.Parameter(torch.zeros(512, 1))), r"\[512, 1\]"),
    ],
)
def test_weights_that_nothing_can_be_added_to_are_refused(model, change, words):
    linear = model.get_submodule(LAYER)
    change(linear)
    with pytest.raises(FusionError, match=words):
        merge_(model, low_and_dense(model))
    assert restore(model) == 0


def test_wrong_backups_are_refused(model):
    pairs = low_and_dense(model)
    for arguments in (("disk", None), ("reread", None), ("memory", lambda path: None)):
        with pytest.raises(FusionError, match="backup"):
            merge_(model, pairs, *arguments)


def test_weights_can_be_read_again_instead_of_kept(model):
    stored_as(model, torch.bfloat16)
    originals = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    available = True

    def read(path):
        if not available:
            raise OSError("the disk is gone")
        return originals[path].float()  # a checkpoint of another type that holds the same numbers

    merge_(model, low_and_dense(model), "reread", read)
    available = False
    with pytest.raises(FusionError, match=r"cannot be read again \(the disk is gone"):
        restore(model)
    available = True
    assert restore(model) > 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, originals[name])
    originals[f"{LAYER}.weight"] += 1
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(FusionError, match="not the model's present weight"):
        merge_(model, low_and_dense(model), "reread", read)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_merged_strengths_change_and_other_adapters_take_their_place(model):
    low, dense = low_and_dense(model)
    before = bits(model)
    weight = model.get_submodule(LAYER).weight.clone()
    attach(model, [low, dense], "merged")
    set_strengths(model, {"low": 0.0, "dense": 1.0})
    torch.testing.assert_close(model.get_submodule(LAYER).weight, weight + dense[0].delta(LAYER))
    with pytest.raises(FusionError, match="'nobody' is not attached; attached: low, dense"):
        set_strengths(model, {"nobody": 1.0})
    assert attached_names(model) == ("low", "dense")
    with attached(model, []):
        assert torch.equal(model.get_submodule(LAYER).weight, weight)
    torch.testing.assert_close(model.get_submodule(LAYER).weight, weight + dense[0].delta(LAYER))
    with attached(model, [low], "sum"):
        assert torch.equal(model.get_submodule(LAYER).weight, weight)
        assert attached_layers(model)
    assert attached_names(model) == ("low", "dense") and not attached_layers(model)
    attach(model, [low], "sum")
    assert attached_layers(model)
    detach(model)
    assert bits(model) == before


def test_any_module_with_a_weight_will_do():
    class Other(nn.Module):
        in_features, out_features = 4, 6

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 4), requires_grad=False)

    model = nn.Sequential(Other())
    before = bits(model)
    low = random_adapter("a", {"0": (6, 4)}, 2, 0)
    with merged(model, [(low, 2.0)]):
        exact = exact_weight(
            torch.frombuffer(bytearray(before["0.weight"][2]), dtype=torch.float32).view(6, 4),
            [(low, 2.0)],
            "0",
        )
        torch.testing.assert_close(model[0].weight.double(), exact, rtol=1e-6, atol=1e-6)
    assert bits(model) == before


@pytest.mark.slow
@pytest.mark.parametrize("computation", [torch.bfloat16, torch.float32])
def test_diffsynths_float8_layers_are_merged_and_restored(model, computation):
    from autolora.runtime.storage import store_in_float8

    assert store_in_float8(model, computation, torch.device("cpu")) == 6
    inputs = torch.randn(2, 5, 16).to(computation), torch.randn(2, 16).to(computation)
    before, base = bits(model), model(*inputs)
    for _ in range(100):
        with merged(model, low_and_dense(model)) as report:
            pass
    assert len(report.rounding) == 6 and all(0 < error < 1 for error in report.rounding.values())
    with merged(model, low_and_dense(model)):
        assert model.get_submodule(LAYER).weight.dtype == FLOAT8
        assert not torch.allclose(model(*inputs), base)
    assert bits(model) == before
    assert torch.equal(model(*inputs), base)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_on_a_gpu_come_back_from_the_cpu(model, dtype):
    stored_as(model.cuda(), dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    low = random_adapter("low", model_shapes(model), 3, seed=1)
    used = torch.cuda.memory_allocated()
    for _ in range(20):
        with merged(model, [(low, 0.8)]):
            assert model.get_submodule(LAYER).weight.is_cuda
            changed = model.get_submodule(LAYER).weight.view(torch.uint8)
            assert not torch.equal(changed, before[f"{LAYER}.weight"].view(torch.uint8))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8))
    assert torch.cuda.memory_allocated() <= used
