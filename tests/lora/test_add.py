"""Adding to a pool: whole and checked or not at all, with what belongs to a LoRA."""

import base64
import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from autolora.errors import LoRAFormatError, PoolError
from autolora.lora import LoRA, Metadata, Pool, save_lora
from autolora.lora.add import add_files
from autolora.safetensors_io import read_header
from tests.lora.lora_files import make_file

PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)


def write(path, seed=0, metadata=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    keep = make_file("kohya", seed=seed, keep=lambda name: name.startswith("double_blocks.0"))
    return keep.save(path, metadata=metadata)


def listing(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.fixture
def pool(tmp_path):
    root = tmp_path / "pool"
    write(root / "cat.safetensors", seed=1)
    write(root / "styles" / "ink.safetensors", seed=2)
    return root


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "in" / "neon.safetensors", seed=3)


def test_a_file_and_what_belongs_to_it(pool, source):
    beside = {
        "neon.json": '{"activation text": "n30n"}',
        "neon.civitai.info": "{}",
        "neon.autolora.yaml": "title: Neon",
        "neon.txt": "text",
        "neon.png": PNG,
        "neon.preview.webp": PNG,
        "neon.cover-0.jpg": PNG,
        "neon.captions.json": '{"neon.png": ["a"]}',
    }
    others = {"neon.v2.safetensors": b"x", "neon.v2.json": "{}", "neon.bak": "x", "README.md": "x"}
    for name, content in (beside | others).items():
        data = content.encode() if isinstance(content, str) else content
        source.with_name(name).write_bytes(data)
    (added,) = add_files(pool, [source])
    assert added.path == pool / "neon.safetensors"
    assert added.path.read_bytes() == source.read_bytes()
    assert added.sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    assert sorted(path.name for path in added.beside) == sorted(beside)
    assert added.notes == ()
    expected = {"cat.safetensors", "styles", "styles/ink.safetensors", "neon.safetensors", *beside}
    assert listing(pool) == sorted(expected)
    assert Pool(pool).load("neon").metadata.trigger_words == ["n30n"]
    assert (added.path.stat().st_mode & 0o777) == (0o666 & ~_umask())


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_another_name_is_given_to_everything(pool, source):
    source.with_name("neon.cover-0.png").write_bytes(PNG)
    captions = {"neon.cover-0.png": ["a sign"], "elsewhere.png": ["b"]}
    source.with_name("neon.captions.json").write_text(json.dumps(captions))
    add_files(pool, [source], name="neon lights v1.0")
    metadata = Pool(pool).metadata("neon lights v1.0")
    assert [cover.name for cover in metadata.covers] == ["neon lights v1.0.cover-0.png"]
    assert metadata.captions == ["a sign", "b"]
    assert metadata.title == "neon lights v1.0"


def test_a_model_card_comes_with_its_pictures(pool, source):
    card = (
        "---\ninstance_prompt: TOK\nwidget:\n- text: a\n  output: {url: images/1.png}\n---\n# T\n"
    )
    source.with_name("README.md").write_text(card)
    (source.parent / "images").mkdir()
    (source.parent / "images" / "1.png").write_bytes(PNG)
    add_files(pool, [source])
    metadata = Pool(pool).metadata("neon")
    assert (metadata.title, metadata.trigger_words, metadata.captions) == ("T", ["TOK"], ["a"])
    assert [cover.name for cover in metadata.covers] == ["neon.cover-0.png"]


def test_pictures_in_the_header_become_covers(pool, tmp_path):
    header = {"ssmd_cover_images": json.dumps([base64.b64encode(PNG).decode()])}
    source = write(tmp_path / "in" / "neon.safetensors", 3, header)
    (added,) = add_files(pool, [source])
    assert [path.name for path in added.beside] == ["neon.cover-0.png"]
    assert (pool / "neon.cover-0.png").read_bytes() == PNG


def test_same_bytes_are_refused_by_the_name_they_have(pool, source, tmp_path):
    twin = tmp_path / "in" / "twin.safetensors"
    shutil.copy(pool / "styles" / "ink.safetensors", twin)
    before = listing(pool)
    with pytest.raises(
        PoolError, match=r"twin\.safetensors is in the pool already, as 'ink'; .*--f"
    ):
        add_files(pool, [twin])
    assert listing(pool) == before
    (added,) = add_files(pool, [twin], force=True)
    assert added.notes == ("It changes the same as 'ink', a file in kohya format.",)
    again = tmp_path / "in" / "again.safetensors"
    shutil.copy(source, again)
    with pytest.raises(PoolError, match="as 'neon'"):
        add_files(pool, [source, again])
    assert "neon" not in Pool(pool)


def test_the_same_weights_with_another_header_are_refused(pool, tmp_path):
    edited = tmp_path / "edited.safetensors"
    save_file(load_file(pool / "cat.safetensors"), edited, {"modelspec.title": "Cat"})
    with pytest.raises(PoolError, match=r"as 'cat', the same weights in another file; leave it"):
        add_files(pool, [edited])
    (added,) = add_files(pool, [edited], force=True)
    assert added.notes == ("It changes the same as 'cat', a file in kohya format.",)


def test_the_same_lora_in_another_format_is_refused_by_name(pool, tmp_path):
    """As people have it: the same training result, saved by two programs."""
    lora = LoRA.load(pool / "cat.safetensors")
    pairs = {layer: lora.factors(layer) for layer in lora.layers}
    before = listing(pool)
    for n, (format, alpha) in enumerate((("diffusers", None), ("onetrainer-bfl", 3.0))):
        other = save_lora(tmp_path / f"other{n}.safetensors", pairs, format, alpha=alpha)
        words = rf"as 'cat', the same weights in kohya format \(this file has {format}\); leave"
        with pytest.raises(PoolError, match=words):
            add_files(pool, [other])
    assert listing(pool) == before
    # Files that are added together are compared as well.
    pairs = {layer: (a, b * 1.5) for layer, (a, b) in pairs.items()}
    one = save_lora(tmp_path / "one.safetensors", pairs, "fal")
    two = save_lora(tmp_path / "two.safetensors", pairs, "kohya")
    with pytest.raises(PoolError, match=r"two\.safetensors is in the pool already, as 'one'"):
        add_files(pool, [one, two])
    assert listing(pool) == before
    assert add_files(pool, [one])[0].notes == ()


def test_a_copy_in_another_precision_is_noted(pool, tmp_path):
    half = {k: t.bfloat16() for k, t in load_file(pool / "cat.safetensors").items()}
    save_file(half, tmp_path / "half.safetensors")
    (added,) = add_files(pool, [tmp_path / "half.safetensors"])
    (note,) = added.notes
    assert note.startswith("It is nearly the same as 'cat' (about 0.00")


def test_bad_files_in_the_pool_do_not_keep_a_good_one_out(pool, source):
    for name, content in (("empty", b""), ("short", b"abc"), ("junk", b"\xff" * 100)):
        (pool / f"{name}.safetensors").write_bytes(content)
    good = (pool / "cat.safetensors").read_bytes()
    (pool / "cut.safetensors").write_bytes(good[:-4])
    seen = []
    (added,) = add_files(pool, [source], progress=lambda done, total: seen.append((done, total)))
    assert added.notes == () and seen == [(n, 6) for n in range(1, 7)]


def test_strength_beside_a_file_tells_it_from_its_copy(pool, tmp_path):
    """The same bytes with another alpha in their configuration are another LoRA."""
    folder = tmp_path / "in"
    folder.mkdir()
    made = make_file("diffusers", prefix="base_model.model.", keep=lambda path: "to_q" in path)
    source = made.save(folder / "adapter_model.safetensors")
    add_files(pool, [source], name="plain")
    (folder / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8}')
    assert add_files(pool, [source], name="strong")[0].notes == ()
    with pytest.raises(PoolError, match="as 'strong'; leave"):
        add_files(pool, [source], name="again")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cat", "there already"),
        ("CAT", "there already"),
        ("ink", "there already"),
        ("", "cannot be a name"),
        (" x", "cannot be a name"),
        (".x", "cannot be a name"),
        ("a/b", "cannot be a name"),
        ("../x", "cannot be a name"),
        ("a:b", "cannot be a name"),
        ("a\nb", "cannot be a name"),
        ("x" * 250, "cannot be a name"),
    ],
)
def test_names_that_are_taken_or_cannot_be(pool, source, name, words):
    before = listing(pool)
    with pytest.raises(PoolError, match=words) as caught:
        add_files(pool, [source], name=name)
    assert "--name" in str(caught.value)
    assert listing(pool) == before


