"""A FLUX.1 in files as published, loaded as the real ones are; only the sizes differ."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from autolora.config import CheckpointSettings, MemorySettings, PipelineConfig
from autolora.errors import ConfigError
from autolora.families.flux1.layers import LAYERS
from autolora.families.load import load_pipeline
from autolora.fusion import attached
from autolora.lora import LoRA
from tests.conftest import random_factors
from tests.families.flux1 import real_format

SIDE = 32


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> real_format.RealFormat:
    return real_format.write(tmp_path_factory.mktemp("flux1"))


@pytest.fixture(scope="module")
def config(files: real_format.RealFormat) -> PipelineConfig:
    return PipelineConfig("small", kind="flux1", weights=files.bfl, storage="float32", device="cpu")


@pytest.fixture(scope="module")
def pipe(config: PipelineConfig):
    return load_pipeline(config)


def draw(pipe, prompt="a red rocket", **options) -> np.ndarray:
    image = pipe(
        prompt,
        height=SIDE,
        width=SIDE,
        seed=3,
        num_inference_steps=2,
        t5_sequence_length=24,
        progress_bar_cmd=lambda steps: steps,
        **options,
    )
    return np.asarray(image, dtype=float)


def rms(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean((a - b) ** 2)))


@pytest.fixture(scope="module")
def exact(pipe) -> np.ndarray:
    picture = draw(pipe)
    assert picture.std() > 10, "a flat picture would prove nothing"
    return picture


def test_both_layouts_give_the_same_picture(config, files, exact) -> None:
    other = load_pipeline(replace(config, weights=files.diffusers))
    assert np.array_equal(draw(other), exact)


def test_a_file_with_all_parts_is_read_for_its_transformer(config, files, exact, tmp_path) -> None:
    tensors = {f"model.diffusion_model.{k}": v for k, v in load_file(files.transformer).items()}
    tensors["vae.decoder.conv_in.weight"] = torch.zeros(3)
    tensors["text_encoders.clip_l.transformer.text_model.x"] = torch.zeros(3)
    path = tmp_path / "everything.safetensors"
    save_file(tensors, str(path))
    checkpoint = CheckpointSettings(base=str(files.bfl))
    assert np.array_equal(
        draw(load_pipeline(replace(config, weights=path, checkpoint=checkpoint))), exact
    )


def test_every_layer_has_its_canonical_name_and_sizes_come_from_the_file(pipe) -> None:
    linears = {
        name: (layer.out_features, layer.in_features)
        for name, layer in pipe.dit.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }
    assert LAYERS.shapes(pipe.dit) == linears == pipe.dit.sizes.linear_shapes()
    assert sum(p.numel() for p in pipe.dit.parameters()) == pipe.dit.sizes.parameters
    assert (pipe.dit.sizes.heads, pipe.dit.sizes.rope_axes) == (2, (4, 14, 14))


def test_text_encoders_are_those_of_transformers(pipe, files) -> None:
    from transformers import CLIPTextModel, T5EncoderModel

    texts = ["a red rocket on the background", "neon"]
    folder = files.diffusers
    clip = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()
    t5 = T5EncoderModel.from_pretrained(folder / "text_encoder_2", dtype=torch.float32).eval()
    ids = pipe.tokenizer_1(
        texts, padding="max_length", max_length=77, return_tensors="pt"
    ).input_ids
    assert ids.max() == clip.config.vocab_size - 1 and len(set(ids[0].tolist())) > 4
    with torch.no_grad():
        pooled = pipe.text_encoder_1(ids)[0]
        torch.testing.assert_close(pooled, clip(ids).pooler_output, rtol=1e-4, atol=1e-5)
        ids = pipe.tokenizer_2(texts, padding="longest", return_tensors="pt").input_ids
        expected = t5(ids).last_hidden_state
        torch.testing.assert_close(pipe.text_encoder_2(ids), expected, rtol=1e-4, atol=1e-5)


def test_transformer_and_autoencoder_are_those_of_diffusers(pipe, files) -> None:
    diffusers = pytest.importorskip("diffusers")
    sizes = pipe.dit.sizes
    dit = diffusers.FluxTransformer2DModel(
        num_layers=sizes.double_blocks,
        num_single_layers=sizes.single_blocks,
        attention_head_dim=sizes.head_dim,
        num_attention_heads=sizes.heads,
        joint_attention_dim=sizes.text_dim,
        pooled_projection_dim=sizes.pooled_dim,
        guidance_embeds=True,
        axes_dims_rope=sizes.rope_axes,
    )
    shards = sorted((files.diffusers / "transformer").glob("*.safetensors"))
    weights = {k: v.float() for shard in shards for k, v in load_file(shard).items()}
    dit.load_state_dict(weights)
    channels = real_format.CHANNELS
    vae = diffusers.AutoencoderKL(
        block_out_channels=channels,
        down_block_types=["DownEncoderBlock2D"] * len(channels),
        up_block_types=["UpDecoderBlock2D"] * len(channels),
        layers_per_block=2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    vae.load_state_dict(load_file(next((files.diffusers / "vae").glob("*.safetensors"))))
    compare_transformers(pipe, dit.eval())
    compare_autoencoders(pipe, vae.eval())


def compare_transformers(pipe, dit) -> None:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 16, 8, 12, generator=generator)
    states = torch.randn(1, 5, pipe.dit.sizes.text_dim, generator=generator)
    pooled = torch.randn(1, pipe.dit.sizes.pooled_dim, generator=generator)
    ids = torch.zeros(4, 6, 3)
    ids[..., 1], ids[..., 2] = torch.arange(4)[:, None], torch.arange(6)[None]
    with torch.no_grad():
        ours = pipe.model_fn(
            pipe.dit,
            latents=latents,
            timestep=torch.tensor([700.0]),
            guidance=torch.tensor([3.5]),
            prompt_emb=states,
            pooled_prompt_emb=pooled,
            text_ids=torch.zeros(1, 5, 3),
        )
        theirs = dit(
            hidden_states=pipe.dit.patchify(latents),
            encoder_hidden_states=states,
            pooled_projections=pooled,
            timestep=torch.tensor([0.7]),
            guidance=torch.tensor([3.5]),
            img_ids=ids.view(-1, 3),
            txt_ids=torch.zeros(5, 3),
        ).sample
    torch.testing.assert_close(ours, pipe.dit.unpatchify(theirs, 8, 12), rtol=1e-3, atol=1e-3)


def compare_autoencoders(pipe, vae) -> None:
    latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(2))
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        theirs = vae.decode(latents / 0.3611 + 0.1159).sample
        torch.testing.assert_close(pipe.vae_decoder(latents), theirs, rtol=1e-3, atol=1e-3)
        encoded = (vae.encode(picture).latent_dist.mean - 0.1159) * 0.3611
        torch.testing.assert_close(pipe.vae_encoder(picture), encoded, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({"storage": "float8", "compute": "float32"}, 30),
        (
            {
                "storage": "float8",
                "compute": "float32",
                "memory": MemorySettings(text_storage="float8"),
            },
            40,
        ),
        ({"storage": "bfloat16"}, 30),
    ],
    ids=["float8", "float8 text encoders too", "bfloat16"],
)
def test_storages_draw_nearly_the_same(config, exact, changes, limit: float) -> None:
    pipe = load_pipeline(replace(config, **changes))
    linears = [m for m in pipe.dit.modules() if isinstance(m, torch.nn.Linear)]
    expected = torch.float8_e4m3fn if changes["storage"] == "float8" else torch.bfloat16
    assert linears and all(m.weight.dtype == expected for m in linears)
    norms = [m.weight.dtype for n, m in pipe.dit.named_modules() if "norm_q" in n]
    assert set(norms) == {torch.bfloat16 if expected == torch.bfloat16 else torch.float32}
    assert 0 < rms(draw(pipe), exact) < limit


def test_float8_is_rounded_as_torch_rounds(config, pipe) -> None:
    stored = load_pipeline(replace(config, storage="float8"))
    name = "single_blocks.1.to_qkv_mlp"
    weight = pipe.dit.get_submodule(name).weight
    rounded = weight.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(stored.dit.get_submodule(name).weight.float(), rounded.float())


@pytest.mark.parametrize("storage", ["nf4", "torchao_float8"])
def test_packed_storages(config, exact, storage: str) -> None:
    pytest.importorskip({"nf4": "bitsandbytes"}.get(storage, "torchao"))
    pipe = load_pipeline(replace(config, storage=storage))
    assert LAYERS.shapes(pipe.dit) == pipe.dit.sizes.linear_shapes()
    inside = pipe.dit.blocks[0].attn.a_to_qkv.weight
    assert type(inside) not in (torch.Tensor, torch.nn.Parameter), "it is a library's own kind"
    assert pipe.dit.x_embedder.weight.dtype == torch.float32
    picture = draw(pipe)
    assert 0 < rms(picture, exact) < 60
    factors = random_factors(LAYERS.shapes(pipe.dit), 1, scale=0.1)
    with attached(pipe.dit, [(LoRA.from_factors("a", factors), 1.0)], "sum"):
        assert rms(draw(pipe), picture) > 1
    assert np.array_equal(draw(pipe), picture), "the packed weights are as they were"


@pytest.mark.parametrize("offload", ["parts", "layers"])
def test_offloaded_models_draw_the_same_picture(
    config, pipe, exact, offload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU nothing is to be gained, but every step that a GPU takes is gone through."""
    from autolora.families import loading

    settled = MemorySettings(offload=offload)
    monkeypatch.setattr(loading, "plan_memory", lambda *a: (settled, []))
    monkeypatch.setattr(loading, "MANAGED", ("cpu",))
    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)
    plain, pipe = pipe, load_pipeline(config)
    assert pipe.vram_management_enabled
    moved = []
    if offload == "parts":
        onload = pipe.dit.onload
        pipe.dit.onload = lambda: moved.append("dit") or onload()
    assert np.array_equal(draw(pipe), exact)
    assert moved == (["dit"] if offload == "parts" else [])
    factors = random_factors(LAYERS.shapes(pipe.dit), 1, scale=0.1)
    with attached(pipe.dit, [(LoRA.from_factors("a", factors), 1.0)], "sum"):
        with_adapter = draw(pipe)
    with attached(plain.dit, [(LoRA.from_factors("a", factors), 1.0)], "sum"):
        assert np.array_equal(with_adapter, draw(plain))
    assert rms(with_adapter, exact) > 1
    if offload == "layers":
        states = {m.state for m in pipe.dit.modules() if hasattr(m, "offload_device")}
        assert states == {0}, "at the end every layer is back where it waits"


