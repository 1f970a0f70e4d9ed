"""Every format, read back and compared with the dense truth in float64."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from autolora.families.detect import layer_table
from autolora.lora import LoRA
from autolora.lora.formats import DENOISER, FORMATS, match_keys
from autolora.lora.refusals import NO_FACTORS
from tests.lora.lora_files import SPELLINGS, assert_same_deltas, canonical_shapes, make_file


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mixed_ranks_and_alphas_are_exact(tmp_path, spelling, dtype):
    made = make_file(spelling, ranks=(1, 4, 16), alphas=(8.0, None, 1.0, 0.5, -2.0), dtype=dtype)
    lora = LoRA.load(made.save(tmp_path / "mixed.safetensors"))
    assert_same_deltas(lora, made.truth)
    if spelling != "xlabs":
        assert lora.layers == sorted(canonical_shapes())
    assert lora.report.format == spelling
    assert set(lora.report.matched) == set(made.tensors)
    assert lora.report.dropped == {}
    assert lora.report.ranks == (1, 16)
    assert lora.report.scales == (-2.0, 8.0)
    assert lora.name == "mixed"


@pytest.mark.parametrize(
    ("spelling", "prefix", "adapter"),
    [
        ("diffusers", "", ""),
        ("diffusers", "", "default"),
        ("diffusers", "transformer.", "default_0"),
        ("diffusers", "base_model.model.", "default"),
        ("diffusers", "base_model.model.transformer.", ""),
        ("diffsynth", "", "default"),
        ("diffsynth", "pipe.dit.", "default"),
    ],
)
def test_prefixes_and_named_adapters(tmp_path, spelling, prefix, adapter):
    made = make_file(spelling, prefix=prefix, adapter=adapter)
    lora = LoRA.load(made.save(tmp_path / "a.safetensors"))
    assert_same_deltas(lora, made.truth)
    assert set(lora.report.matched) == set(made.tensors)


def test_old_diffusers_spelling_of_factors(tmp_path):
    made = make_file("diffusers")
    made.tensors = {
        key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): value
        for key, value in made.tensors.items()
    }
    assert_same_deltas(LoRA.load(made.save(tmp_path / "a.safetensors")), made.truth)


@pytest.mark.parametrize("present", ["q", "k", "v", "qk", "qv", "kv", "mlp", "qmlp", "kvmlp"])
def test_any_subset_of_split_projections(tmp_path, present):
    ends = {
        "q": (".to_q", ".add_q_proj"),
        "k": (".to_k", ".add_k_proj"),
        "v": (".to_v", ".add_v_proj"),
    }
    wanted = [end for letter, pair in ends.items() if letter in present for end in pair]
    if "mlp" in present:
        wanted.append("proj_mlp")
    made = make_file(
        "diffusers",
        keep=lambda path: path.endswith(tuple(wanted)),
        ranks=(2, 3, 5),
        alphas=(1.0, 7.0),
    )
    lora = LoRA.load(made.save(tmp_path / "subset.safetensors"))
    assert_same_deltas(lora, made.truth)


def test_layers_alternate_between_split_and_missing_without_padding_the_rank(tmp_path):
    made = make_file("diffusers", keep=lambda path: "to_q" in path or "to_k" in path, ranks=(2, 3))
    lora = LoRA.load(made.save(tmp_path / "a.safetensors"))
    for layer in lora.layers:
        assert lora.rank(layer) == 5


def test_split_layers_that_share_one_a_keep_its_rank(tmp_path):
    made = make_file("diffusers", ranks=(4,))
    for key in list(made.tensors):
        if "to_k.lora_A" in key or "to_v.lora_A" in key:
            made.tensors[key] = made.tensors[
                key.replace("to_k", "to_q").replace("to_v", "to_q")
            ].clone()
    lora = LoRA.load(made.save(tmp_path / "a.safetensors"))
    layer = "blocks.0.attn.a_to_qkv"
    assert lora.rank(layer) == 4
    A, B = lora.factors(layer)
    torch.testing.assert_close(B @ A, lora.delta(layer), rtol=1e-5, atol=1e-5)


def test_alpha_of_a_text_encoder_that_comes_first_is_not_taken(tmp_path):
    made = make_file("kohya", ranks=(8,), alphas=(8.0,))
    text = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    stray = "lora_te3_encoder_block_0_layer_0_SelfAttention_k.alpha"
    made.tensors = {
        f"{text}.alpha": torch.tensor(1.0),
        f"{text}.lora_down.weight": torch.randn(8, 4),
        f"{text}.lora_up.weight": torch.randn(4, 8),
        stray: torch.tensor(0.1),
        **made.tensors,
    }
    lora = LoRA.load(made.save(tmp_path / "a.safetensors"))
    assert_same_deltas(lora, made.truth)
    assert lora.report.dropped == {stray: NO_FACTORS}
    assert lora.report.matched[f"{text}.alpha"] == "text_encoder_1.encoders.0.fc1"


def _peft_truth(made, entries):
    """Scale each module of a rank-dealt file by PEFT's own pattern rule."""
    get_pattern_key = pytest.importorskip("peft.utils.other").get_pattern_key

    scales = {}
    for key in made.tensors:
        if ".lora_A." in key:
            module = key.removeprefix("transformer.").split(".lora_A.")[0]
            pattern = get_pattern_key(entries["transformer.alpha_pattern"].keys(), module)
            alpha = entries["transformer.alpha_pattern"].get(
                pattern, entries["transformer.lora_alpha"]
            )
            rank = made.tensors[key].shape[0]
            root = entries.get("transformer.use_rslora", False)
            scales[module] = alpha / (rank**0.5 if root else rank)
    return scales


