"""Training from a folder: what is read, and one clear sentence for what can't be."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from autolora.errors import ConfigError
from train.lora import guidance_input, load_picture, main, read_folder


def _picture(path, size=(40, 20)):
    Image.new("RGB", size, (200, 30, 30)).save(path)


def test_pictures_and_captions_are_paired(tmp_path):
    for name, text in (("b", "one\n\n two \n"), ("a", "three")):
        _picture(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "notes.md").write_text("not a caption")
    examples = read_folder(tmp_path)
    assert [(e.path.name, e.captions) for e in examples] == [
        ("a.png", ["three"]),
        ("b.png", ["one", "two"]),
    ]


def test_pictures_are_cut_to_a_square(tmp_path):
    _picture(tmp_path / "a.png")
    assert load_picture(tmp_path / "a.png", 16).size == (16, 16)


def test_missing_folder_pictures_and_captions(tmp_path):
    with pytest.raises(ConfigError, match="no folder"):
        read_folder(tmp_path / "none")
    with pytest.raises(ConfigError, match="no pictures"):
        read_folder(tmp_path)
    _picture(tmp_path / "cat.png")
    with pytest.raises(ConfigError, match=r"cat\.png has no caption; write one into cat\.txt"):
        read_folder(tmp_path)


def test_a_broken_picture_is_named(tmp_path):
    (tmp_path / "cat.png").write_bytes(b"not a picture")
    with pytest.raises(ConfigError, match=r"cat\.png can't be read"):
        load_picture(tmp_path / "cat.png", 16)


def test_captions_in_another_encoding_are_named(tmp_path):
    _picture(tmp_path / "cat.png")
    (tmp_path / "cat.txt").write_bytes("un café".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"cat\.txt can't be read as UTF-8"):
        read_folder(tmp_path)
    (tmp_path / "cat.txt").write_bytes(b"\xef\xbb\xbfa cat")  # with a byte order mark
    assert read_folder(tmp_path)[0].captions == ["a cat"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rank", "0"], "rank must be at least 1"),
        (["--layers", "every"], "no-modulation"),
        (["--size", "100"], "multiple of 16"),
        (["--images", "{tmp}/none"], "no folder"),
        (["--out", "{tmp}"], "names the folder"),
    ],
)
def test_wrong_input_is_one_sentence(tmp_path, capsys, monkeypatch, arguments, words):
    _picture(tmp_path / "cat.png")
    (tmp_path / "cat.txt").write_text("a cat")
    given = ["--images", str(tmp_path), "--out", str(tmp_path / "o.safetensors"), *arguments]
    monkeypatch.setattr("sys.argv", ["lora", *(a.format(tmp=tmp_path) for a in given)])
    with pytest.raises(SystemExit) as caught:
        main()
    error = capsys.readouterr().err
    assert caught.value.code == 2 and words in error and error.count("\n") == 1


def test_guidance_is_an_input_of_distilled_models_only():
    plain, distilled = SimpleNamespace(guidance_embedder=None), SimpleNamespace(guidance_embedder=1)
    device = torch.device("cpu")
    assert guidance_input(plain, 3, device) == {}
    assert guidance_input(distilled, 3, device)["guidance"].tolist() == [1, 1, 1]
