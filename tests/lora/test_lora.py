"""The LoRA object: in memory, its checks, and what it says of itself."""

import hashlib
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from autolora.errors import AutoLoRAError, LoRAFormatError
from autolora.lora import LoRA, Metadata
from tests.lora.lora_files import (
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
    kinds = [kind for kind in kinds if issubclass(kind, Exception)]
    assert len(kinds) == 8
    assert all(issubclass(kind, AutoLoRAError) and kind.__doc__ for kind in kinds)


def test_listing_a_pool_does_not_import_torch(tmp_path):
    make_file("kohya").save(tmp_path / "a.safetensors")
    code = (
        "import sys; from autolora.lora import Pool;"
        f"pool = Pool({str(tmp_path)!r}); pool.metadata('a');"
        "assert 'torch' not in sys.modules and 'diffsynth' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def save(tmp_path, tensors, metadata=None):
    path = tmp_path / "a.safetensors"
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata=metadata)
    return path


OUT = "lora_unet_double_blocks_0_img_attn_proj"  # LAYER in kohya's spelling
PAIR = {f"{OUT}.lora_down.weight": torch.randn(2, 8), f"{OUT}.lora_up.weight": torch.randn(8, 2)}
LOKR = {f"{OUT}.lokr_w1": torch.randn(2, 4), f"{OUT}.lokr_w2": torch.randn(4, 2)}
DORA = PAIR | {f"{OUT}.dora_scale": torch.rand(1, 8) + 0.5}


def test_layers_without_factors_say_what_to_do(tmp_path):
    lora = LoRA.load(save(tmp_path, LOKR))
    assert not lora.exact(LAYER) and lora.needs_base == ()
    assert lora.report.algorithms == {"LoKr": 1} and lora.report.ranks == (0, 0)
    for ask in (lora.factors, lora.rank):
        with pytest.raises(LoRAFormatError, match=r"is LoKr and has no .*low_rank\(\), or merge"):
            ask(LAYER)
    truth = torch.kron(LOKR[f"{OUT}.lokr_w1"], LOKR[f"{OUT}.lokr_w2"])
    assert relative_error(lora.delta(LAYER), truth.double()) < 1e-6
    assert lora.report.norm == pytest.approx(float(truth.norm()), rel=1e-6)
    assert len(lora.sha256) == 64


def test_dora_needs_its_base(tmp_path):
    lora = LoRA.load(save(tmp_path, DORA))
    assert lora.needs_base == (LAYER,) and not lora.exact(LAYER)
    assert lora.report.algorithms == {"DoRA": 1} and lora.report.norm is None
    for base, words in (
        (None, "depends on the base weight; give that weight"),
        (torch.ones(8, 9), r"torch.float32 \[8, 9\], and LoRA 'a' needs .*\[8, 8\]"),
        (torch.ones(8, 8, dtype=torch.uint8), "torch.uint8"),
    ):
        with pytest.raises(LoRAFormatError, match=words):
            lora.delta(LAYER, base)
        with pytest.raises(LoRAFormatError, match=words):
            lora.low_rank(2, None if base is None else lambda _, base=base: base)
    base = torch.randn(8, 8)
    whole = base.double() + PAIR[f"{OUT}.lora_up.weight"] @ PAIR[f"{OUT}.lora_down.weight"]
    truth = whole / whole.norm(dim=0) * DORA[f"{OUT}.dora_scale"] - base
    assert relative_error(lora.delta(LAYER, base), truth) < 1e-6


def test_low_rank(tmp_path):
    other = "lora_unet_double_blocks_0_txt_attn_proj"
    tensors = LOKR | {key.replace(OUT, other): value for key, value in PAIR.items()}
    bias = torch.randn(8)
    tensors[f"{other}.diff_b"] = bias
    lora = LoRA.load(save(tmp_path, tensors))
    low = lora.low_rank(1)
    plain = "blocks.0.attn.b_to_out"
    assert (low.name, low.layers, low.path) == (lora.name, lora.layers, lora.path)
    assert set(low.report.errors) == {LAYER} and lora.report.errors == {}
    assert low.exact(plain) and not low.exact(LAYER)
    assert (low.rank(plain), low.rank(LAYER)) == (2, 1)
    assert torch.equal(low.bias(plain), bias) and low.bias(LAYER) is None
    truth = lora.delta(LAYER).double()
    s = torch.linalg.svdvals(truth)
    assert low.report.errors[LAYER] == pytest.approx(float(s[1:].norm() / s.norm()), rel=1e-4)
    assert relative_error(low.delta(LAYER), truth) == pytest.approx(low.report.errors[LAYER])
    exact = lora.low_rank(8)
    assert exact.exact(LAYER) and relative_error(exact.delta(LAYER), truth) < 1e-6
    with pytest.raises(LoRAFormatError, match="at least 1"):
        lora.low_rank(0)


def test_leading_factors(tmp_path):
    """Exact for low-rank layers; of the change alone where there are magnitudes."""
    plain, dora = (LoRA.load(save(tmp_path, tensors)) for tensors in (PAIR, DORA))
    for first, second in zip(plain.factors(LAYER), dora.leading_factors(LAYER), strict=True):
        assert torch.equal(first, second)
    A, B = LoRA.load(save(tmp_path, LOKR)).leading_factors(LAYER, rank=8)
    truth = torch.kron(LOKR[f"{OUT}.lokr_w1"], LOKR[f"{OUT}.lokr_w2"])
    assert relative_error(B @ A, truth.double()) < 1e-6


def test_biases_and_norms(tmp_path):
    """Rows of a split layer, and of a permuted one, go where its weights go."""
    v, scale_shift, low = torch.randn(8), torch.randn(16), torch.randn(8)
    query = torch.randn(4)
    tensors = {
        "transformer.transformer_blocks.0.attn.to_v.diff_b": v,
        "transformer.norm_out.linear.diff_b": scale_shift,
        "transformer.transformer_blocks.0.attn.to_add_out.lora_A.weight": torch.randn(2, 8),
        "transformer.transformer_blocks.0.attn.to_add_out.lora_B.weight": torch.randn(8, 2),
        "transformer.transformer_blocks.0.attn.to_add_out.lora_B.bias": low,
        "transformer.transformer_blocks.0.attn.to_add_out.alpha": torch.tensor(1.0),
        "transformer.transformer_blocks.0.attn.norm_added_q.weight.diff": query.half(),
        "transformer.single_transformer_blocks.3.attn.norm_k.w_norm": query,
    }
    lora = LoRA.load(save(tmp_path, tensors))
    assert set(lora.report.matched) == set(tensors)
    assert lora.layers == ["blocks.0.attn.b_to_out"]
    assert lora.bias_layers == (
        "blocks.0.attn.a_to_qkv",
        "blocks.0.attn.b_to_out",
        "final_norm_out.linear",
    )
    assert torch.equal(lora.bias("blocks.0.attn.a_to_qkv"), torch.cat([torch.zeros(16), v]))
    expected = torch.cat([scale_shift[8:], scale_shift[:8]])
    assert torch.equal(lora.bias("final_norm_out.linear"), expected)
    assert torch.equal(lora.bias("blocks.0.attn.b_to_out"), low / 2)
    assert lora.bias("blocks.0.attn.b_to_qkv") is None
    assert set(lora.norms) == {"blocks.0.attn.norm_q_b", "single_blocks.3.norm_k_a"}
    assert torch.equal(lora.norms["blocks.0.attn.norm_q_b"], query.half().float())
    assert (lora.report.biases, lora.report.norms) == (3, 2)
    shapes = {"blocks.0.attn.b_to_out": (8, 8), "final_norm_out.linear": (16, 8)}
    with pytest.raises(LoRAFormatError, match=r"a_to_qkv, which the model does not have"):
        lora.check_fits(shapes)
    lora.check_fits(shapes | {"blocks.0.attn.a_to_qkv": (24, 8)})


def test_only_text_encoders(tmp_path):
    key = "lora_te1_text_model_encoder_layers_2_mlp_fc1"
    down, up = torch.randn(2, 6), torch.randn(12, 2)
    tensors = {
        f"{key}.lora_down.weight": down,
        f"{key}.lora_up.weight": up,
        f"{key}.alpha": torch.tensor(1.0),
    }
    path = save(tmp_path, tensors)
    with pytest.raises(LoRAFormatError, match=r"only text encoders \(3 keys\).*text_encoder_only"):
        LoRA.load(path)
    lora = LoRA.load(path, text_encoder_only=True)
    assert lora.layers == [] and lora.report.layers == 0
    assert lora.report.text_encoders == {"clip": 1}
    assert lora.text_encoder("t5") is None
    clip = lora.text_encoder("clip")
    assert clip.layers == ["encoders.2.fc1"] and clip.report.format == "kohya CLIP"
    assert relative_error(clip.delta("encoders.2.fc1"), up.double() @ down.double() / 2) < 1e-6
    assert lora.nbytes == clip.nbytes == (12 + 24) * 4


def test_text_encoder_alpha_in_the_header(tmp_path):
    entries = {"text_encoder.lora_alpha": 6, "transformer.lora_alpha": 1}
    text = "text_encoder.text_model.encoder.layers.0.self_attn.k_proj"
    dit = "transformer.transformer_blocks.0.attn.to_out.0"
    down, up = torch.randn(2, 8), torch.randn(8, 2)
    tensors = {
        f"{module}.{name}.weight": value.clone()
        for module in (text, dit)
        for name, value in (("lora_A", down), ("lora_B", up))
    }
    lora = LoRA.load(save(tmp_path, tensors, {"lora_adapter_metadata": json.dumps(entries)}))
    product = up.double() @ down.double()
    assert relative_error(lora.delta(LAYER), product / 2) < 1e-6
    clip = lora.text_encoder("clip")
    assert relative_error(clip.delta("encoders.0.attn.to_k"), product * 3) < 1e-6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({f"{OUT}.lokr_w2": None}, ["lokr_w1", "no partner: lokr_w2 is not"]),
        ({f"{OUT}.lokr_w2_a": torch.ones(2, 1)}, ["twice", "lokr_w2", "lokr_w2_a"]),
        ({f"{OUT}.lokr_w1": torch.ones(3)}, ["lokr_w1", "2-D"]),
        ({f"{OUT}.lokr_w2": torch.ones(4, 3)}, [LAYER, "[8, 12]", "not the proportions of FLUX.1"]),
        (PAIR, ["twice"]),
        ({f"{OUT}.diff": torch.ones(8, 8)}, ["twice", "diff"]),
        ({f"{OUT}.dora_scale": torch.ones(7)}, ["dora_scale", "[7]", "no DoRA magnitude"]),
        ({f"{OUT}.diff_b": torch.ones(7)}, ["diff_b", "[7]", "8 output channels"]),
        ({f"{OUT}.diff_b": torch.ones(())}, ["diff_b", "8 output channels"]),
        ({f"{OUT}.lokr_t1": torch.ones(2, 2, 3, 3)}, ["lokr_t1", "core of a convolution"]),
        ({f"{OUT}.lora_mid.weight": torch.ones(2, 2)}, ["twice", "lora_mid"]),
        ({f"{OUT}.hada_w1_a": torch.ones(8, 2)}, ["twice"]),
        ({"double_blocks.0.img_attn.qkv.diff": torch.ones(8)}, ["no linear weight"]),
        (
            {"double_blocks.0.img_attn.norm.key_norm.scale.diff": torch.ones(2, 2)},
            ["no normalization weight"],
        ),
    ],
)
def test_parts_that_do_not_fit(tmp_path, change, words):
    tensors = {key: value for key, value in (LOKR | change).items() if value is not None}
    with pytest.raises(LoRAFormatError) as caught:
        LoRA.load(save(tmp_path, tensors))
    for word in (*words, "a.safetensors"):
        assert word in str(caught.value)