@pytest.mark.parametrize("use_rslora", [False, True])
def test_alpha_in_the_header(tmp_path, use_rslora):
    entries = {
        "transformer.r": 4,
        "transformer.lora_alpha": 2,
        "transformer.rank_pattern": {"attn.to_k": 8},
        "transformer.alpha_pattern": {"attn.to_k": 1, r"^x_embedder": 16, r"ff\.net.*": 3},
        "transformer.use_rslora": use_rslora,
    }
    base = make_file("diffusers", ranks=(4, 8, 2))
    scales = _peft_truth(base, entries)
    assert len(set(scales.values())) >= 5
    stored = dict(base.tensors)
    for module, scale in scales.items():
        stored[f"transformer.{module}.lora_B.weight"] = (
            base.tensors[f"transformer.{module}.lora_B.weight"] * scale
        )
    save_file(
        base.tensors,
        tmp_path / "header.safetensors",
        metadata={"lora_adapter_metadata": json.dumps(entries)},
    )
    save_file(stored, tmp_path / "folded.safetensors")
    lora = LoRA.load(tmp_path / "header.safetensors")
    folded = LoRA.load(tmp_path / "folded.safetensors")
    truth = {layer: folded.delta(layer).double() for layer in folded.layers}
    assert_same_deltas(lora, truth, tolerance=1e-6)


def test_alpha_tensor_wins_over_the_header(tmp_path):
    made = make_file("diffusers", alphas=(3.0,))
    header = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 100})}
    lora = LoRA.load(made.save(tmp_path / "a.safetensors", metadata=header))
    assert_same_deltas(lora, made.truth)


def test_alpha_in_adapter_config_beside_a_peft_file(tmp_path):
    made = make_file("diffusers", prefix="base_model.model.", ranks=(4,))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    lora = LoRA.load(made.save(tmp_path / "adapter_model.safetensors"))
    assert_same_deltas(lora, {layer: 2 * dense for layer, dense in made.truth.items()})
    # Any other file in that folder is not described by it.
    assert_same_deltas(LoRA.load(made.save(tmp_path / "b.safetensors")), made.truth)


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("lora_unet_double_blocks_1_img_attn_qkv.dora_scale", "DoRA magnitude of a layer"),
        ("transformer.proj_out.lora_magnitude_vector", "DoRA magnitude of a layer"),
        ("diffusion_model.double_blocks.1.img_attn.who.magnitude", "DoRA magnitude: unknown"),
        ("lora_unet_double_blocks_0_img_attn_who.lokr_w1", "LoKr"),
        ("lora_unet_double_blocks_0_img_attn_who.hada_w1_a", "LoHa"),
        ("diffusion_model.double_blocks.0.img_attn.who.diff", "full weight"),
        ("diffusion_model.double_blocks.0.img_attn.norm.query_norm.diff_b", "FLUX.1's have none"),
        ("diffusion_model.double_blocks.1.img_attn.qkv.lora_B.bias", "bias of a layer"),
        ("text_encoder.text_model.final_layer_norm.lora_A.weight", "text encoder"),
        ("text_encoders.t5xxl.transformer.encoder.block.0.x.lora_A.weight", "text encoder"),
        ("lora_te2_encoder_block_0_layer_0_SelfAttention_k.alpha", "no LoRA factors"),
        ("lora_unet_double_blocks_1_img_attn_qkv.alpha", "no LoRA factors"),
        ("lora_unet_double_blocks_0_img_attn_who.lora_down.weight", "unknown"),
        ("transformer_blocks.{i}.attn.to_q.lora_A.weight", "unknown"),
        ("transformer_blocks.007.attn.to_q.lora_A.weight", "unknown"),
        ("transformer_blocks.1234567.attn.to_q.lora_A.weight", "unknown"),
        ("transformer_blocks.-1.attn.to_q.lora_A.weight", "unknown"),
        ("x" * 5000 + ".lora_A.weight", "unknown"),
        ("diffusion_model.double_blocks.0.img_attn.norm.query_norm.lora_A.weight", "unknown"),
        ("epoch", "unknown"),
        ("a\nb\u202e", "unknown"),
    ],
)
def test_unused_keys_are_reported(tmp_path, key, reason):
    made = make_file("kohya", keep=lambda path: path.startswith("double_blocks.0."))
    made.tensors[key] = torch.ones(2, 2)
    if key.endswith(".alpha"):
        made.tensors[key] = torch.tensor(1.0)
    lora = LoRA.load(made.save(tmp_path / "a.safetensors"))
    assert set(lora.report.dropped) == {key}
    assert reason in lora.report.dropped[key]
    assert_same_deltas(lora, made.truth)


