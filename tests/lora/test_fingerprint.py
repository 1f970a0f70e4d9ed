"""Fingerprints: the same for the same change in any form, and unlike for anything else."""

import math

import pytest
import torch
from torch import Generator

from autolora.lora import LoRA, save_lora
from autolora.lora.check import NEAR, PROBES, SAME, Fingerprint, _vectors, relative_distance, sketch
from autolora.lora.deltas import LayerDelta, LowRank, Magnitude, Piece
from autolora.lora.load_report import LoadReport
from tests.lora.truth import CASES, Size, TruthFile
from tests.lora.truth import layers as names
from tests.lora.truth.cases import plain
from tests.lora.truth.files import KOHYA, Spelling

TINY = Size(width=16, double=2, single=2, channels=4, context=10, pooled=6, time=8)


def factors(seed=0, rank=4, size=TINY):
    random = Generator().manual_seed(seed)
    return {
        layer: (
            torch.randn(rank, inner, generator=random),
            torch.randn(out, rank, generator=random) / 8,
        )
        for layer, (out, inner) in names.canonical_shapes(size).items()
        if "blocks." in layer
    }


def of_file(folder, tensors, metadata=None) -> Fingerprint:
    truth = TruthFile(TINY)
    truth.metadata = metadata or {}
    return Fingerprint.of(LoRA.load(truth.save(folder, tensors)))


@pytest.mark.parametrize(
    "name",
    [
        "kohya/mixed alphas, in and out layers, text encoders",
        "diffusers/scale and shift of norm_out",
        "diffusers/only k, ranks differ",
        "onetrainer/reference names",
        "lokr/both sides factored",
        "lokr/second side with a core",
        "lokr/no alpha, bfloat16",
        "loha/lora_unet_",
        "loha/cores",
        "full/diff and diff_b, lora_unet_",
        "mixed/LoRA, LoKr, LoHa and diffs in one file",
    ],
)
def test_numbers_are_bilinear_forms_of_the_dense_change(name, tmp_path):
    truth = CASES[name].make()
    lora = LoRA.load(truth.save(tmp_path))
    for layer in truth.layers:
        dense = truth.dense(layer)
        u, v = (_vectors(size, side).double() for side, size in enumerate(dense.shape))
        expected = torch.stack([u[:, k] @ dense @ v[:, k] for k in range(PROBES)])
        close = 1e-5 * float(dense.norm())
        assert torch.allclose(sketch(lora.layer_delta(layer)), expected, rtol=0, atol=close), layer


@pytest.mark.parametrize(
    "format", ["kohya", "diffusers", "peft", "ai-toolkit", "onetrainer", "onetrainer-bfl", "bfl"]
)
@pytest.mark.parametrize("alpha", [None, 3.0])
def test_the_format_does_not_matter(format, alpha, tmp_path):
    made = factors()
    plainly = Fingerprint.of(LoRA.from_factors("x", made))
    path = save_lora(tmp_path / "x.safetensors", made, format, alpha=alpha)
    assert Fingerprint.of(LoRA.load(path)).difference(plainly) <= SAME / 5


