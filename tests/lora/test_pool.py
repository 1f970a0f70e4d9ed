"""Pools: listing, names, the cache, and files that cannot be used."""

import os

import pytest
import torch

from autolora import files
from autolora.errors import LoRAFormatError, PoolError, shown
from autolora.lora import LoRA, Pool
from tests.lora.lora_files import make_file


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
    (folder / "folder.safetensors").mkdir()
    os.mkfifo(folder / "fifo.safetensors")
    (folder / "null.safetensors").symlink_to("/dev/null")
    (folder / "two\nlines.safetensors").write_bytes(b"")
    (folder / "turned\u202e.safetensors").write_bytes(b"")
    (folder / "bad\x1b[31mfolder").mkdir()
    write(folder / "bad\x1b[31mfolder" / "a.safetensors")
    (folder / "linked_inside").symlink_to(folder / "styles")
    write(folder / "schnee ❄ 雪.safetensors")
    with open(os.fsencode(folder) + b"/latin\xe9.safetensors", "wb") as file:
        file.write(b"")
    (folder / "inside.safetensors").symlink_to(folder / "neon.safetensors")
    pool = Pool(folder)
    assert pool.names == ["broken", "cat", "dog", "ink", "inside", "neon", "schnee ❄ 雪"]
    problems = pool.check()
    assert problems == sorted(problems, key=lambda problem: str(problem.path))
    assert [problem.path.name for problem in problems] != [p.path.name for p in pool.scan_problems]
    reasons = {problem.path.name: problem.reason for problem in problems}
    expected = {
        "broken.safetensors": "not a valid safetensors file",
        "old.ckpt": "is a pickle, which can run code",
        "link.safetensors": "is a link that leaves the pool",
        "linked_folder": "is a link that leaves the pool",
        "null.safetensors": "is a link that leaves the pool",
        "dangling.safetensors": "is a link that leads nowhere",
        "folder.safetensors": "is a folder, not a file",
        "fifo.safetensors": "is a pipe or device",
        "two\nlines.safetensors": "line break or another control character",
        "turned\u202e.safetensors": "line break or another control character",
        "bad\x1b[31mfolder": "line break or another control character",
        "latin\udce9.safetensors": "line break or another control character",
    }
    assert set(reasons) == set(expected)
    for name, words in expected.items():
        assert words in reasons[name]
        assert reasons[name].isprintable() and reasons[name].endswith(".")
        assert shown(name) in reasons[name]
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


def test_check_tells_how_far_it_is(folder):
    seen = []
    Pool(folder).check(lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_folder_that_cannot_be_listed_is_said(folder, monkeypatch):
    real = os.scandir

    def scandir(place):
        if str(place).endswith("styles"):
            raise PermissionError(13, "Permission denied", place)
        return real(place)

    monkeypatch.setattr("autolora.lora.pool.os.scandir", scandir)
    pool = Pool(folder)
    assert pool.names == ["cat", "dog", "neon"]
    (problem,) = pool.scan_problems
    assert "styles cannot be listed: Permission denied." in problem.reason


def test_listing_opens_nothing_and_costs_one_stat_a_file(tmp_path, monkeypatch):
    """A pool of thousands is listed in time linear in its files."""
    root = tmp_path / "pool"
    for n in range(300):
        place = root / f"folder{n % 10}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"lora{n}.safetensors").write_bytes(b"x")
        (place / f"lora{n}.png").write_bytes(b"x")
    calls = []
    for name in ("open", "stat", "lstat"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, _f=real, **k: (calls.append(a), _f(*a, **k))[1])
    pool = Pool(root)
    assert len(pool) == 300
    assert len(calls) < 20


@pytest.fixture
def trust(monkeypatch):
    """Forget afterwards which folders links may lead to."""
    monkeypatch.setattr(files, "_followed", set())
    return lambda *roots: files.follow_links(roots)


def test_links_that_were_made_on_purpose_are_followed(folder, tmp_path, trust) -> None:
    drive = tmp_path / "another drive"
    one = write(drive / "one.safetensors")
    write(drive / "more" / "two.safetensors")
    (folder / "drive").symlink_to(drive)
    (folder / "three.safetensors").symlink_to(one)
    (drive / "round").symlink_to(folder)
    (drive / "again").symlink_to(drive)
    (folder / "private").symlink_to(write(tmp_path / "private" / "no.safetensors").parent)
    before = Pool(folder)
    assert not {"one", "two", "three"} & set(before.names)
    (note,) = before.link_notes()
    assert "drive, private, three.safetensors" in note.replace(folder.name, "")
    assert "--follow-links" in note
    trust(drive)
    pool = Pool(folder)
    assert set(pool.names) == {*before.names, "one", "two", "three"}
    assert pool.entry("two").path == folder / "drive" / "more" / "two.safetensors"
    assert pool.load("two").layers and pool.load("three").layers
    assert ["private" in note and "drive" not in note for note in pool.link_notes()] == [True]


def test_a_cache_of_the_hub_is_read(tmp_path, trust) -> None:
    cache = tmp_path / "models--somebody--neon-style"
    blob = write(cache / "blobs" / "0a1b2c.safetensors").rename(cache / "blobs" / "0a1b2c")
    (cache / "blobs" / "card").write_text("---\ninstance_prompt: ne0n\n---\n")
    snapshot = cache / "snapshots" / ("a1" * 20)
    snapshot.mkdir(parents=True)
    (snapshot / "pytorch_lora_weights.safetensors").symlink_to("../../blobs/0a1b2c")
    (snapshot / "README.md").symlink_to("../../blobs/card")
    assert blob.is_file()
    with pytest.raises(PoolError, match="is a link that leaves the pool"):
        Pool(snapshot)
    trust(cache)
    pool = Pool(snapshot)
    metadata = pool.metadata("pytorch_lora_weights")
    assert (metadata.title, metadata.trigger_words) == ("neon-style", ["ne0n"])
    assert pool.load("pytorch_lora_weights").layers