def test_a_peft_header_left_in_a_kohya_file_sets_no_strength(tmp_path):
    """Converters copy the header of a file whose alpha they have folded into its factors."""
    made = make_file("kohya", keep=lambda path: path.startswith("double_blocks.0."))
    entries = {"transformer.r": 4, "transformer.lora_alpha": 32}
    header = {"lora_adapter_metadata": json.dumps(entries)}
    lora = LoRA.load(made.save(tmp_path / "a.safetensors", header))
    assert lora.report.scales == (1.0, 1.0)
    assert_same_deltas(lora, made.truth)


@pytest.mark.parametrize(
    ("pattern", "scale"),
    [("add_q_proj", 4.0), ("attn.add_q_proj", 4.0), ("q_proj", 2.0), ("transformer_blocks", 2.0)],
)
def test_patterns_of_alpha_match_whole_names(tmp_path, pattern, scale):
    """PEFT's rule: the module's path, or its end after a dot."""
    made = make_file("diffusers", keep=lambda path: path.endswith("_blocks.0.attn.add_q_proj"))
    entries = {"transformer.lora_alpha": 8, "transformer.alpha_pattern": {pattern: 16}}
    path = made.save(tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(entries)})
    assert LoRA.load(path).report.scales == (scale, scale)


def test_a_bias_beside_factors_has_no_alpha(tmp_path):
    """PEFT's bias is part of B and scaled with it; the difference of a bias is what it is."""
    made = make_file("kohya", alphas=(2.0,), keep=lambda path: path.endswith("0.img_attn.proj"))
    key, width = "lora_unet_double_blocks_0_img_attn_proj", 8
    made.tensors[f"{key}.diff_b"] = torch.arange(width).float()
    made.tensors[f"{key}.lora_up.bias"] = torch.ones(width)
    lora = LoRA.load(made.save(tmp_path / "a.safetensors"))
    assert lora.report.scales == (0.5, 0.5)
    assert torch.equal(lora.bias("blocks.0.attn.a_to_out"), torch.arange(width) + 0.5)


@pytest.mark.parametrize(("extra", "scale"), [({}, 8.0), ({"alpha": torch.tensor(4.0)}, 1.0)])
def test_alpha_of_a_kronecker_product_of_whole_matrices(tmp_path, extra, scale):
    """PEFT's configuration counts, but LyCORIS writes an alpha tensor that does not."""
    key = "transformer.transformer_blocks.0.attn.to_out.0"
    config = {"peft_type": "LOKR", "r": 2, "alpha": 16}
    header = {f"transformer.{name}": value for name, value in config.items()}
    tensors = {f"{key}.{name}": tensor for name, tensor in extra.items()}
    tensors |= {f"{key}.lokr_w1": torch.ones(2, 2), f"{key}.lokr_w2": torch.ones(4, 4)}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(header)})
    lora = LoRA.load(tmp_path / "a.safetensors")
    assert torch.equal(lora.delta("blocks.0.attn.a_to_out"), torch.full((8, 8), scale))


def test_rank_of_a_kronecker_product_is_that_of_its_second_side(tmp_path):
    """As LyCORIS counts it, should the sides ever have different ones."""
    key, path = "lora_unet_double_blocks_0_img_attn_proj", tmp_path / "a.safetensors"
    random = torch.Generator().manual_seed(0)
    shapes = {"w1_a": (4, 2), "w1_b": (2, 4), "w2_a": (2, 5), "w2_b": (5, 2)}
    sides = {name: torch.randn(*shape, generator=random) for name, shape in shapes.items()}
    tensors = {f"{key}.lokr_{name}": tensor for name, tensor in sides.items()}
    save_file(tensors | {f"{key}.alpha": torch.tensor(10.0)}, path)
    w1, w2 = (sides[f"w{n}_a"].double() @ sides[f"w{n}_b"].double() for n in (1, 2))
    lora = LoRA.load(path)
    torch.testing.assert_close(
        lora.delta("blocks.0.attn.a_to_out").double(), 2 * torch.kron(w1, w2), rtol=1e-6, atol=1e-6
    )
    assert lora.report.ranks == (5, 5) and lora.report.scales == (2.0, 2.0)


