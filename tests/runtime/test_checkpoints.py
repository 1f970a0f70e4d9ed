"""Finding files, telling what is missing or broken, and refusing what is no FLUX.1."""

import json
import shlex
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from autolora.config import (
    PARTS,
    CheckpointSettings,
    HubReference,
    PipelineConfig,
    hub_reference,
    load_config,
)
from autolora.errors import ConfigError
from autolora.families.flux1 import FAMILY
from autolora.families.flux1.others import check_transformer, other_family, strip_prefix
from autolora.runtime import checkpoints
from autolora.runtime.checkpoints import Located, download_command, require
from autolora.safetensors_io import TensorInfo, gigabytes, read_checkpoint_header


def locate(config: PipelineConfig) -> dict[str, Located]:
    return checkpoints.locate(config, FAMILY.parts)


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
    assert read_checkpoint_header(path) == {
        "x": TensorInfo("BF16", (2, 3)),
        "y": TensorInfo("BF16", ()),
    }
    assert (
        read_checkpoint_header(path)["x"].size == 6 and read_checkpoint_header(path)["y"].size == 1
    )


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
        read_checkpoint_header(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_half_a_download_says_how_much_is_there(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"x": (1000, 1000)}, cut=500_000)
    with pytest.raises(ConfigError, match=r"incomplete \(1\.5 MB of 2\.0 MB are there\)"):
        read_checkpoint_header(path)
    with pytest.raises(ConfigError, match="No such file"):
        read_checkpoint_header(tmp_path / "none.safetensors")
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
        assert list(located) == [part for part in PARTS if part != "processor"]
        assert located["transformer"].paths == (root / "flux1-dev.safetensors",)
        assert [path.name for path in located["text_encoder_2"].paths] == [
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
        ]
        assert located["tokenizer"].paths == (root / "tokenizer",)
        assert download_command(config, located.values()) is None
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "elsewhere"))
    assert all(entry.missing for entry in locate(by_hub).values())


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (
            ["flux1-dev-fp8", "clip_l", "t5xxl_fp8_e4m3fn", "ae"],
            ["flux1-dev-fp8", "clip_l", "t5xxl_fp8_e4m3fn", "ae"],
        ),
        (
            ["unet/flux1-dev", "clip/clip_l", "clip/t5xxl_fp16", "clip/t5xxl_x", "vae/ae", "vae/x"],
            ["unet/flux1-dev", "clip/clip_l", "clip/t5xxl_fp16", "vae/ae"],
        ),
        (
            ["diffusion_models/flux1-x", "text_encoders/clip_l", "text_encoders/t5xxl", "ae"],
            ["diffusion_models/flux1-x", "text_encoders/clip_l", "text_encoders/t5xxl", "ae"],
        ),
        (["majicflus_v134", "clip_l", "t5xxl", "ae"], ["majicflus_v134", "clip_l", "t5xxl", "ae"]),
    ],
)
def test_folders_of_single_files_are_understood(tmp_path: Path, files, found) -> None:
    """As people download them, ComfyUI's ``models`` among them; tokenizers come from the hub."""
    root = tmp_path / "my files"
    for name in files:
        write(root / f"{name}.safetensors", {"x": (1,)})
    checkpoint = CheckpointSettings(base="o/n", folder=tmp_path / "models")
    config = PipelineConfig("a", kind="flux1", weights=root, checkpoint=checkpoint)
    located = locate(config)
    expected = [(root / f"{name}.safetensors",) for name in found]
    parts = ("transformer", "text_encoder", "text_encoder_2", "vae")
    assert [located[part].paths for part in parts] == expected
    command = download_command(config, located.values()) or ""
    assert "--include 'tokenizer/*' 'tokenizer_2/*' --local_dir" in command