@pytest.mark.parametrize(
    "name",
    [
        "kohya/mixed alphas, in and out layers, text encoders",
        "dora/PEFT lora_magnitude_vector",
        "dora/kohya dora_scale by input",
        "full/diff and diff_b, lora_unet_",
        "full/normalization of queries and keys, diffusion_model. diff",
        "peft/bias of the up projection, alpha tensors",
    ],
)
def test_every_tensor_of_a_file_counts(name, tmp_path):
    truth = CASES[name].make(TINY)
    whole = of_file(tmp_path, truth.tensors, truth.metadata)
    again = of_file(tmp_path, truth.tensors, truth.metadata)
    assert whole.difference(again) == whole.text_difference(again) == 0
    for key in list(truth.tensors)[:: max(1, len(truth.tensors) // 12)]:
        moved = {**truth.tensors, key: truth.tensors[key] * 1.5 + 0.5}
        found = of_file(tmp_path, moved, truth.metadata)
        assert max(whole.difference(found), whole.text_difference(found)) > 10 * SAME, key


def test_layers_rows_and_columns_cannot_be_exchanged(tmp_path):
    made = factors()
    plainly = Fingerprint.of(LoRA.from_factors("x", made))
    first, second = "blocks.0.attn.a_to_out", "blocks.1.attn.a_to_out"
    for other in (
        made | {first: made[second], second: made[first]},
        made | {first: (made[first][0].flip(1), made[first][1])},
        made | {first: (made[first][0], made[first][1].flip(0))},
        made | {first: (made[first][1].T.contiguous(), made[first][0].T.contiguous())},
        {layer: (a, -b) for layer, (a, b) in made.items()},
        {layer: pair for layer, pair in made.items() if layer != first},
    ):
        assert Fingerprint.of(LoRA.from_factors("x", other)).difference(plainly) > NEAR


@pytest.mark.parametrize("change", [0.5, 0.01])
def test_the_difference_estimates_the_distance_of_the_weights(change):
    """Over many pairs the mean of its square is that of the relative Frobenius distance."""
    ratios = []
    for seed in range(30):
        made, noise = factors(seed), factors(1000 + seed)
        other = {
            layer: (torch.cat([a, noise[layer][0]]), torch.cat([b, change * noise[layer][1]], 1))
            for layer, (a, b) in made.items()
        }
        one, two = (LoRA.from_factors("x", pairs) for pairs in (made, other))
        true = math.dist([0.0], [LoRA.from_factors("n", noise).report.norm * change])
        true /= max(one.report.norm, two.report.norm)
        ratios.append(Fingerprint.of(one).difference(Fingerprint.of(two)) / true)
    assert 0.8 < (sum(r * r for r in ratios) / len(ratios)) ** 0.5 < 1.3
    assert all(0.2 < ratio < 3 for ratio in ratios)


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [(torch.bfloat16, 5e-4, 0.01), (torch.float16, 1e-4, 0.002), (torch.float32, 0, 0)],
)
def test_a_copy_in_another_precision_is_near(dtype, low, high):
    made = factors()
    rounded = {layer: (a.to(dtype), b.to(dtype)) for layer, (a, b) in made.items()}
    one, two = (Fingerprint.of(LoRA.from_factors("x", pairs)) for pairs in (made, rounded))
    assert low <= one.difference(two) <= high < NEAR


def test_unrelated_loras_are_far_apart():
    found = [Fingerprint.of(LoRA.from_factors("x", factors(seed))) for seed in range(40)]
    apart = [a.difference(b) for n, a in enumerate(found) for b in found[:n]]
    assert min(apart) > 4 * NEAR


def test_text_encoders_are_compared_apart(tmp_path):
    """A conversion to another format often loses them."""
    text = Spelling("lora_te1_", "_", "lora_down.weight", "lora_up.weight")
    truth = TruthFile(TINY).add(names.bfl(TINY), KOHYA, plain())
    without = of_file(tmp_path, truth.tensors)
    whole = of_file(tmp_path, truth.add(names.clip(), text, plain(), text="clip").tensors)
    assert whole.difference(without) == 0 and whole.text_difference(without) == 1
    assert whole.text_difference(whole) == 0


def test_what_is_too_large_to_compare_is_like_nothing():
    huge = Fingerprint({"weights": torch.full((PROBES,), math.inf, dtype=torch.float64)})
    fine = Fingerprint({"weights": torch.ones(PROBES, dtype=torch.float64)})
    for one, two in ((huge, huge), (huge, fine), (fine, huge)):
        assert not one.difference(two) <= NEAR
    nothing = Fingerprint({})
    assert nothing.difference(nothing) == 0 and fine.difference(nothing) == 1
    assert relative_distance(torch.zeros(2), torch.zeros(2)) == 0


def test_the_longer_of_two_counts_in_either_order():
    one, two = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.0])
    for a, b, expected in ((one, two, 1.0), (one, 2 * one, 0.5), (one, -one, 2.0)):
        assert relative_distance(a, b) == relative_distance(b, a) == expected


def test_one_kind_that_cannot_be_compared_makes_two_unlike():
    fine = torch.ones(PROBES, dtype=torch.float64)
    for kinds in (("biases", "norms", "weights"), ("weights", "norms", "biases")):
        found = {kind: fine / 0 if kind == "norms" else fine for kind in kinds}
        one = Fingerprint(found)
        assert math.isnan(one.difference(one))


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_magnitudes_of_parts_cannot_be_exchanged(axis):
    q, k = torch.rand(8) + 0.5, torch.rand(8) + 0.5

    def numbers(first, second):
        change = LowRank(torch.ones(1, 8), torch.ones(8, 1))
        pieces = (
            Piece(change, (slice(0, 8),), Magnitude(first, axis)),
            Piece(change, (slice(8, 16),), Magnitude(second, axis)),
        )
        report = LoadReport("x")
        return Fingerprint.of(
            LoRA("x", {"blocks.0.attn.a_to_qkv": LayerDelta(24, 8, pieces)}, report)
        )

    assert numbers(q, k).difference(numbers(q, k)) == 0
    assert numbers(q, k).difference(numbers(k, q)) > NEAR / 2