def test_sizes_of_small_models_say_nothing_about_flux(tmp_path):
    """The tiny model may have more blocks than FLUX.1, and an input of any width."""
    tensors = {}
    for number, (path, inner) in enumerate(
        (("double_blocks.40.img_attn.proj", 8), ("img_in", 128), ("single_blocks.40.linear2", 40))
    ):
        random = torch.Generator().manual_seed(number)
        tensors[f"diffusion_model.{path}.lora_A.weight"] = torch.randn(1, inner, generator=random)
        tensors[f"diffusion_model.{path}.lora_B.weight"] = torch.randn(8, 1, generator=random)
    save_file(tensors, tmp_path / "a.safetensors")
    assert len(LoRA.load(tmp_path / "a.safetensors").layers) == 3
    # Without a block, only the layers outside count.
    outer = {key: tensor for key, tensor in tensors.items() if "img_in" in key}
    save_file(outer, tmp_path / "b.safetensors")
    assert LoRA.load(tmp_path / "b.safetensors").report.total == 10


def test_report_is_plain_data(tmp_path):
    made = make_file("kohya", alphas=(2.0,), ranks=(4,))
    made.tensors["lora_te1_x.alpha"] = torch.tensor(1.0)
    report = LoRA.load(made.save(tmp_path / "a.safetensors")).report
    truth = sum(float(dense.square().sum()) for dense in made.truth.values()) ** 0.5
    assert report.norm == pytest.approx(truth, rel=1e-5)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["format"] == "kohya"
    assert data["matched_count"] == len(made.tensors) - 1
    assert data["dropped_count"] == 1
    assert data["scales"] == [0.5, 0.5]
    assert data["norm"] == report.norm
    assert data["layers"] == len(canonical_shapes())
    assert data["total"] == 12 * 10 + 12 * 3 + 10  # twelve blocks of each kind, numbered to 11
    assert data["algorithms"] == {"LoRA": data["layers"]}
    assert list(data["dropped_reasons"].values()) == [1]


def test_format_names_are_unique_and_paths_unambiguous():
    table = layer_table("flux1")
    assert len({entry.name for entry in FORMATS}) == len(FORMATS)
    for entry in FORMATS:
        for layer in canonical_shapes():
            for path, spelling, _ in entry.module_paths(table, layer):
                key = f"{path}.{entry.factor_names[0]}.weight"
                match = match_keys([key], table)[key]
                (share,) = match.module.shares
                assert share.name(match.module.block) == layer
                assert share.slices == spelling.slices
                assert not share.row.is_norm and match.part == DENOISER


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    spelling=st.sampled_from(sorted(SPELLINGS)),
    order=st.randoms(use_true_random=False),
    extra=st.lists(st.text(max_size=20), max_size=4),
    rank=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_order_extra_keys_and_gauge_do_not_matter(tmp_path, spelling, order, extra, rank, seed):
    made = make_file(
        spelling,
        ranks=(rank,),
        alphas=(1.5, None),
        keep=lambda path: "0" in path,
        dtype=torch.float64,
        seed=seed,
    )
    _, _, _, down, up, _ = SPELLINGS[spelling]
    random = torch.Generator().manual_seed(seed)
    for key in [key for key in made.tensors if key.endswith(down)]:
        partner = key.removesuffix(down) + up
        # Orthogonal times a spread of scales: well conditioned, so that the truth stays the truth.
        gauge = torch.linalg.qr(
            torch.randn(rank, rank, generator=random, dtype=torch.float64)
        ).Q * torch.linspace(0.5, 2, rank, dtype=torch.float64)
        made.tensors[key] = torch.linalg.inv(gauge) @ made.tensors[key]
        made.tensors[partner] = made.tensors[partner] @ gauge
    names = [f"note {text}" for text in extra if text.isprintable()]
    made.tensors |= {name: torch.zeros(1) for name in names}
    keys = list(made.tensors)
    order.shuffle(keys)
    made.tensors = {key: made.tensors[key] for key in keys}
    lora = LoRA.load(made.save(tmp_path / "a.safetensors"))
    assert_same_deltas(lora, made.truth)
    assert set(lora.report.dropped) == set(names)
