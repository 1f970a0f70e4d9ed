"""What only happens on a card, on one that is pretended: where weights go, and what they take."""

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from autolora.config import MemorySettings, PipelineConfig
from autolora.doctor import examine
from autolora.families.flux1.sizes import FLUX1_DEV
from autolora.families.load import load_pipeline
from autolora.generate import sample
from autolora.request import make_request
from autolora.runtime.memory import GIB, estimate, plan_memory
from tests.families.flux1 import pretended, real_format

OFFLOADS = ("none", "parts", "layers")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PipelineConfig:
    files = real_format.write(tmp_path_factory.mktemp("flux1"))
    return PipelineConfig("small", kind="flux1", weights=files.bfl, width=64, height=64, steps=2)


def draw(pipe, config: PipelineConfig, count: pretended.Count, watch=None) -> dict[str, int]:
    """Go through a whole picture; the most that each stage had on the card, in bytes."""
    peaks = {}
    request = make_request(config, "a red rocket")
    pipe.scheduler = SimpleNamespace(  # the real one looks at numbers, which nothing here has
        set_timesteps=lambda *arguments, **options: None,
        timesteps=torch.tensor([999.0]),
        sigmas=[1.0],
        step=lambda velocity, time, latents, **options: latents - 0.5 * velocity,
    )
    conditions = sample.prepare(pipe, request, "a red rocket")
    peaks["read"] = count.peak["cuda"]
    count.restart()
    latents, _ = sample.denoise_latents(conditions, [0], watch)
    peaks["steps"] = count.peak["cuda"]
    with sample._onloaded(pipe, ("vae_decoder",)), torch.no_grad():
        count.restart()
        picture = pipe.vae_decoder(latents, device=pipe.device, tiled=pipe.tiled)
        peaks["decode"] = count.peak["cuda"]
    pipe.load_models_to_device([])
    assert picture.shape == (1, 3, config.height, config.width) and picture.is_cuda
    return peaks


def places(module: torch.nn.Module) -> set[str]:
    return {parameter.device.type for parameter in module.parameters()}


def test_idle_parts_wait_in_the_machines_memory(config, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = MemorySettings("parts", text_storage="float8")
    config = replace(config, device="cuda", memory=memory)
    with pretended.card(monkeypatch, 24 * GIB) as count:
        pipe = load_pipeline(config)
        parts = [pipe.dit, pipe.text_encoder_1, pipe.text_encoder_2, pipe.vae_decoder]
        assert [places(part) for part in parts] == [{"cpu"}] * 4
        assert pipe.torch_dtype == torch.bfloat16
        seen = []
        watch = sample.Watch(progress=lambda *done: seen.append([places(p) for p in parts]))
        draw(pipe, config, count, watch)
        assert seen == [[{"cuda"}, {"cpu"}, {"cpu"}, {"cpu"}]] * 2
        assert [places(part) for part in parts] == [{"cpu"}] * 4, "all are back where they wait"


def test_layers_fill_the_card_up_to_the_limit(config, monkeypatch: pytest.MonkeyPatch) -> None:
    """By DiffSynth's rule, layers stay on the card while less than the limit is used."""
    memory = MemorySettings("layers", vram_limit=1.0)
    config = replace(config, device="cuda", memory=memory)
    with pretended.card(monkeypatch, 24 * GIB) as count:
        pipe = load_pipeline(config)
        staying = []
        for used in (3.0, 0.5):  # GiB
            free = int((24 - used) * GIB)
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda d=None, f=free: (f, 24 * GIB))
            watch = sample.Watch(preview=lambda *shown: staying.append(places(pipe.dit)))
            monkeypatch.setattr(sample, "decode", lambda *a: None)
            draw(pipe, config, count, watch)
            assert places(pipe.dit) == {"cpu"}
    assert staying == [{"cpu"}, {"cuda"}]