@pytest.mark.gpu
@pytest.mark.parametrize("offload", ["none", "parts", "layers"])
def test_a_gpu_draws_it_with_every_offload(config, exact, offload: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    memory = MemorySettings(offload=offload)
    changed = replace(config, device="cuda", storage="float8", memory=memory)
    pipe = load_pipeline(changed)
    picture = draw(pipe)
    assert rms(picture, exact) < 40
    waiting = {p.device.type for p in pipe.dit.parameters()}
    assert waiting == ({"cuda"} if offload == "none" else {"cpu"})


def test_guidance_is_an_input_of_dev_and_two_passes_of_schnell(config, pipe, tmp_path) -> None:
    dev = pipe
    assert (dev.variant, dev.text_length) == ("dev", 512)
    assert not np.array_equal(draw(dev, embedded_guidance=1.0), draw(dev, embedded_guidance=8.0))
    schnell_files = real_format.write(tmp_path / "schnell", guidance=False)
    schnell = load_pipeline(replace(config, weights=schnell_files.bfl))
    assert (schnell.variant, schnell.text_length) == ("schnell", 256)
    one = draw(schnell, embedded_guidance=1.0)
    assert np.array_equal(one, draw(schnell, embedded_guidance=8.0))
    assert not np.array_equal(one, draw(schnell, cfg_scale=3.0, negative_prompt="blue"))


def test_true_size_flux_has_the_published_sizes() -> None:
    from diffsynth.core.vram.initialization import skip_model_initialization
    from diffsynth.models.flux_dit import FluxDiT
    from diffsynth.models.flux_text_encoder_clip import FluxTextEncoderClip
    from diffsynth.models.flux_text_encoder_t5 import FluxTextEncoderT5
    from diffsynth.models.flux_vae import FluxVAEDecoder, FluxVAEEncoder

    from autolora.families.flux1.loading import build_transformer
    from autolora.families.flux1.sizes import FLUX1_DEV, FluxSizes

    def parameters(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    with skip_model_initialization():
        published = FluxDiT()
        clip, t5 = FluxTextEncoderClip(), FluxTextEncoderT5()
        vae = parameters(FluxVAEDecoder()) + parameters(FluxVAEEncoder())
    shapes = {name: tuple(value.shape) for name, value in published.state_dict().items()}
    with skip_model_initialization():
        ours = build_transformer(shapes)
    assert {name: tuple(value.shape) for name, value in ours.state_dict().items()} == shapes
    assert FluxSizes.from_shapes(shapes) == FLUX1_DEV.denoiser
    assert parameters(published) == FLUX1_DEV.denoiser.parameters
    assert LAYERS.shapes(published) == FLUX1_DEV.denoiser.linear_shapes()
    assert ours.pos_embedder.axes_dim == published.pos_embedder.axes_dim
    assert parameters(clip) == FLUX1_DEV.text_encoder
    # DiffSynth's T5 holds its table of words twice, ours once.
    assert parameters(t5) - t5.shared.weight.numel() == FLUX1_DEV.text_encoder_2
    assert vae == FLUX1_DEV.vae


def test_clip_alone_reads_texts_for_the_search(config, files, pipe) -> None:
    from autolora.families.flux1.loading import load_clip

    tokenizer, model = load_clip(config)
    ids = tokenizer("a neon rocket", padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        alone, inside = model(ids.input_ids)[0], pipe.text_encoder_1(ids.input_ids)[0]
    assert torch.equal(alone, inside)


def broken(files: real_format.RealFormat, tmp_path: Path, change) -> Path:
    path = tmp_path / "flux1-broken.safetensors"
    tensors = load_file(files.transformer)
    change(tensors)
    save_file(tensors, str(path))
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("double_blocks.1.img_attn.qkv.bias"), r"lacks 1 of .*attn.a_to_qkv.bias"),
        (lambda t: t.pop("img_in.weight"), r"lacks what tells"),
        (lambda t: t.update({"refiner.0.weight": torch.zeros(1)}), r"1 tensors .* refiner.0"),
        (
            lambda t: t.update({"img_in.weight": torch.zeros(64, 128)}),
            "128 channels per patch, not 64: it is a FLUX.1 Control",
        ),
        (
            lambda t: t.update({"single_blocks.0.linear2.weight": torch.zeros(64, 64)}),
            r"single_blocks.0.proj_out.weight is \[64, 64\], not \[64, 320\]",
        ),
        (lambda t: t.update({"txt_in.weight": torch.zeros(64, 48)}), r"reads 48 channels from T5"),
    ],
)
def test_damaged_transformers_are_refused(config, files, tmp_path, change, words: str) -> None:
    checkpoint = CheckpointSettings(base=str(files.bfl))
    wrong = replace(config, weights=broken(files, tmp_path, change), checkpoint=checkpoint)
    with pytest.raises(ConfigError, match=words) as caught:
        load_pipeline(wrong)
    assert "\n" not in str(caught.value)


def test_a_shard_that_is_missing_is_named(config, files, tmp_path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(files.diffusers, copy)
    (copy / "transformer" / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"transformer .*00002-of-00003"):
        load_pipeline(replace(config, weights=copy))
    index = copy / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": 3}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"index of shards .* cannot be read"):
        load_pipeline(replace(config, weights=copy))


def test_text_encoders_and_tokenizers_that_are_none_are_refused(config, files, tmp_path) -> None:
    base = CheckpointSettings(base=str(files.bfl))
    t5 = str(files.bfl / "text_encoder_2")
    bad = tmp_path / "tokenizer"
    bad.mkdir()
    (bad / "tokenizer.json").write_text("{", encoding="utf-8")
    for part, value, words in (
        ("text_encoder", t5, "not CLIP"),
        ("text_encoder_2", str(files.bfl / "text_encoder"), "not a T5"),
        ("vae", t5, "not FLUX.1's autoencoder"),
        ("tokenizer_2", str(bad), r"tokenizer in .* cannot be read"),
    ):
        wrong = replace(config, weights=None, checkpoint=replace(base, **{part: value}))
        with pytest.raises(ConfigError, match=words):
            load_pipeline(wrong)