def test_the_users_own_path_wins_over_the_folder_and_the_folder_over_the_hub(tmp_path) -> None:
    root = published(tmp_path / "m")
    other = write(tmp_path / "other.safetensors", {"x": (1,)})
    hub = published(tmp_path / "models" / "o" / "n")
    checkpoint = CheckpointSettings(
        base="o/n", vae=str(other), text_encoder="o/n:text_encoder/*", folder=tmp_path / "models"
    )
    config = PipelineConfig("a", kind="flux1", weights=root, checkpoint=checkpoint)
    located = locate(config)
    assert located["vae"].paths == (other,)
    assert located["text_encoder"].paths == (root / "text_encoder" / "model.safetensors",)
    (root / "flux1-dev.safetensors").unlink()
    alone = locate(replace(config, checkpoint=CheckpointSettings()))["transformer"]
    assert alone.place == root / "flux1*.safetensors" and not alone.complete
    assert locate(config)["transformer"].paths == (hub / "flux1-dev.safetensors",)


def test_two_files_for_one_part_have_to_be_chosen_from(tmp_path: Path) -> None:
    root = published(tmp_path / "m")
    second = write(root / "flux1-schnell.safetensors", {"x": (1,)})
    config = PipelineConfig("a", kind="flux1", weights=root)
    words = r"each of flux1-dev.safetensors, flux1-schnell.safetensors .* `transformer:`"
    hub = CheckpointSettings(base="o/n", folder=tmp_path / "models")
    published(tmp_path / "models" / "o" / "n")
    for unclear in (config, replace(config, checkpoint=hub)):
        with pytest.raises(ConfigError, match=words):
            require(unclear, locate(unclear).values())
    config = replace(config, checkpoint=CheckpointSettings(transformer=str(second)))
    require(config, locate(config).values())
    assert locate(config)["transformer"].paths == (second,)


def test_half_a_tokenizer_is_missing(tmp_path: Path) -> None:
    root = published(tmp_path / "m")
    (root / "tokenizer" / "tokenizer.json").rename(root / "tokenizer" / "vocab.json")
    config = PipelineConfig("a", kind="flux1", weights=root)
    assert not locate(config)["tokenizer"].complete
    (root / "tokenizer" / "merges.txt").touch()
    assert locate(config)["tokenizer"].complete


INFO = TensorInfo("U8", (1,))


def test_packed_weights_of_any_part_are_refused() -> None:
    from autolora.families.flux1.others import check_plain

    plain = {"a.weight": TensorInfo("F8_E5M2", (1,)), "a.position_ids": TensorInfo("I64", (1,))}
    check_plain(plain, Path("x"))
    for name, dtype, words in (
        ("a.scale_weight", "F32", "separate scales"),
        ("a.weight.quant_state.bitsandbytes__nf4", "U8", "4 bits"),
        ("b.weight", "U8", r"packed \(b.weight holds U8 numbers\)"),
        ("b.weight", "I8", r"packed \(b.weight holds I8 numbers\)"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_plain({**plain, name: TensorInfo(dtype, (1,))}, Path("x"))
    nf4 = {"a.weight": TensorInfo("U8", (1,)), "a.weight.quant_state.bitsandbytes__nf4": INFO}
    with pytest.raises(ConfigError, match="4 bits by bitsandbytes"):
        check_plain(nf4, Path("x"))


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
    first = write(folder / "m-00001-of-00003.safetensors", {"x": (1,)})
    (folder / "m-00003-of-00003.safetensors").rename(folder / "m-00002-of-00003.safetensors")
    located = locate(PipelineConfig("a", kind="flux1", checkpoint=checkpoint))["transformer"]
    assert located.missing == ("m-00003-of-00003.safetensors",)
    weights = {"a": first.name, "b": "gone.safetensors"}
    index = json.dumps({"weight_map": weights})
    (folder / "m.safetensors.index.json").write_text(index, encoding="utf-8")
    located = locate(PipelineConfig("a", kind="flux1", checkpoint=checkpoint))["transformer"]
    assert (located.paths, located.missing) == ((first,), ("gone.safetensors",))


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

    from autolora.runtime.checkpoints import download

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
