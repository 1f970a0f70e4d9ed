"""Finding files, telling what is missing or broken, and refusing what is no FLUX.1."""

import json
import shlex
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from autolora.errors import ConfigError
from autolora.flux.checkpoints import download_command, locate, require
from autolora.flux.config import PipelineConfig, load_config
from autolora.flux.families import check_transformer, other_family, strip_prefix
from autolora.flux.headers import TensorInfo, gigabytes, read_header
from autolora.flux.settings import PARTS, CheckpointSettings, HubReference, hub_reference


def write(path: Path, shapes: dict[str, tuple[int, ...]], cut: int = 0) -> Path:
    """A safetensors file of zeros, written by hand; ``cut`` bytes are missing at its end."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        size = 2
        for side in shape:
            size *= side
        entries[name] = {
            "dtype": "BF16",
            "shape": list(shape),
            "data_offsets": [end, end + size],
        }
        end += size
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    data = struct.pack("<Q", len(header)) + header + bytes(end)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data[: len(data) - cut])
    return path


def test_headers_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"x": (2, 3), "y": ()})
    assert read_header(path) == {"x": TensorInfo("BF16", (2, 3)), "y": TensorInfo("BF16", ())}
    assert read_header(path)["x"].size == 6 and read_header(path)["x"].bytes == 12


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.gguf", b"GGUF", "is a GGUF file"),
        ("a.ckpt", b"PK", "is a pickle"),
        ("a.safetensors.part", b"", "download that has not ended"),
        ("a.safetensors", b"GGUF" + bytes(20), "is a GGUF file"),
        ("a.safetensors", b"", "incomplete"),
        ("a.safetensors", b"1234", "incomplete"),
        ("a.safetensors", struct.pack("<Q", 500) + b"{", "incomplete"),
        ("a.safetensors", b"<!DOCTYPE html><html>", "web page"),
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        ("a.safetensors", struct.pack("<Q", 3) + b"abc", "not safetensors"),
        ("a.safetensors", struct.pack("<Q", 2) + b"[]", "not safetensors"),
        ("a.safetensors", struct.pack("<Q", 8) + b'{"a": 1}', "not safetensors"),
        ("a.safetensors", struct.pack("<Q", 2) + b"{}", "holds no tensors"),
    ],
)
def test_bad_files_have_one_sentence(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as caught:
        read_header(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_half_a_download_says_how_much_is_there(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"x": (1000, 1000)}, cut=500_000)
    with pytest.raises(ConfigError, match=r"incomplete \(1\.5 MB of 2\.0 MB are there\)"):
        read_header(path)
    with pytest.raises(ConfigError, match="No such file"):
        read_header(tmp_path / "none.safetensors")
    assert [gigabytes(n) for n in (23.8e9, 5e3, 12)] == ["23.8 GB", "5.0 kB", "12 bytes"]


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("black-forest-labs/FLUX.1-dev", HubReference("black-forest-labs/FLUX.1-dev")),
        ("a/b:ae.safetensors", HubReference("a/b", "ae.safetensors")),
        ("a/b:text_encoder/*", HubReference("a/b", "text_encoder/*")),
        ("/a/b", None),
        ("./a/b", None),
        ("../models/b", None),
        ("flux1-dev.safetensors", None),
        ("C:\\models\\flux.safetensors", None),
        ("a/b/c", None),
    ],
)
def test_hub_references(text: str, reference: HubReference | None) -> None:
    assert hub_reference(text) == reference


def published(root: Path) -> Path:
    """The files of the published repository, with hardly anything in them."""
    for name in ("flux1-dev", "ae", "text_encoder/model"):
        write(root / f"{name}.safetensors", {"x": (1,)})
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for shard in shards:
        write(root / "text_encoder_2" / shard, {shard: (1,)})
    (root / "text_encoder_2" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {shard: shard for shard in shards}}), encoding="utf-8"
    )
    for name in ("tokenizer", "tokenizer_2"):
        (root / name).mkdir()
        (root / name / "tokenizer.json").write_text("{}", encoding="utf-8")
    return root


def test_a_published_folder_has_all_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIFFSYNTH_MODEL_BASE_PATH", raising=False)
    root = published(tmp_path / "models" / "o" / "n")
    by_path = PipelineConfig("a", kind="flux1", weights=root)
    hub = CheckpointSettings(base="o/n", transformer="o/n:flux1-dev.safetensors")
    by_hub = PipelineConfig("a", kind="flux1", checkpoint=replace(hub, folder=tmp_path / "models"))
    for config in (by_path, by_hub):
        located = locate(config)
        require(config, located.values())
        assert list(located) == list(PARTS)
        assert located["transformer"].paths == (root / "flux1-dev.safetensors",)
        assert [path.name for path in located["text_encoder_2"].paths] == [
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
        ]
        assert located["tokenizer"].paths == (root / "tokenizer",)
        assert download_command(config, located.values()) is None
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "elsewhere"))
    assert all(entry.missing for entry in locate(by_hub).values())


def test_both_layouts_in_one_folder_are_read_as_single_files(tmp_path: Path) -> None:
    root = published(tmp_path / "m")
    write(root / "transformer" / "diffusion_pytorch_model.safetensors", {"x": (1,)})
    config = PipelineConfig("a", kind="flux1", weights=root)
    assert locate(config)["transformer"].paths == (root / "flux1-dev.safetensors",)
    (root / "flux1-dev.safetensors").unlink()
    assert locate(config)["transformer"].paths[0].parent.name == "transformer"


def test_missing_shards_without_an_index_are_told_by_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    write(folder / "m-00003-of-00003.safetensors", {"x": (1,)})
    checkpoint = CheckpointSettings(transformer=str(folder))
    located = locate(PipelineConfig("a", kind="flux1", checkpoint=checkpoint))["transformer"]
    assert located.missing == ("m-00001-of-00003.safetensors", "m-00002-of-00003.safetensors")


@pytest.mark.parametrize("name", ["flux1-dev", "flux1-schnell", "majicflus"])
@pytest.mark.parametrize("source", ["modelscope", "huggingface"])
def test_one_command_gets_what_is_missing(name: str, source: str, tmp_path: Path) -> None:
    config = load_config(name)
    checkpoint = replace(config.checkpoint, folder=tmp_path / "my models", source=source)
    config = replace(config, checkpoint=checkpoint)
    located = locate(config)
    command = download_command(config, located.values())
    assert command is not None and "\n" not in command
    asked = [parse_command(part, source) for part in command.split(" && ")]
    assert {pattern for _, patterns, _ in asked for pattern in patterns} == {
        entry.hub.pattern for entry in located.values()
    }
    for repository, patterns, folder in asked:
        assert Path(folder) == tmp_path / "my models" / repository
        if repository == "black-forest-labs/FLUX.1-dev":
            published(Path(folder))
        else:
            for pattern in patterns:
                write(Path(folder) / pattern.replace("*", "model.safetensors"), {"x": (1,)})
                (Path(folder) / pattern.replace("*", "tokenizer.json")).touch()
    with pytest.raises(ConfigError, match=r"lacks files: .*; get them with `"):
        require(config, located.values())
    require(config, locate(config).values())


def parse_command(command: str, source: str) -> tuple[str, list[str], str]:
    """Repository, patterns and folder of a command, by the programs' own grammar."""
    import argparse

    words = shlex.split(command)
    parser = argparse.ArgumentParser()
    if source == "modelscope":
        assert words[:2] == ["modelscope", "download"]
        parser.add_argument("--model")
        parser.add_argument("--include", nargs="+")
        parser.add_argument("--local_dir")
    else:
        assert words[:2] == ["hf", "download"]
        parser.add_argument("model")
        parser.add_argument("--include", action="append")
        parser.add_argument("--local-dir")
    given = parser.parse_args(words[2:])
    return given.model, given.include, given.local_dir


