"""Every FLUX.1 format and variant, read back against an independent writer's dense truth."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from autolora.errors import LoRAFormatError
from autolora.lora import LoRA
from tests.lora.truth import CASES, REFUSED, TruthFile

TOLERANCE = 1e-6


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the truth; a zero truth allows none."""
    difference = float((value.double() - truth).norm())
    size = float(truth.norm())
    return difference / size if size else float(difference != 0)


def delta(lora: LoRA, truth: TruthFile, layer: str) -> torch.Tensor:
    return lora.delta(layer, truth.base(layer) if layer in truth.needs_base else None)


@pytest.fixture(params=CASES, scope="module")
def read(request, tmp_path_factory) -> tuple[TruthFile, LoRA]:
    truth = CASES[request.param].make()
    return truth, LoRA.load(truth.save(tmp_path_factory.mktemp("truth")))


def test_weight_changes_are_exact(read):
    truth, lora = read
    assert lora.layers == truth.layers
    for layer in truth.layers:
        value = delta(lora, truth, layer)
        assert value.dtype == torch.float32
        assert tuple(value.shape) == lora.shape(layer) == truth.shape(layer)
        assert relative_error(value, truth.dense(layer)) <= TOLERANCE, layer


def test_bias_changes_are_exact(read):
    truth, lora = read
    assert list(lora.bias_layers) == truth.biases
    for layer in truth.biases:
        assert relative_error(lora.bias(layer), truth.bias(layer)) <= TOLERANCE, layer
    for layer in set(truth.layers) - set(truth.biases):
        assert lora.bias(layer) is None, layer


def test_normalization_changes_are_exact(read):
    truth, lora = read
    assert set(lora.norms) == set(truth.norms)
    for path, change in truth.norms.items():
        assert torch.equal(lora.norms[path], change), path


def test_the_report_counts_and_measures(read):
    truth, lora = read
    assert lora.report.layers == len(truth.layers)
    assert lora.report.biases == len(truth.biases)
    assert lora.report.norms == len(truth.norms)
    assert lora.report.text_encoders == {name: len(found) for name, found in truth.text.items()}
    if truth.needs_base:
        assert lora.report.norm is None
    else:
        square = sum(float(truth.dense(layer).square().sum()) for layer in truth.layers)
        assert lora.report.norm == pytest.approx(square**0.5, rel=1e-5)


def test_no_key_is_lost(read):
    truth, lora = read
    assert set(lora.report.matched) == set(truth.tensors)
    assert lora.report.dropped == {}


def test_what_needs_the_base_weight_says_so(read):
    truth, lora = read
    assert list(lora.needs_base) == truth.needs_base
    for layer in truth.needs_base:
        with pytest.raises(LoRAFormatError, match="base"):
            lora.delta(layer)


def test_factors_hold_exactly_what_is_low_rank(read):
    truth, lora = read
    for layer in truth.layers:
        assert lora.exact(layer) or not truth.low_rank(layer), layer
        if not truth.low_rank(layer):
            continue
        A, B = lora.factors(layer)
        assert relative_error(B.double() @ A.double(), truth.dense(layer)) <= TOLERANCE, layer


def test_factors_of_anything_else_are_refused_with_the_way_out(read):
    truth, lora = read
    for layer in truth.layers:
        if not lora.exact(layer):
            with pytest.raises(LoRAFormatError, match="low_rank"):
                lora.factors(layer)


def test_text_encoders_are_exact(read):
    truth, lora = read
    for which in ("clip", "t5"):
        encoder = lora.text_encoder(which)
        modules = truth.text.get(which, {})
        assert (encoder is not None) == bool(modules), which
        if encoder is None:
            continue
        assert encoder.layers == sorted(modules)
        for path, weights in modules.items():
            dense = torch.from_numpy(weights.change())
            assert relative_error(encoder.delta(path), dense) <= TOLERANCE, path


def best_error(dense: torch.Tensor, rank: int) -> float:
    """Relative error of the best matrix of a rank (Eckart and Young), by numpy's SVD."""
    values = np.linalg.svd(dense.numpy(), compute_uv=False)
    return float(np.sqrt((values[rank:] ** 2).sum() / (values**2).sum()))


@pytest.mark.parametrize(
    "name",
    [
        "kohya/no alpha",
        "lokr/both sides factored",
        "lokr/lycoris_",
        "loha/lora_unet_",
        "dora/kohya dora_scale by input",
        "dora/PEFT lora_magnitude_vector",
        "full/diff and diff_b, lora_unet_",
        "mixed/LoRA, LoKr, LoHa and diffs in one file",
    ],
)
def test_low_rank_is_nearly_the_best_and_says_how_far_off_it_is(name, tmp_path):
    truth = CASES[name].make()
    rank = 8
    plain = LoRA.load(truth.save(tmp_path)).low_rank(rank, base=truth.base)
    assert plain.layers == truth.layers
    assert tuple(plain.needs_base) == ()
    for layer in truth.layers:
        A, B = plain.factors(layer)
        dense = truth.dense(layer)
        error = relative_error(B.double() @ A.double(), dense)
        assert plain.report.errors.get(layer, 0.0) == pytest.approx(error, abs=2e-6), layer
        if truth.low_rank(layer):
            assert error <= TOLERANCE
        else:
            assert error <= 1.01 * best_error(dense, rank) + 2e-6, layer


def test_low_rank_of_the_full_rank_loses_nothing(tmp_path):
    truth = CASES["mixed/LoRA, LoKr, LoHa and diffs in one file"].make()
    plain = LoRA.load(truth.save(tmp_path)).low_rank(truth.size.width, base=truth.base)
    for layer in truth.layers:
        A, B = plain.factors(layer)
        assert relative_error(B.double() @ A.double(), truth.dense(layer)) <= 5e-6, layer


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_hold_no_flux_lora_are_refused_by_name(name, tmp_path):
    tensors, words = REFUSED[name]
    path = tmp_path / "other.safetensors"
    save_file(tensors, path)
    with pytest.raises(LoRAFormatError) as caught:
        LoRA.load(path)
    message = str(caught.value)
    assert "other.safetensors" in message
    assert all(word in message.lower() for word in words), message
    assert message.count("\n") == 0


def test_the_truth_is_not_trivial():
    """No two layers of a case change alike, and every case changes something."""
    for case in CASES.values():
        truth = case.make()
        sizes = [float(truth.dense(layer).norm()) for layer in truth.layers]
        assert max(sizes) > 0, case.name
        assert len({size for size in sizes if size}) == sum(size > 0 for size in sizes), case.name


def test_a_change_in_any_tensor_is_seen(tmp_path):
    """The comparison can fail: every stored tensor matters to one layer's truth."""
    truth = CASES["mixed/LoRA, LoKr, LoHa and diffs in one file"].make()
    for key in list(truth.tensors)[:12]:
        moved = dict(truth.tensors)
        moved[key] = moved[key] * 1.001
        lora = LoRA.load(truth.save(tmp_path, moved))
        errors = [relative_error(lora.delta(x), truth.dense(x)) for x in truth.layers]
        assert sum(error > 1e-4 for error in errors) == 1, key