def test_hadamard_sides_must_agree(tmp_path):
    sides = {f"{OUT}.hada_w{n}_{ab}": torch.ones(8, 2) for n in "12" for ab in "a"}
    sides |= {f"{OUT}.hada_w1_b": torch.ones(2, 8), f"{OUT}.hada_w2_b": torch.ones(2, 4)}
    with pytest.raises(LoRAFormatError, match=r"\[8, 4\], but hada_w1 makes \[8, 8\]"):
        LoRA.load(save(tmp_path, sides))
    sides[f"{OUT}.hada_w2_b"] = torch.ones(3, 8)
    with pytest.raises(LoRAFormatError, match="ranks differ"):
        LoRA.load(save(tmp_path, sides))


def test_alpha_without_a_rank_may_be_anything(tmp_path):
    """Trainers of full-matrix LoKr write ten billions, or nothing sensible, and mean 1."""
    truth = torch.kron(LOKR[f"{OUT}.lokr_w1"], LOKR[f"{OUT}.lokr_w2"])
    for value in (9999999827968.0, 0.0, float("nan")):
        lora = LoRA.load(save(tmp_path, LOKR | {f"{OUT}.alpha": torch.tensor(value)}))
        assert relative_error(lora.delta(LAYER), truth.double()) < 1e-6


