"""What must hold for any file: changes of form that leave the weight change as it is."""

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Generator, Tensor

from autolora.lora import LoRA
from tests.lora.truth import CASES, Size, TruthFile
from tests.lora.truth import layers as names
from tests.lora.truth.cases import plain
from tests.lora.truth.files import KOHYA, Spelling
from tests.lora.truth.weights import loha, lokr, lora

TINY = Size(width=16, double=1, single=1, channels=4, context=10, pooled=6, time=8)
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}

SOME = settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
seeds = st.integers(0, 2**16)
ranks = st.integers(1, 9)
alphas = st.one_of(st.none(), st.floats(-64, 64).map(lambda x: float(torch.tensor(x))))


def tiny(seed: int = 0) -> TruthFile:
    return TruthFile(TINY, Generator().manual_seed(seed))


def loaded(folder: Path, tensors: dict[str, Tensor]) -> LoRA:
    path = folder / "lora.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return LoRA.load(path)


def deltas(lora: LoRA, truth: TruthFile | None = None) -> dict[str, Tensor]:
    return {layer: lora.delta(layer, truth.base(layer) if truth else None) for layer in lora.layers}


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance=0.0):
    assert sorted(found) == sorted(expected)
    for layer, dense in expected.items():
        if tolerance:
            error = (found[layer].double() - dense.double()).norm()
            assert error <= tolerance * dense.double().norm(), layer
        else:
            assert torch.equal(found[layer], dense), layer


