"""Files that cannot be used: one sentence each, naming the file, the key and the fault."""

import json
import os
import pickle
import socket
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from autolora.errors import LoRAFormatError
from autolora.lora import LoRA
from autolora.safetensors_io import read_header, read_tensors
from tests.lora.lora_files import entry, make_file, pack

KEY = "lora_unet_double_blocks_0_img_attn_proj"
DOWN, UP, ALPHA = f"{KEY}.lora_down.weight", f"{KEY}.lora_up.weight", f"{KEY}.alpha"


def message_for(path) -> str:
    with pytest.raises(LoRAFormatError) as caught:
        LoRA.load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


GOOD = save({DOWN: torch.ones(2, 4), UP: torch.ones(4, 2)})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["is empty"]),
        (b"abc", ["only 3 bytes"]),
        (b"A" * 100, ["header claims", "only 92 follow"]),
        (struct.pack("<Q", 5000) + b"{}", ["header claims 5000 bytes but only 2"]),
        (struct.pack("<Q", 2**63) + b"{}", ["header claims 9223372036854775808 bytes"]),
        (pack(b"{nope"), ["not JSON"]),
        (pack(b"\xff\xfe{}"), ["not JSON"]),
        (pack(b"[" * 5000), ["not JSON"]),
        (pack(b"[1, 2]"), ["not a JSON object"]),
        (pack({}), ["holds no tensors"]),
        (pack({"__metadata__": 3}), ["__metadata__"]),
        (pack({"__metadata__": {"a": 3}}), ["metadata 'a' is not text"]),
        (pack({"a": 3}), ["key 'a' has no entry"]),
        (pack({"a": entry(dtype="Q7")}, bytes(8)), ["key 'a'", "unknown dtype 'Q7'"]),
        (pack({"a": entry(dtype=None)}, bytes(8)), ["key 'a'", "unknown dtype"]),
        (pack({"a": entry(shape=[-1, 2])}, bytes(8)), ["key 'a'", "shape"]),
        (pack({"a": entry(shape=[True, 2])}, bytes(8)), ["key 'a'", "shape"]),
        (pack({"a": entry(end=-8)}), ["key 'a'", "data_offsets"]),
        (pack({"a": entry(shape=[3, 2])}, bytes(8)), ["needs 24 bytes, not 8"]),
        (pack({"a": entry(shape=[1] * 33)}, bytes(8)), ["key 'a'", "33 dimensions"]),
        (pack({"a": entry(shape=[2**62] * 30)}, bytes(8)), ["key 'a'", "too large"]),
        (pack({"a": entry(shape=[0, 2**62, 4], end=0)}), ["key 'a'", "too large"]),
        (pack({"a": entry(begin=-8, end=0)}), ["key 'a'", "data_offsets"]),
        (pack({"a": entry(begin=0, end=2**63)}), ["key 'a'", "data_offsets"]),
        (pack({"a": entry(shape=[2**40], begin=0, end=2**42)}), ["cut off", "download it again"]),
        (pack({"a": entry(shape=[10**30])}), ["key 'a'", "shape"]),
        (pack(b'{"a": {"shape": [' + b"9" * 5000 + b"]}}"), ["not JSON"]),
        (pack(b'{"__metadata__": {"a": "' + b"[" * 1_000_001 + b'"}}'), ["1000000 items"]),
        (pack({"a": entry(), "b": entry(begin=4, end=12)}, bytes(12)), ["'b' overlaps"]),
        (pack({"a": entry(), "b": entry(begin=12, end=20)}, bytes(20)), ["'b' leaves a gap"]),
        (pack({"a": entry()}, bytes(20)), ["12 bytes follow"]),
        (pack(b'{"a": 1, "a": 2}'), ["names 'a' twice"]),
        (GOOD[:-5], ["cut off", "download it again"]),
        (pickle.dumps({"a": 1}), ["is a pickle", "run code", "--allow-pickle"]),
        (b"PK\x03\x04" + bytes(50), ["is a pickle", "run code", "--allow-pickle"]),
        (b"<!DOCTYPE html><html>" + bytes(50), ["web page"]),
        (b"version https://git-lfs.github.com/spec/v1\n", ["Git LFS pointer"]),
        (b"GGUF" + bytes(50), ["GGUF"]),
    ],
)
def test_damaged_files(tmp_path, content, words):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    message = message_for(path)
    assert "bad.safetensors" in message
    for word in words:
        assert word in message