def test_downloads_go_through_diffsynths_model_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffsynth.core

    from autolora.flux.checkpoints import download

    asked = []

    class ModelConfig(diffsynth.core.ModelConfig):
        def download(self) -> None:
            asked.append((self.model_id, self.origin_file_pattern, self.local_model_path))
            if self.origin_file_pattern == "ae.safetensors":
                raise OSError("no network\nat all")

    monkeypatch.setattr(diffsynth.core, "ModelConfig", ModelConfig)
    monkeypatch.delenv("DIFFSYNTH_MODEL_BASE_PATH", raising=False)
    checkpoint = CheckpointSettings(transformer="o/n:flux.safetensors", folder=tmp_path)
    config = PipelineConfig("a", kind="flux1", checkpoint=checkpoint)
    download(config, [locate(config)["transformer"]])
    assert asked == [("o/n", "flux.safetensors", str(tmp_path))]
    config = replace(config, checkpoint=replace(checkpoint, vae="o/n:ae.safetensors"))
    with pytest.raises(ConfigError, match=r"o/n could not be downloaded .*: no network at all"):
        download(config, locate(config).values())


def test_what_is_not_configured_is_said(tmp_path: Path) -> None:
    config = PipelineConfig("a", kind="flux1", weights=tmp_path / "none.safetensors")
    with pytest.raises(ConfigError, match=r"transformer at .*none.*vae \(not configured\)"):
        require(config, locate(config).values())