def modules(prefix, numbers, width, rank=1):
    """Low-rank factors of one attention output per block."""
    return {
        f"{prefix.format(number)}.{name}.weight": torch.zeros(shape)
        for number in numbers
        for name, shape in (("lora_A", (rank, width)), ("lora_B", (width, rank)))
    }


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        (modules("transformer.transformer_blocks.{}.attn.to_out.0", [0], 1536), {}, "Diffusion 3"),
        (PAIR, {"modelspec.architecture": "chroma/lora"}, "Chroma"),
        (PAIR, {"ss_base_model_version": "hunyuan-video"}, "HunyuanVideo"),
        (
            modules("diffusion_model.double_blocks.{}.img_attn.proj", [7], 3072)
            | {
                "diffusion_model.img_in.lora_A.weight": torch.zeros(1, 128),
                "diffusion_model.img_in.lora_B.weight": torch.zeros(3072, 1),
            },
            {},
            "Control",
        ),
    ],
)
def test_files_for_other_models_with_the_same_names(tmp_path, tensors, metadata, words):
    with pytest.raises(LoRAFormatError, match=f"{words}.*not for FLUX.1"):
        LoRA.load(save(tmp_path, tensors, metadata or None))


@pytest.mark.parametrize("named", ["flux-1-dev/lora", "flux1", "flux-1-schnell", "mine"])
def test_headers_that_name_flux_1_or_nothing_known(tmp_path, named):
    path = save(tmp_path, PAIR, {"modelspec.architecture": named})
    assert LoRA.load(path).layers == [LAYER]
    path = save(tmp_path, modules("transformer.transformer_blocks.{}.attn.to_out.0", [18], 64))
    assert LoRA.load(path).family == "flux1"
