"""Training from a folder: what is read, and one clear sentence for what can't be."""

import pytest
from PIL import Image

from autolora.errors import ConfigError
from train.lora import load_picture, read_folder


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
