"""Pools: listing, names, the cache, and files that cannot be used."""

import os

import pytest
import torch

from autolora.adapters import LoRA, Pool
from autolora.errors import LoRAFormatError, PoolError
from tests.adapters.lora_files import make_file


def write(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    return make_file("kohya", seed=seed, keep=lambda name: name.startswith("double")).save(path)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pool"
    for n, name in enumerate(("neon", "styles/ink", "subjects/cat", "subjects/dog")):
        write(root / f"{name}.safetensors", seed=n)
    return root


def test_listing(folder):
    (folder / "notes.txt").write_text("x")
    (folder / "neon.png").write_bytes(b"")
    write(folder / ".hidden" / "a.safetensors")
    write(folder / "._neon.safetensors")
    pool = Pool(str(folder))
    assert pool.names == ["cat", "dog", "ink", "neon"]
    assert [entry.name for entry in pool] == pool.names
    assert len(pool) == 4
    assert "cat" in pool and "cow" not in pool and 3 not in pool
    entry = pool.entry("ink")
    stat = (folder / "styles" / "ink.safetensors").stat()
    assert (entry.size, entry.mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert pool.check() == []


def test_repeated_stems_get_their_path(folder):
    write(folder / "styles" / "cat.safetensors")
    write(folder / "cat.safetensors")
    write(folder / "cat.SAFETENSORS")
    pool = Pool(folder)
    assert pool.names == sorted(
        ["cat", "cat.safetensors", "styles/cat", "subjects/cat", "dog", "ink", "neon"]
    ) or pool.names == sorted(
        ["cat", "cat.SAFETENSORS", "styles/cat", "subjects/cat", "dog", "ink", "neon"]
    )
    lora = pool.load("styles/cat")
    assert lora.name == "styles/cat"
    assert lora.path == folder / "styles" / "cat.safetensors"


def test_load_and_metadata(folder):
    (folder / "neon.json").write_text('{"activation text": "n30n"}')
    pool = Pool(folder)
    lora = pool.load("neon")
    expected = LoRA.load(folder / "neon.safetensors")
    for layer in expected.layers:
        assert torch.equal(lora.delta(layer), expected.delta(layer))
    assert pool.metadata("neon").trigger_words == ["n30n"]


def test_unknown_name_suggests_close_ones(folder):
    pool = Pool(folder)
    for ask in (pool.load, pool.metadata, pool.entry):
        with pytest.raises(PoolError, match=r"No LoRA named 'Neom' .* did you mean neon"):
            ask("Neom")
    with pytest.raises(PoolError, match="pool list"):
        pool.load("zzzzzzzz")


def test_cache_keeps_what_fits_and_was_used_last(folder):
    one = Pool(folder).load("cat").nbytes
    pool = Pool(folder, cache_bytes=2 * one)
    cat, dog = pool.load("cat"), pool.load("dog")
    assert pool.load("cat") is cat
    pool.load("ink")
    assert pool.load("cat") is cat
    assert pool.load("dog") is not dog
    tight = Pool(folder, cache_bytes=0)
    assert tight.load("cat") is tight.load("cat")


def test_changed_file_is_read_again(folder):
    pool = Pool(folder)
    before = pool.load("cat")
    path = write(folder / "subjects" / "cat.safetensors", seed=99)
    os.utime(path, ns=(1, 1))
    after = pool.load("cat")
    layer = before.layers[0]
    assert not torch.equal(before.delta(layer), after.delta(layer))
    path.unlink()
    with pytest.raises(PoolError, match="gone from the pool"):
        pool.load("cat")
    pool.refresh()
    assert "cat" not in pool


def test_bad_files_do_not_disturb_the_rest(folder, tmp_path):
    (folder / "broken.safetensors").write_bytes(b"junk")
    (folder / "old.ckpt").write_bytes(b"\x80\x04")
    outside = write(tmp_path / "elsewhere" / "out.safetensors")
    (folder / "link.safetensors").symlink_to(outside)
    (folder / "linked_folder").symlink_to(outside.parent)
    (folder / "dangling.safetensors").symlink_to(folder / "none")
    (folder / "fifo.safetensors").mkdir()
    (folder / "inside.safetensors").symlink_to(folder / "neon.safetensors")
    pool = Pool(folder)
    assert pool.names == ["broken", "cat", "dog", "ink", "inside", "neon"]
    reasons = {problem.path.name: problem.reason for problem in pool.check()}
    expected = {
        "broken.safetensors": "not a valid safetensors file",
        "old.ckpt": "not a safetensors file",
        "link.safetensors": "leaves the pool",
        "linked_folder": "leaves the pool",
        "dangling.safetensors": "not a file",
    }
    assert set(reasons) == set(expected)
    for name, words in expected.items():
        assert words in reasons[name]
        assert name in reasons[name]
    with pytest.raises(LoRAFormatError, match=r"broken\.safetensors"):
        pool.load("broken")
    assert pool.load("neon").layers


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda root: None, "does not exist"),
        (lambda root: root.write_text("x"), "is not a folder"),
        (lambda root: root.mkdir(), "has no .safetensors file"),
        (lambda root: (root.mkdir(), (root / "a.pt").write_bytes(b"")), "a.pt"),
    ],
)
def test_missing_or_empty_pool(tmp_path, prepare, words):
    root = tmp_path / "pool"
    prepare(root)
    with pytest.raises(PoolError) as caught:
        Pool(root)
    assert words in str(caught.value)
    assert "put" in str(caught.value)