def test_a_name_is_for_one_file(pool, source):
    with pytest.raises(PoolError, match="for one file, not for 2"):
        add_files(pool, [source, source], name="x")


@pytest.mark.parametrize("content", [b"", b"junk" * 10, None])
def test_a_bad_file_leaves_nothing_behind(pool, source, tmp_path, content):
    bad = tmp_path / "in" / "bad.safetensors"
    bad.write_bytes(source.read_bytes()[:-4] + b"\0\0\xc0\x7f" if content is None else content)
    bad.with_suffix(".json").write_text("{}")
    before = listing(pool)
    with pytest.raises(LoRAFormatError) as caught:
        add_files(pool, [source, bad])
    assert str(bad) in str(caught.value) and ".adding" not in str(caught.value)
    assert listing(pool) == before
    fresh = tmp_path / "new" / "pool"
    with pytest.raises(LoRAFormatError):
        add_files(fresh, [bad])
    assert not fresh.exists()


def test_a_copy_that_differs_is_not_kept(pool, source, monkeypatch):
    from autolora.lora import add

    real = add._copy

    def spoil(file, target):
        digest = real(file, target)
        data = bytearray(target.read_bytes())
        data[-1] ^= 1
        target.write_bytes(data)
        return digest

    before = listing(pool)
    monkeypatch.setattr(add, "_copy", spoil)
    with pytest.raises(PoolError, match="the copy differs"):
        add_files(pool, [source])
    assert listing(pool) == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_fails_half_way_is_undone(pool, source, monkeypatch, error):
    source.with_suffix(".json").write_text("{}")
    before = listing(pool)
    real = os.link

    def link(file, target):
        if str(file).endswith(".safetensors"):
            raise error
        real(file, target)

    monkeypatch.setattr("autolora.lora.add.os.link", link)
    monkeypatch.setattr("autolora.lora.add.os.rename", lambda *_: link(*_))
    with pytest.raises((PoolError, KeyboardInterrupt)) as caught:
        add_files(pool, [source])
    assert isinstance(caught.value, KeyboardInterrupt) or "No space left" in str(caught.value)
    assert listing(pool) == before


