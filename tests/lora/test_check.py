"""The same LoRA under two names, whatever its file looks like."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from autolora.lora import LoRA, save_lora
from autolora.lora import check as module
from autolora.lora.check import KnownLoRAs, PoolTwins, Twin, group_twins, same_bytes
from autolora.lora.pool import scan
from tests.lora.lora_files import make_file

LAYER = "blocks.0.attn.a_to_out"


def adapter(seed: int, scale: float = 1.0) -> LoRA:
    random = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 8, generator=random), torch.randn(8, 2, generator=random)
    return LoRA.from_factors("x", {LAYER: (a, b * scale)})


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pool"
    root.mkdir()
    for n in range(3):
        made = make_file("kohya", seed=n, keep=lambda name: name.startswith("double_blocks.0"))
        made.save(root / f"{n}.safetensors")
    return root


def rewritten(path, target, format="kohya", dtype=None):
    lora = LoRA.load(path)
    pairs = {layer: lora.factors(layer) for layer in lora.layers}
    return save_lora(target, pairs, format, dtype=dtype)


def found(folder, path) -> dict[str, Twin]:
    twins = PoolTwins(scan(folder)[0])
    return {entry.name: twin for entry, twin in twins.find(path, LoRA.load(path))}


def test_of_many_the_nearest_is_found():
    known = KnownLoRAs()
    for seed in range(150):
        assert known.add(str(seed), adapter(seed)) is None
    twin = known.add("again", adapter(77))
    assert (twin.name, twin.format, twin.difference, twin.is_same) == ("77", "factors", 0.0, True)
    near = known.add("near", adapter(77, 1.01))
    assert near.name in ("77", "again") and not near.is_same
    assert near.difference == pytest.approx(0.01 / 1.01, rel=1e-4)
    assert known.add("far", adapter(77, 1.1)) is None
    assert known.add("opposite", adapter(77, -1.0)) is None
    # The nearest one is named, not the first.
    assert known.add("nearer", adapter(77, 1.0099)).name == "near"


def test_groups_join_what_is_the_same():
    twin = {name: Twin(name, "kohya", 0.0, 0.0) for name in "abx"}
    near = Twin("a", "kohya", 0.01, 0.0)
    text = Twin("a", "kohya", 0.0, 1.0)
    pairs = [("c", twin["a"]), ("b", twin["a"]), ("d", twin["b"]), ("e", near), ("f", text)]
    assert group_twins([("y", twin["x"]), *pairs]) == [["a", "b", "c", "d"], ["x", "y"]]
    assert group_twins([]) == []


def test_sentences_say_what_is_the_same():
    assert "changes the same as 'a'" in Twin("a", "fal", 1e-7, 0.0).sentence
    assert "text encoders otherwise" in Twin("a", "fal", 1e-7, 1.0).sentence
    assert "about 0.0033 apart" in Twin("a", "fal", 0.00329, 0.0).sentence
    assert Twin("a\n", "fal", 0.0, 0.0).sentence.isprintable()
    json.dumps(Twin("a", "fal", 0.0, 0.0).to_dict())


def test_a_pool_is_searched(folder, tmp_path):
    for format, dtype in (("diffusers", None), ("fal", "bf16")):
        path = rewritten(
            folder / "1.safetensors", tmp_path / f"{format}.safetensors", format, dtype
        )
        ((name, twin),) = found(folder, path).items()
        assert name == "1" and twin.format == "kohya"
        assert twin.is_same == (dtype is None) and twin.difference < 0.01
    assert found(folder, folder / "1.safetensors") == {}, "a file is not its own twin"


def test_one_layer_more_or_less_is_another_lora(folder, tmp_path):
    tensors = load_file(folder / "1.safetensors")
    gone = [key for key in tensors if "img_mlp_0" in key]
    save_file({k: t for k, t in tensors.items() if k not in gone}, tmp_path / "less.safetensors")
    assert found(folder, tmp_path / "less.safetensors") == {}


def test_only_what_agrees_in_one_layer_is_read_whole(folder, tmp_path, monkeypatch):
    path = rewritten(folder / "1.safetensors", tmp_path / "x.safetensors", "peft")
    lora, real, loaded = LoRA.load(path), LoRA.load, []
    monkeypatch.setattr(module.LoRA, "load", lambda p: (loaded.append(p.name), real(p))[1])
    # The same factors in another layer: as good as any other LoRA.
    moved = {
        key.replace("double_blocks_0", "double_blocks_1"): tensor
        for key, tensor in load_file(folder / "1.safetensors").items()
    }
    save_file(moved, folder / "moved.safetensors")
    twins = PoolTwins(scan(folder)[0])
    for _ in range(2):
        assert [entry.name for entry, _ in twins.find(path, lora)] == ["1"]
    assert loaded == ["1.safetensors"] * 2
    # Each first layer is remembered, also that a file has none.
    (folder / "0.safetensors").write_bytes(b"x")
    assert [entry.name for entry, _ in twins.find(path, lora)] == ["1"]


def test_files_without_weights_are_compared(folder, tmp_path):
    key = "lora_unet_double_blocks_0_img_attn_proj.diff_b"
    for name, value in (("bias", 1.0), ("other", 2.0)):
        save_file({key: torch.full((8,), value)}, folder / f"{name}.safetensors")
    save_file({key: torch.ones(8)}, tmp_path / "x.safetensors", {"a": "b"})
    assert list(found(folder, tmp_path / "x.safetensors")) == ["bias"]


def test_in_a_huge_pool_only_copies_are_found(folder, tmp_path, monkeypatch):
    """Opening tens of thousands of files to add one would take minutes."""
    monkeypatch.setattr(module, "MAX_OPENED", 2)
    monkeypatch.setattr(module, "load_first_layer", None)
    (folder / "junk.safetensors").write_bytes(b"x" * 9)
    edited = tmp_path / "edited.safetensors"
    save_file(load_file(folder / "2.safetensors"), edited, {"modelspec.title": "Long " * 500})
    assert list(found(folder, edited)) == ["2"]
    other = rewritten(folder / "2.safetensors", tmp_path / "other.safetensors", "diffusers")
    assert found(folder, other) == {}


def test_bytes_are_compared_to_the_end(tmp_path):
    content = bytes(range(256)) * 5000
    paths = {}
    for name, data in (
        ("a", content), ("b", content), ("longer", content + b"x"), ("last", content[:-1] + b"x"),
        ("empty", b""), ("nothing", b""),
    ):  # fmt: skip
        paths[name] = tmp_path / name
        paths[name].write_bytes(data)
    same = {(x, y) for x in paths for y in paths if x < y and same_bytes(paths[x], paths[y])}
    assert same == {("a", "b"), ("empty", "nothing")}
    assert not same_bytes(tmp_path / "gone", paths["a"])
    assert not same_bytes(paths["a"], tmp_path / "gone")