def test_a_header_of_a_hundred_megabytes_is_not_read(tmp_path):
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100_000_000) + b'{"a": "')
        file.truncate(200_000_000)
    tracemalloc.start()
    assert "its header has 100000000 bytes, more than" in message_for(path)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_missing_file_and_folder(tmp_path):
    assert "does not exist" in message_for(tmp_path / "none.safetensors")
    assert "is a folder" in message_for(tmp_path)


def test_neither_pipes_nor_devices_are_opened(tmp_path):
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    # Nobody writes into the pipe: opening it as a file would wait for ever.
    assert "is a pipe or device" in message_for(pipe)
    assert "is a pipe or device" in message_for(Path("/dev/zero"))
    socket_path = tmp_path / "s.safetensors"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(socket_path))
        assert "cannot be opened" in message_for(socket_path)


def test_names_that_no_file_can_have(tmp_path):
    assert "cannot be opened" in message_for(tmp_path / ("a" * 300 + ".safetensors"))
    assert "cannot be opened" in message_for(tmp_path / "nul\0.safetensors")
    loop = tmp_path / "loop.safetensors"
    loop.symlink_to(loop)
    assert "cannot be opened" in message_for(loop)


def test_a_file_that_must_not_be_read(tmp_path, monkeypatch):
    path = tmp_path / "secret.safetensors"
    path.write_bytes(GOOD)
    path.chmod(0)
    if os.geteuid() == 0:
        # The superuser reads everything, so that only the system call can say no.
        def refuse(*_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("autolora.safetensors_io.os.open", refuse)
    message = message_for(path)
    assert "secret.safetensors must not be read by you" in message


def test_a_disk_that_fails_while_reading(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.write_bytes(GOOD)

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("autolora.safetensors_io._read_header_bytes", fail)
    assert "cannot be read: Input/output error" in message_for(path)


@pytest.mark.parametrize("how", ["longer", "shorter", "same size", "replaced"])
def test_a_file_that_changes_while_it_is_read(tmp_path, how):
    path = tmp_path / "a.safetensors"
    path.write_bytes(GOOD)
    os.utime(path, ns=(1, 1))
    header = read_header(path)
    assert set(read_tensors(path, header, [DOWN, UP])) == {DOWN, UP}
    if how == "replaced":
        other = tmp_path / "b.safetensors"
        other.write_bytes(GOOD)
        os.utime(other, ns=(1, 1))
        other.replace(path)
    else:
        path.write_bytes({"longer": GOOD + b"x", "shorter": GOOD[:-4], "same size": GOOD}[how])
    with pytest.raises(LoRAFormatError, match=r"a\.safetensors changed while it was read; load it"):
        read_tensors(path, header, [DOWN])


def test_a_file_that_changes_between_two_tensors(tmp_path, monkeypatch):
    """The change is seen although every single read gets its bytes."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(GOOD)
    os.utime(path, ns=(1, 1))
    header = read_header(path)
    make = torch.empty

    def overwrite(*args, **kwargs):
        path.write_bytes(GOOD)
        return make(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", overwrite)
    with pytest.raises(LoRAFormatError, match="changed while it was read"):
        read_tensors(path, header, [DOWN, UP])


def test_names_in_any_writing_load(tmp_path):
    for name in ("雪景 ❄ naïve.safetensors", "two\nlines.safetensors", "a;b $(c) 'd'.safetensors"):
        path = tmp_path / name
        path.write_bytes(GOOD)
        assert LoRA.load(path).layers


def nan(tensor):
    tensor = tensor.clone()
    tensor[0, 1] = float("nan")
    return tensor


DOWN_OK, UP_OK = torch.ones(2, 4), torch.ones(4, 2)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({DOWN: DOWN_OK}, [DOWN, "no partner", "B (up)"]),
        ({UP: UP_OK}, [UP, "no partner", "A (down)"]),
        ({DOWN: DOWN_OK, UP: torch.ones(4, 3)}, [UP, "[4, 3]", "[2, 4]", "ranks differ"]),
        ({DOWN: DOWN_OK.int(), UP: UP_OK}, [DOWN, "I32", "floating-point"]),
        ({DOWN: DOWN_OK, UP: UP_OK.to(torch.int8)}, [UP, "I8"]),
        ({DOWN: torch.ones(0, 4), UP: torch.ones(4, 0)}, [DOWN, "holds no values"]),
        ({DOWN: torch.ones(2, 4, 3, 3), UP: UP_OK}, [DOWN, "is a linear layer"]),
        ({DOWN: torch.ones(2, 4, 1), UP: UP_OK}, [DOWN, "2-D"]),
        ({DOWN: nan(DOWN_OK), UP: UP_OK}, [DOWN, "NaN"]),
        ({DOWN: DOWN_OK, UP: nan(UP_OK).half()}, [UP, "NaN"]),
        ({DOWN: DOWN_OK, UP: nan(UP_OK).to(torch.float8_e4m3fn)}, [UP, "NaN"]),
        ({DOWN: DOWN_OK, UP: UP_OK.bfloat16() * float("inf")}, [UP, "infinite"]),
        ({DOWN: DOWN_OK, UP: UP_OK, ALPHA: torch.tensor(float("nan"))}, [ALPHA, "NaN"]),
        ({DOWN: DOWN_OK, UP: UP_OK, ALPHA: torch.ones(3)}, [ALPHA, "one number"]),
        (
            {DOWN: DOWN_OK, UP: UP_OK, ALPHA: torch.tensor(1e300, dtype=torch.float64)},
            [ALPHA, "above 1e+06"],
        ),
        ({DOWN: DOWN_OK.double() * 1e300, UP: UP_OK}, [DOWN, "above 1e+06"]),
        ({DOWN: torch.ones(1, 70_000), UP: torch.ones(70_000, 1)}, ["larger than any layer"]),
        (
            {f"{KEY}.lokr_w1": torch.ones(300, 300), f"{KEY}.lokr_w2": torch.ones(300, 300)},
            ["blocks.0.attn.a_to_out", "[90000, 90000]", "larger than any layer"],
        ),
        ({DOWN: DOWN_OK, UP: UP_OK, ALPHA: torch.tensor(True)}, [ALPHA, "BOOL"]),
        ({DOWN: DOWN_OK, UP: UP_OK, f"{KEY}.lora_A.weight": DOWN_OK}, ["twice", DOWN, "lora_A"]),
        ({DOWN: DOWN_OK, UP: UP_OK, f"{KEY}.diff_b": torch.ones(2, 2)}, ["diff_b", "[2, 2]"]),
        (
            {
                DOWN: DOWN_OK,
                UP: UP_OK,
                "transformer.transformer_blocks.0.attn.to_out.0.lora_A.weight": DOWN_OK,
                "transformer.transformer_blocks.0.attn.to_out.0.lora_B.weight": UP_OK,
            },
            ["twice", DOWN],
        ),
        (
            {
                "diffusion_model.single_blocks.0.linear1.lora_A.weight": DOWN_OK,
                "diffusion_model.single_blocks.0.linear1.lora_B.weight": torch.ones(7, 2),
                "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": DOWN_OK,
                "transformer.single_transformer_blocks.0.attn.to_q.lora_B.weight": torch.ones(1, 2),
            },
            ["twice", "linear1", "to_q"],
        ),
        (
            {
                "x_embedder.lora_A.cat.weight": DOWN_OK,
                "x_embedder.lora_B.cat.weight": UP_OK,
                "proj_out.lora_A.dog.weight": DOWN_OK,
                "proj_out.lora_B.dog.weight": UP_OK,
            },
            ["several adapters", "'cat'", "'dog'"],
        ),
        (
            {
                "transformer_blocks.0.attn.to_q.lora_A.weight": DOWN_OK,
                "transformer_blocks.0.attn.to_q.lora_B.weight": UP_OK,
                "transformer_blocks.0.attn.to_k.lora_A.weight": DOWN_OK,
                "transformer_blocks.0.attn.to_k.lora_B.weight": torch.ones(5, 2),
            },
            ["to_", "blocks.0.attn.a_to_qkv", "[15, 4]", "[12, 4]"],
        ),
        (
            {
                "transformer_blocks.0.attn.to_q.lora_A.weight": DOWN_OK,
                "transformer_blocks.0.attn.to_q.lora_B.weight": UP_OK,
                "transformer_blocks.0.attn.to_k.diff_b": torch.ones(5),
            },
            ["to_k.diff_b", "blocks.0.attn.a_to_qkv", "[15, 4]", "[12, 4]"],
        ),
        (
            {
                "single_transformer_blocks.0.proj_mlp.lora_A.weight": DOWN_OK,
                "single_transformer_blocks.0.proj_mlp.lora_B.weight": torch.ones(5, 2),
            },
            ["proj_mlp.lora_B", "5 rows cannot be the mlp part"],
        ),
    ],
)
def test_wrong_tensors(tmp_path, tensors, words):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(save({key: value.clone() for key, value in tensors.items()}))
    message = message_for(path)
    assert "bad.safetensors" in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("key", "model"),
    [
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "Stable Diffusion"),
        ("unet.up_blocks.3.attentions.0.proj_in.lora_A.weight", "Stable Diffusion"),
        ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", "Wan"),
        ("blocks.0.cross_attn.q.lora_A.default.weight", "Wan"),
        ("lora_unet_blocks_0_self_attn_q.lora_down.weight", "Wan"),
        ("diffusion_model.blocks.0.self_attn.q_proj.lora_A.weight", "Anima"),
        ("lora_unet_blocks_0_attn_wq.lora_down.weight", "Krea 2"),
        ("diffusion_model.single_blocks.0.q_proj.lora_A.weight", "FLUX.3"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight", "Stable Diffusion 3"),
        ("lora_unet_double_blocks_0_img_mlp_fc1.lora_down.weight", "HunyuanVideo"),
        ("diffusion_model.double_stream_blocks.0.x.lora_A.weight", "HiDream"),
        ("transformer.transformer_blocks.0.attn1.to_q.lora_A.weight", "LTX-Video"),
        ("double_blocks.0.img_attn.norm.query_norm.scale", "FLUX.1 Control"),
    ],
)
def test_other_base_models_are_named(tmp_path, key, model):
    path = tmp_path / "other.safetensors"
    path.write_bytes(save({key: torch.ones(2, 2)}))
    message = message_for(path)
    assert model in message
    assert "not for FLUX.1" in message
    # Some layers of such a file may have FLUX.1's names.
    mixed = make_file("diffusers", keep=lambda path: "to_q" in path)
    path.write_bytes(save(mixed.tensors | {key: torch.ones(2, 2)}))
    assert model in message_for(path)


def test_nothing_matched_shows_reasons_and_first_keys(tmp_path):
    path = tmp_path / "lokr.safetensors"
    path.write_bytes(save({f"{KEY}_who.lokr_w1": torch.ones(2), ALPHA: torch.tensor(1.0)}))
    message = message_for(path)
    assert "changes no layer of any known base model" in message
    assert "LoKr" in message
    assert f"{KEY}_who.lokr_w1" in message


def test_unknown_keys_with_a_header_that_names_the_model(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(save({"x": torch.ones(2)}, {"ss_base_model_version": "aura_v3"}))
    assert "aura_v3" in message_for(path)


@pytest.mark.parametrize(
    "text",
    [
        "{nope",
        "[]",
        '{"transformer.lora_alpha": "much"}',
        '{"transformer.lora_alpha": NaN}',
        '{"transformer.lora_alpha": 1e300}',
        pytest.param('{"transformer.lora_alpha": 1%s}' % ("0" * 400), id="400 digits"),
        '{"transformer.alpha_pattern": 3}',
        '{"transformer.alpha_pattern": {"a": null}}',
        '{"transformer.alpha_pattern": {"(a+)+": 1}}',
        '{"transformer.alpha_pattern": {"[": 1}}',
    ],
)
def test_unreadable_alpha_header_is_an_error_not_a_wrong_strength(tmp_path, text):
    path = tmp_path / "a.safetensors"
    make_file("diffusers").save(path, metadata={"lora_adapter_metadata": text})
    message = message_for(path)
    assert "lora_adapter_metadata" in message
    assert "strength is unknown" in message


def test_names_with_line_breaks_stay_on_one_line(tmp_path):
    path = tmp_path / "two\nlines \u202e.safetensors"
    path.write_bytes(b"")
    assert "two\\nlines" in message_for(path)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga"])
def test_initializations_that_change_the_base_are_refused(tmp_path, start):
    path = tmp_path / "a.safetensors"
    entries = {"transformer.r": 2, "transformer.init_lora_weights": start}
    header = {"lora_adapter_metadata": json.dumps(entries)}
    path.write_bytes(save({DOWN: DOWN_OK, UP: UP_OK}, header))
    message = message_for(path)
    assert start in message and "path_initial_model_for_weight_conversion" in message
    for plain in (True, "gaussian", "eva", "orthogonal"):
        entries["transformer.init_lora_weights"] = plain
        dotted = "transformer.transformer_blocks.0.attn.to_out.0"
        tensors = {f"{dotted}.lora_A.weight": DOWN_OK, f"{dotted}.lora_B.weight": UP_OK}
        path.write_bytes(save(tensors, {"lora_adapter_metadata": json.dumps(entries)}))
        assert LoRA.load(path).layers == ["blocks.0.attn.a_to_out"]


def test_token_embeddings_beside_layers_are_left_out_with_a_reason(tmp_path):
    path = tmp_path / "a.safetensors"
    extra = {"bundle_emb.me.clip_l": torch.ones(2, 8), "clip_g": torch.ones(2, 8)}
    path.write_bytes(save({DOWN: DOWN_OK, UP: UP_OK} | extra))
    dropped = LoRA.load(path).report.dropped
    assert set(dropped) == set(extra)
    assert all("token embedding" in reason for reason in dropped.values())