@pytest.mark.parametrize(
    ("total", "offload"), [(48, "none"), (16, "parts"), (12, "layers"), (8, "layers")]
)
def test_doctor_tells_what_loading_does(
    total: int, offload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autolora import doctor
    from autolora.config import load_config

    config = load_config("flux1-dev")
    pretended.answer(monkeypatch, total * GIB)
    found = examine(config)
    hardware = doctor.hardware_of(torch.device("cuda"))
    here = found["here"]
    memory, _ = plan_memory(config, "float8", FLUX1_DEV, hardware, 2, 60 * GIB)
    assert (here["offload"], here["vram_limit"]) == (memory.offload, memory.vram_limit)
    assert here["offload"] == offload and here["compute"] == "bfloat16"
    assert (here["device"], here["name"]) == ("cuda:0", "Pretended card")
    rows = [need for need in found["needs"] if need["storage"] == "float8"]
    row = next(n for n in rows if (n["text_storage"], n["offload"]) == ("float8", offload))
    assert row["fits"] is True and row["card_gib"] == here["device_gib"]


@pytest.fixture(scope="module")
def true_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the names and shapes of the published model, by diffusers and transformers."""
    import shutil

    diffusers = pytest.importorskip("diffusers")
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    root = tmp_path_factory.mktemp("true")
    small = real_format.write(root / "small")
    stages = len(real_format.CHANNELS)
    with torch.device("meta"):
        modules = {
            "transformer": diffusers.FluxTransformer2DModel(guidance_embeds=True),
            "vae": diffusers.AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=["DownEncoderBlock2D"] * stages,
                up_block_types=["UpDecoderBlock2D"] * stages,
                layers_per_block=2,
                latent_channels=16,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ),
            "text_encoder": CLIPTextModel(
                CLIPTextConfig(vocab_size=49408, hidden_size=768, intermediate_size=3072)
            ),
            "text_encoder_2": T5EncoderModel(
                T5Config(
                    vocab_size=32128,
                    d_model=4096,
                    d_ff=10240,
                    num_layers=24,
                    num_heads=64,
                    feed_forward_proj="gated-gelu",
                )
            ),
        }
    for name, module in modules.items():
        shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        pretended.write_hollow(root / "flux" / name / "model.safetensors", shapes)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(small.bfl / name, root / "flux" / name)
    return root / "flux"


def test_files_of_true_size_are_recognized(true_size: Path) -> None:
    found = examine(PipelineConfig("true", kind="flux1", weights=true_size))
    assert all(entry["found"] for entry in found["model"]["files"])
    assert found["model"]["parameters"] == {
        "transformer": FLUX1_DEV.denoiser.parameters,
        "text_encoder": FLUX1_DEV.text_encoder,
        "text_encoder_2": FLUX1_DEV.text_encoder_2,
        "vae": FLUX1_DEV.vae,
    }


def test_bfls_names_and_shapes_are_those_that_diffusers_converts(monkeypatch) -> None:
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    from autolora.families.flux1.checkpoint_names import transformer_recipes
    from autolora.families.flux1.others import check_transformer
    from autolora.safetensors_io import TensorInfo, shape_of

    flux = FLUX1_DEV.denoiser
    for name, size in (
        ("WIDTH", flux.width),
        ("HEAD", flux.head_dim),
        ("DOUBLE", flux.double_blocks),
        ("SINGLE", flux.single_blocks),
        ("TEXT", flux.text_dim),
        ("POOLED", flux.pooled_dim),
    ):
        monkeypatch.setattr(real_format, name, size)
    with torch.device("meta"):
        theirs = diffusers.FluxTransformer2DModel(guidance_embeds=True).state_dict()
        monkeypatch.setattr(torch, "randn", lambda *size, **options: torch.empty(*size))
        bfl = real_format.make_transformer(torch.Generator("cpu"))
    infos = {name: TensorInfo("BF16", tuple(value.shape)) for name, value in bfl.items()}
    recipes, leftover = transformer_recipes(infos, check_transformer(infos, Path("flux1")))
    ours = {name: shape_of(recipe, infos) for name, recipe in recipes.items()}
    converted = convert_flux_transformer_checkpoint_to_diffusers(dict(bfl))
    assert len(bfl) == 780 and not leftover
    assert {n: t.shape for n, t in converted.items()} == {n: t.shape for n, t in theirs.items()}
    infos = {name: TensorInfo("BF16", tuple(value.shape)) for name, value in theirs.items()}
    recipes, leftover = transformer_recipes(infos, check_transformer(infos, Path("folder")))
    assert not leftover and {n: shape_of(r, infos) for n, r in recipes.items()} == ours


@pytest.mark.slow
@pytest.mark.skipif("AUTOLORA_TRUE_SIZE" not in os.environ, reason="AUTOLORA_TRUE_SIZE=1 runs it")
@pytest.mark.parametrize("offload", OFFLOADS)
def test_estimates_hold_for_the_true_model(
    true_size: Path, offload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes of all tensors of a picture at 1024 x 1024; a real card needs workspaces besides."""
    total = {"none": 48, "parts": 16, "layers": 12}[offload] * GIB
    memory = MemorySettings(offload, text_storage="float8")
    config = PipelineConfig(
        "true", kind="flux1", weights=true_size, device="cuda", width=1024, height=1024
    )
    config = replace(config, memory=memory)
    with pretended.card(monkeypatch, total) as count:
        pipe = load_pipeline(config)
        kept = count.now["cuda"] + count.now["cpu"]
        limit = getattr(pipe.dit.blocks[0].attn.a_to_qkv, "vram_limit", None)
        count.restart()
        peaks = draw(pipe, config, count)
    need = estimate(FLUX1_DEV, "float8", memory, 1024, 1024)
    weights = FLUX1_DEV.denoiser.parameters + FLUX1_DEV.text_encoder + FLUX1_DEV.text_encoder_2
    assert kept == pytest.approx(weights + 2 * FLUX1_DEV.vae, rel=0.015)
    if offload == "layers":
        assert limit is not None
        assert (limit - 1) * GIB < peaks["steps"] + pretended.CONTEXT < total - 0.6 * GIB
    else:
        assert 0.8 * need.device < max(peaks.values()) + pretended.CONTEXT < need.device