FLUX = {
    "img_in.weight": TensorInfo("BF16", (3072, 64)),
    "double_blocks.0.img_attn.qkv.weight": TensorInfo("BF16", (9216, 3072)),
}
DIFFUSERS = {
    "x_embedder.weight": TensorInfo("BF16", (3072, 64)),
    "transformer_blocks.0.attn.add_q_proj.weight": TensorInfo("BF16", (3072, 3072)),
}


def test_both_layouts_are_told_apart_with_and_without_prefix() -> None:
    path = Path("x.safetensors")
    assert check_transformer(FLUX, path) == "bfl"
    assert check_transformer(DIFFUSERS, path) == "diffusers"
    for prefix in ("model.diffusion_model.", "transformer."):
        names = strip_prefix([prefix + name for name in FLUX] + ["vae.decoder.conv_in.weight"])
        assert set(names) == set(FLUX)


@pytest.mark.parametrize(
    ("names", "family"),
    [
        (["double_blocks.0.img_attn.qkv.lora_A.weight"], "LoRA"),
        (["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"], "LoRA"),
        ([*FLUX, "double_stream_modulation_img.lin.weight"], "FLUX.2"),
        ([*DIFFUSERS, "double_stream_modulation_img.linear.weight"], "FLUX.2"),
        ([*FLUX, "distilled_guidance_layer.in_proj.weight"], "Chroma"),
        ([*FLUX, "txt_in.individual_token_refiner.blocks.0.norm1.weight"], "HunyuanVideo"),
        (["transformer_blocks.0.img_mod.1.weight", *DIFFUSERS], "Qwen-Image"),
        ([*DIFFUSERS, "pos_embed.proj.weight"], "Stable Diffusion 3"),
        (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "Stable Diffusion 3"),
        (["double_stream_blocks.0.block.attn1.to_q.weight"], "HiDream"),
        (
            [
                "model.diffusion_model.input_blocks.0.0.weight",
                "model.diffusion_model.label_emb.0.0.weight",
            ],
            "SDXL",
        ),
        (["conv_in.weight", "add_embedding.linear_1.weight"], "SDXL"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "Stable Diffusion 1"),
        (["noise_refiner.0.attention.qkv.weight"], "Z-Image"),
        (["blocks.0.cross_attn.q.weight", "patch_embedding.weight"], "Wan"),
        (["transformer_blocks.0.qkv_proj.qweight"], "Nunchaku"),
        (["double_blocks.0.img_attn.qkv.weight.quant_state.bitsandbytes__nf4"], "4 bits"),
        ([*FLUX, "double_blocks.0.img_attn.qkv.scale_weight"], "separate scales"),
        (["encoder.block.0.layer.0.SelfAttention.q.weight"], "T5"),
        (["decoder.conv_in.weight"], "autoencoder"),
    ],
)
def test_other_families_are_refused_by_name(names: list[str], family: str) -> None:
    assert family in (other_family(names) or "")
    tensors = {name: TensorInfo("BF16", (1,)) for name in names}
    plain = {name: tensors[full] for name, full in strip_prefix(tensors).items()}
    with pytest.raises(ConfigError, match=f"x.safetensors is .*{family}"):
        check_transformer(plain, Path("x.safetensors"))


def test_what_nobody_knows_is_refused_too() -> None:
    assert other_family(FLUX) is None and other_family(DIFFUSERS) is None
    with pytest.raises(ConfigError, match="its tensors are named weird"):
        check_transformer({"weird.weight": TensorInfo("F32", (1,))}, Path("x.safetensors"))