def test_what_a_killed_program_left_is_removed_a_day_later(pool, source):
    for name, hours in (("old", 25), ("new", 1)):
        left = pool / f".adding-{name}"
        left.mkdir()
        (left / "half.safetensors").write_bytes(b"x")
        os.utime(left, (time.time() - hours * 3600,) * 2)
    add_files(pool, [source])
    assert not (pool / ".adding-old").exists() and (pool / ".adding-new").is_dir()
    assert Pool(pool).names == ["cat", "ink", "neon"]


def test_a_pool_that_cannot_be_written_is_said(source, tmp_path):
    with pytest.raises(PoolError, match=r"neon\.safetensors is not a folder"):
        add_files(source, [source])
    with pytest.raises(PoolError, match=r"Nothing was added to LoRA pool .*Not a directory"):
        add_files(source / "inside", [source])


@pytest.mark.parametrize(("path", "words"), [("", "is a folder"), ("no\nne", "does not exist")])
def test_a_wrong_path_is_said_before_its_name(pool, path, words):
    with pytest.raises(LoRAFormatError, match=words):
        add_files(pool, [Path(path)])


def test_leftovers_are_not_overwritten(pool, source):
    (pool / "neon.json").write_text('{"activation text": "old"}')
    source.with_suffix(".json").write_text("{}")
    before = listing(pool)
    with pytest.raises(PoolError, match=r"neon\.json is there already"):
        add_files(pool, [source])
    assert listing(pool) == before
    assert "old" in (pool / "neon.json").read_text()


def test_works_without_hard_links(pool, source, monkeypatch):
    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr("autolora.lora.add.os.link", refuse)
    add_files(pool, [source])
    assert Pool(pool).load("neon").layers


def test_pickles_are_converted_when_allowed(pool, tmp_path):
    made = make_file("kohya", seed=5, keep=lambda name: name.startswith("double_blocks.0"))
    pickled = tmp_path / "in" / "old.pt"
    pickled.parent.mkdir(exist_ok=True)
    torch.save({"state_dict": made.tensors}, pickled)
    pickled.with_name("old.png").write_bytes(PNG)
    with pytest.raises(LoRAFormatError, match=r"old\.pt is a pickle .* --allow-pickle"):
        add_files(pool, [pickled])
    (added,) = add_files(pool, [pickled], allow_pickle=True)
    assert added.path == pool / "old.safetensors"
    assert [path.name for path in added.beside] == ["old.png"]
    lora = Pool(pool).load("old")
    for layer, truth in made.truth.items():
        assert torch.allclose(lora.delta(layer).double(), truth, atol=1e-5)
    assert read_header(added.path).metadata["converted_from"] == "old.pt"
    # The converted file is told apart by its weights like any other.
    with pytest.raises(PoolError, match="as 'old'"):
        add_files(pool, [pickled], name="older", allow_pickle=True)
    bad = tmp_path / "in" / "bad.pt"
    torch.save({"x": torch.ones(2)}, bad)
    with pytest.raises(LoRAFormatError, match=r"bad\.pt changes no layer"):
        add_files(pool, [bad], allow_pickle=True)
    assert "bad" not in Pool(pool)


def test_alpha_beside_the_file_goes_with_it(pool, tmp_path):
    """The strength of a PEFT folder is in its configuration, and must be the same in the pool."""
    folder = tmp_path / "in"
    made = make_file("diffusers", prefix="base_model.model.", keep=lambda path: "to_q" in path)
    folder.mkdir()
    source = made.save(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8}')
    expected = LoRA.load(source)
    assert expected.report.scales == (2.0, 2.0)
    add_files(pool, [source], name="peft")
    assert Pool(pool).load("peft").report.scales == expected.report.scales
    assert Metadata.read(pool / "peft.safetensors").warnings == []
