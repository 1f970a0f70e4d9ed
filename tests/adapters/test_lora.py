"""The LoRA object: in memory, its checks, and what it says of itself."""

import hashlib
import subprocess
import sys

import pytest
import torch

from autolora.adapters import LoRA, Metadata
from autolora.errors import AutoLoRAError, LoRAFormatError
from tests.adapters.lora_files import (
    assert_same_deltas,
    canonical_shapes,
    make_file,
    relative_error,
)

LAYER = "blocks.0.attn.a_to_out"


def test_from_factors():
    A, B = torch.randn(3, 5), torch.randn(7, 3)
    lora = LoRA.from_factors("mine", {"some.linear": (A, B), LAYER: (A.half(), B.half())})
    assert lora.layers == [LAYER, "some.linear"]
    assert lora.name == "mine"
    assert lora.path is None
    assert lora.metadata.title == "mine"
    assert lora.rank(LAYER) == 3
    assert lora.shape(LAYER) == (7, 5)
    assert relative_error(lora.delta("some.linear"), B.double() @ A.double()) < 1e-6
    down, up = lora.factors("some.linear")
    assert torch.equal(down, A) and torch.equal(up, B)
    assert lora.nbytes == (15 + 21) * (4 + 2)
    assert lora.report.ranks == (3, 3)
    assert LAYER in lora and "other" not in lora
    assert "mine" in repr(lora)


def test_delta_does_not_touch_what_it_was_made_from():
    A, B = torch.randn(2, 4, requires_grad=True), torch.randn(4, 2)
    before = A.detach().clone(), B.clone()
    lora = LoRA.from_factors("x", {LAYER: (A, B)})
    lora.delta(LAYER).zero_()
    lora.factors(LAYER)[1].zero_()
    assert not lora.delta(LAYER).requires_grad
    assert torch.equal(A, before[0]) and torch.equal(B, before[1])
    assert lora.delta(LAYER).any()


@pytest.mark.parametrize(
    ("A", "B", "words"),
    [
        (torch.ones(2, 3), torch.ones(4, 3), "A [2, 3] and B [4, 3]"),
        (torch.ones(2), torch.ones(4, 2), "A [2]"),
        (torch.ones(0, 3), torch.ones(4, 0), "A [0, 3]"),
        (torch.ones(2, 3).int(), torch.ones(4, 2), "floating-point"),
        (torch.ones(2, 3) * float("nan"), torch.ones(4, 2), "NaN"),
    ],
)
def test_bad_factors(A, B, words):
    with pytest.raises(LoRAFormatError) as caught:
        LoRA.from_factors("x", {LAYER: (A, B)})
    assert words in str(caught.value)
    assert LAYER in str(caught.value)


def test_no_factors():
    with pytest.raises(LoRAFormatError, match="at least one layer"):
        LoRA.from_factors("x", {})


def test_unknown_layer_names_a_close_one():
    lora = LoRA.from_factors("x", {LAYER: (torch.ones(1, 2), torch.ones(2, 1))})
    for ask in (lora.delta, lora.factors, lora.shape, lora.rank):
        with pytest.raises(LoRAFormatError, match=r"did you mean blocks\.0.attn\.a_to_out"):
            ask("blocks.0.attn.b_to_out")


def test_check_fits(tmp_path):
    shapes = canonical_shapes()
    lora = LoRA.load(make_file("kohya").save(tmp_path / "a.safetensors"))
    lora.check_fits(shapes)
    lora.check_fits(shapes | {"more": (1, 1)})
    with pytest.raises(LoRAFormatError) as caught:
        lora.check_fits(shapes | {LAYER: (16, 16)})
    for words in (LAYER, "[8, 8]", "[16, 16]", "another base model"):
        assert words in str(caught.value)
    missing = {layer: shape for layer, shape in shapes.items() if layer != LAYER}
    with pytest.raises(LoRAFormatError, match=f"{LAYER}, which the model does not have"):
        lora.check_fits(missing)


def test_file_facts(tmp_path):
    made = make_file("kohya", dtype=torch.bfloat16)
    path = made.save(tmp_path / "a.safetensors", metadata={"modelspec.title": "Neon"})
    lora = LoRA.load(str(path))
    assert lora.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert lora.nbytes == sum(value.numel() * 2 for value in made.tensors.values())
    assert lora.metadata.title == "Neon"
    assert lora.path == path


def test_overwriting_the_file_leaves_a_loaded_lora_alone(tmp_path):
    made = make_file("kohya")
    path = made.save(tmp_path / "a.safetensors")
    lora = LoRA.load(path)
    path.write_bytes(bytes(path.stat().st_size // 2))
    assert_same_deltas(lora, made.truth)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e5m2, torch.float8_e4m3fn])
def test_other_float_types(tmp_path, dtype):
    made = make_file("kohya", dtype=dtype)
    assert_same_deltas(LoRA.load(made.save(tmp_path / "a.safetensors")), made.truth)


def test_integer_alpha(tmp_path):
    made = make_file("kohya", ranks=(4,), alphas=(2.0,))
    made.tensors = {
        key: value.to(torch.int64) if key.endswith("alpha") else value
        for key, value in made.tensors.items()
    }
    assert_same_deltas(LoRA.load(made.save(tmp_path / "a.safetensors")), made.truth)


def test_hash_of_factors_follows_their_values():
    A, B = torch.randn(2, 3), torch.randn(3, 2)
    first = LoRA.from_factors("x", {LAYER: (A, B)}).sha256
    assert first == LoRA.from_factors("y", {LAYER: (A.clone(), B)}).sha256
    assert first != LoRA.from_factors("x", {LAYER: (A, B + 1)}).sha256
    assert first != LoRA.from_factors("x", {"other": (A, B)}).sha256


def test_metadata_given_is_kept():
    metadata = Metadata(title="T", trigger_words=["w"])
    pair = (torch.ones(1, 2), torch.ones(2, 1))
    assert LoRA.from_factors("x", {LAYER: pair}, metadata=metadata).metadata is metadata


def test_all_errors_share_a_base():
    import autolora.errors as errors

    kinds = [value for value in vars(errors).values() if isinstance(value, type)]
    assert len(kinds) == 7
    assert all(issubclass(kind, AutoLoRAError) and kind.__doc__ for kind in kinds)


def test_listing_a_pool_does_not_import_torch(tmp_path):
    make_file("kohya").save(tmp_path / "a.safetensors")
    code = (
        "import sys; from autolora.adapters import Pool;"
        f"pool = Pool({str(tmp_path)!r}); pool.metadata('a');"
        "assert 'torch' not in sys.modules and 'diffsynth' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