def write_in_order(path: Path, tensors: dict[str, Tensor], order: list[str]) -> None:
    """A safetensors file by hand: data and header in any order of keys."""
    header: dict[str, object] = {}
    data = b""
    for key in order:
        raw = tensors[key].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[key] = {
            "dtype": DTYPES[tensors[key].dtype],
            "shape": list(tensors[key].shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@SOME
@given(
    name=st.sampled_from(
        [
            "kohya/mixed alphas, in and out layers, text encoders",
            "diffusers/only q, k, v, ranks differ",
            "onetrainer/legacy",
            "dora/PEFT lora_magnitude_vector",
            "mixed/LoRA, LoKr, LoHa and diffs in one file",
        ]
    ),
    random=st.randoms(use_true_random=False),
)
def test_the_order_of_keys_does_not_matter(name, random, tmp_path):
    truth = CASES[name].make(TINY)
    expected = deltas(loaded(tmp_path, truth.tensors), truth)
    order = sorted(truth.tensors)
    random.shuffle(order)
    path = tmp_path / "shuffled.safetensors"
    write_in_order(path, truth.tensors, order)
    assert_alike(deltas(LoRA.load(path), truth), expected)


@SOME
@given(
    seed=seeds,
    keys=st.lists(
        st.sampled_from(
            [
                "epoch",
                "step",
                "optimizer.state.0.exp_avg",
                "transformer.unknown.weight",
                "lora_unet_middle_blocks_0_img_attn_qkv.note",
                "vae.decoder.conv_in.weight",
            ]
        ),
        unique=True,
    ),
)
def test_keys_that_mean_nothing_change_nothing_and_are_reported(seed, keys, tmp_path):
    truth = tiny(seed).add(names.bfl(TINY), KOHYA, plain((2,), (1.0, 4.0)))
    expected = deltas(loaded(tmp_path, truth.tensors))
    more = {key: torch.ones(3) for key in keys}
    found = loaded(tmp_path, truth.tensors | more)
    assert_alike(deltas(found), expected)
    assert set(found.report.dropped) == set(keys)
    assert all(found.report.dropped.values())


@SOME
@given(seed=seeds, rank=ranks, alpha=alphas)
def test_factors_may_be_split_in_any_way(seed, rank, alpha, tmp_path):
    """``B M`` and ``M^-1 A`` are the same adapter for every invertible ``M``."""
    truth = tiny(seed).add(names.bfl(TINY), KOHYA, plain((rank,), (alpha,)))
    expected = deltas(loaded(tmp_path, truth.tensors))
    random = Generator().manual_seed(seed + 1)
    moved = dict(truth.tensors)
    for key in truth.tensors:
        if key.endswith("lora_down.weight"):
            other = key.replace("lora_down", "lora_up")
            skew = torch.randn(rank, rank, generator=random, dtype=torch.float64)
            rotation = torch.linalg.qr(skew).Q
            stretch = torch.exp(torch.randn(rank, generator=random, dtype=torch.float64))
            moved[key] = (rotation.T @ moved[key].double() / stretch[:, None]).float()
            moved[other] = (moved[other].double() @ (rotation * stretch).contiguous()).float()
            # (B Q S)(S^-1 Q^T A): rows of Q^T A are divided by S.
    assert_alike(deltas(loaded(tmp_path, moved)), expected, 2e-5)


@SOME
@given(seed=seeds, factor=st.sampled_from([-3.0, 0.25, 2.0, 7.0]), alpha=st.floats(0.125, 64))
@pytest.mark.parametrize("kind", ["lora", "lokr", "loha"])
def test_the_change_is_linear_in_alpha(kind, seed, factor, alpha, tmp_path):
    make = {"lora": lora, "lokr": lokr, "loha": loha}[kind]
    alpha = float(torch.tensor(alpha))

    def draw(random, module, n):
        return make(random, module.outputs, module.inputs, alpha=alpha)

    truth = tiny(seed).add(names.bfl(TINY), KOHYA, draw)
    once = deltas(loaded(tmp_path, truth.tensors))
    scaled = {k: t * factor if k.endswith(".alpha") else t for k, t in truth.tensors.items()}
    expected = {layer: dense.double() * factor for layer, dense in once.items()}
    assert_alike(deltas(loaded(tmp_path, scaled)), expected, 1e-6)


@SOME
@given(seed=seeds, rank=ranks, more=st.integers(1, 5), alpha=st.floats(0.5, 16))
def test_unused_rank_changes_nothing(seed, rank, more, alpha, tmp_path):
    """Zeros in A and B, and an alpha that grows with the rank, leave the change as it was."""
    truth = tiny(seed).add(names.bfl(TINY), KOHYA, plain((rank,), (alpha,)))
    expected = deltas(loaded(tmp_path, truth.tensors))
    padded = {}
    for key, tensor in truth.tensors.items():
        if key.endswith("lora_down.weight"):
            padded[key] = torch.cat([tensor, torch.zeros(more, tensor.shape[1])])
        elif key.endswith("lora_up.weight"):
            padded[key] = torch.cat([tensor, torch.zeros(tensor.shape[0], more)], dim=1)
        else:
            padded[key] = (tensor.double() * (rank + more) / rank).float()
    assert_alike(deltas(loaded(tmp_path, padded)), expected, 1e-6)


@SOME
@given(seed=seeds, rank=ranks, alpha=alphas)
def test_the_spelling_of_keys_does_not_matter(seed, rank, alpha, tmp_path):
    found = []
    for spelling in (
        KOHYA,
        Spelling("diffusion_model."),
        Spelling("diffusion_model.", A="lora_down.weight", B="lora_up.weight"),
        Spelling("base_model.model."),
    ):
        truth = tiny(seed).add(names.bfl(TINY), spelling, plain((rank,), (alpha,)))
        found.append(deltas(loaded(tmp_path, truth.tensors)))
    for other in found[1:]:
        assert_alike(other, found[0])


@SOME
@given(seed=seeds, rank=ranks, alpha=alphas)
def test_a_fused_layer_may_be_stored_in_parts(seed, rank, alpha, tmp_path):
    """Parts that share A, with the rows of B dealt out, are the fused layer."""
    fused = tiny(seed).add(names.bfl(TINY), KOHYA, plain((rank,), (alpha,)))
    expected = deltas(loaded(tmp_path, fused.tensors))
    of_layer = {module.layer: module for module in names.bfl(TINY)}
    tensors: dict[str, Tensor] = {}
    for part in names.diffusers(TINY):
        whole = KOHYA.key(of_layer[part.layer].path, "A").removesuffix(".lora_down.weight")
        key = f"transformer.{part.path}"
        tensors[f"{key}.lora_A.weight"] = fused.tensors[f"{whole}.lora_down.weight"].clone()
        up = fused.tensors[f"{whole}.lora_up.weight"]
        tensors[f"{key}.lora_B.weight"] = torch.cat([up[start:stop] for start, stop in part.rows])
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
    assert_alike(deltas(loaded(tmp_path, tensors)), expected)


@SOME
@given(seed=seeds, first=ranks, second=ranks)
def test_stacked_adapters_are_the_sum(seed, first, second, tmp_path):
    one = tiny(seed).add(names.bfl(TINY), KOHYA, plain((first,)))
    two = tiny(seed + 1).add(names.bfl(TINY), KOHYA, plain((second,)))
    left, right = (deltas(loaded(tmp_path, file.tensors)) for file in (one, two))
    expected = {layer: left[layer].double() + right[layer].double() for layer in left}
    joined = {
        key: torch.cat([tensor, two.tensors[key]], dim=0 if "lora_down" in key else 1)
        for key, tensor in one.tensors.items()
    }
    assert_alike(deltas(loaded(tmp_path, joined)), expected, 1e-6)


@SOME
@given(seed=seeds, dtype=st.sampled_from([torch.float16, torch.bfloat16]), alpha=alphas)
def test_only_the_values_count_not_their_type(seed, dtype, alpha, tmp_path):
    truth = tiny(seed).add(names.bfl(TINY), KOHYA, plain((3,), (alpha,), dtype=dtype))
    wide = {key: tensor.float() for key, tensor in truth.tensors.items()}
    assert_alike(deltas(loaded(tmp_path, wide)), deltas(loaded(tmp_path, truth.tensors)))


@SOME
@given(seed=seeds, axis=st.sampled_from([0, 1]), factor=st.floats(0.5, 2))
def test_magnitudes_that_are_the_norms_make_a_dora_a_lora(seed, axis, factor, tmp_path):
    """With m = c ||W + BA|| the changed weight is c (W + BA)."""
    truth = tiny(seed).add(names.bfl(TINY), KOHYA, plain((2,), (1.0, 3.0)))
    lora_deltas = deltas(loaded(tmp_path, truth.tensors))
    tensors, expected = dict(truth.tensors), {}
    for module in names.bfl(TINY):
        base = truth.base(module.layer).double()
        moved = base + truth.dense(module.layer)
        key = KOHYA.key(module.path, "magnitude")
        tensors[key] = (factor * moved.norm(dim=axis, keepdim=True)).float()
        expected[module.layer] = factor * (base + lora_deltas[module.layer].double()) - base
    lora = loaded(tmp_path, tensors)
    assert sorted(lora.needs_base) == sorted(expected)
    assert_alike(deltas(lora, truth), expected, 1e-6)


@SOME
@given(seed=seeds, rank=st.integers(1, 40), alpha=alphas)
def test_low_rank_leaves_what_is_low_rank_alone(seed, rank, alpha, tmp_path):
    truth = tiny(seed).add(names.diffusers(TINY), Spelling("transformer."), plain((5, 2), (alpha,)))
    lora = loaded(tmp_path, truth.tensors)
    again = lora.low_rank(rank, base=truth.base)
    for layer in lora.layers:
        assert all(map(torch.equal, again.factors(layer), lora.factors(layer))), layer
