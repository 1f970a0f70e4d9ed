"""Pictures carry their report, appear whole, and replace nothing unasked."""

import os
from pathlib import Path

import pytest
from PIL import Image

from autolora.errors import GenerationError
from autolora.generate.report import Output, Report, UsedAdapter, read_report


def make_output(**changes) -> Output:
    report = Report(
        prompt="a neon cat <lora:neon:0.8> 猫",
        used_prompt="a neon cat 猫",
        negative_prompt="dogs",
        model="tiny",
        strategy="gated",
        seed=7,
        steps=20,
        width=32,
        height=16,
        guidance=3.0,
        adapters=[
            UsedAdapter("neon", 0.8, "asked for", sha256="ab" * 32, layers=3, gate=0.25),
            UsedAdapter("cat", 1.0, 'title "cat" is in the prompt', score=0.91),
        ],
        notes=["Left out: x"],
        timings={"total": 1.5},
        versions={"autolora": "0.1.0"},
    )
    for name, value in changes.items():
        setattr(report, name, value)
    return Output(Image.new("RGB", (32, 16), "red"), [], report.used_prompt, report)


def test_the_report_comes_back_from_the_file(tmp_path: Path) -> None:
    output = make_output()
    path = output.save(tmp_path / "new folder" / "picture.png")
    facts = output.report.to_dict()
    del facts["timings"]  # they differ each time, and equal requests shall give equal files
    back = Report.from_dict(read_report(path)).to_dict()
    del back["timings"]
    assert back == facts
    # What an adapter does not need is not written.
    assert not any("quiet" in adapter for adapter in read_report(path)["adapters"])
    assert path.read_bytes() == output.png()
    with Image.open(path) as image:
        assert list(image.getdata()) == list(output.image.getdata())
        parameters = image.info["parameters"]
    assert parameters == output.report.a1111()


def test_files_are_replaced_only_when_asked(tmp_path: Path) -> None:
    target = tmp_path / "a.png"
    target.write_bytes(b"mine")
    names = [make_output().save(target, overwrite=False).name for _ in range(2)]
    assert names == ["a-2.png", "a-3.png"]
    assert target.read_bytes() == b"mine"
    assert make_output().save(target) == target
    assert read_report(target)["seed"] == 7
    assert sorted(os.listdir(tmp_path)) == ["a-2.png", "a-3.png", "a.png"]


def test_files_are_kept_without_hard_links_too(tmp_path: Path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    for name in ("a.png", "a-2.png"):
        assert make_output().save(tmp_path / "a.png", overwrite=False).name == name


def test_an_interrupt_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = make_output()

    def interrupt(file, **_: object) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(output.image, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        output.save(tmp_path / "a.png")
    assert os.listdir(tmp_path) == []


def test_names_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.png").mkdir()
    for path, words in (
        (tmp_path / "a.jpg", "must end in .png"),
        (tmp_path / "folder.png", "is a folder"),
        (tmp_path / "file" / "a.png", "cannot be written"),
        (tmp_path / ("n" * 300 + ".png"), "cannot be written"),
    ):
        with pytest.raises(GenerationError, match=words):
            make_output().save(path, overwrite=False)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.png"]


def test_pictures_of_others_have_no_report(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "other.png")
    (tmp_path / "text.png").write_text("no picture")
    for name, words in (("other.png", "no report"), ("text.png", "cannot be read")):
        with pytest.raises(GenerationError, match=words):
            read_report(tmp_path / name)
