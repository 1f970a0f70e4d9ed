"""Styles: read, broken, changed while the console runs, saved."""

import os
from pathlib import Path

import pytest

from autolora.errors import ConfigError
from autolora.styles import Style, Styles, read_style, shipped_styles
from autolora.unit import LoRAUnit


def write(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_shipped_styles_can_all_be_used_with_the_shipped_pool() -> None:
    pool = shipped_styles().parents[1] / "lora_pool" / "tiny"
    styles = Styles([shipped_styles()], Path("nowhere")).all()
    assert styles[0].name == "base" and len(styles) >= 6
    for style in styles:
        assert not style.problem and {"en", "zh"} <= set(style.title)
        assert all(
            (pool / f"{name}.safetensors").is_file() for name in (unit.name for unit in style.loras)
        )


def test_a_changed_file_is_seen_at_once(tmp_path: Path) -> None:
    styles = Styles([tmp_path / "shipped"], tmp_path / "own")
    assert [style.name for style in styles.all()] == ["base"]
    write(tmp_path / "own", "ink", "prompt: '{prompt}, ink'\nadapters: [woodcut]\n")
    assert styles.get("ink").fill("a cat") == "a cat, ink"
    write(tmp_path / "own", "ink", "prompt: '{prompt} in blue ink, with much water'\n")
    assert styles.get("ink").fill("a cat") == "a cat in blue ink, with much water"
    write(tmp_path / "own", "a-wash", "prompt: much water\n")
    assert styles.get("a-wash").fill("a cat") == "a cat, much water"
    assert [style.name for style in styles.all()] == ["base", "a-wash", "ink"]
    (tmp_path / "own" / "ink.yaml").unlink()
    with pytest.raises(ConfigError, match=r"no style 'ink'; choose a-wash, base"):
        styles.get("ink")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a list", "keys and values"),
        ("propmt: x", "unknown key propmt"),
        ("prompt: [1]", "prompt must be text"),
        ("prompt: " + "x" * 2001, "at most 2000"),
        ("adapters: neon", "must be a list"),
        ("adapters: [{nmae: neon}]", "did you mean adapters[0].name?"),
        ("adapters: [neon, neon:1]", "given twice"),
        ("adapters: [{name: neon, steps: 9-3}]", "adapters[0].steps must go up"),
        ("adapters: [{name: neon, strength: much}]", "not a number"),
        ("adapters: [{name: neon, strength: 99}]", "out of range"),
        ("a: [1", "cannot be read"),
        ("title: \x00", "cannot be read"),
        ("x" * 70_000, "too large"),
    ],
)
def test_a_broken_file_says_why_and_harms_nobody(tmp_path: Path, text, message) -> None:
    file = write(tmp_path, "bad", text)
    write(tmp_path, "good", "adapters: [{name: neon, strength: 0.5}, rose]\n")
    style = read_style(file)
    assert message in style.problem and "bad.yaml" in style.problem and "\n" not in style.problem
    styles = Styles([tmp_path], tmp_path / "own")
    assert styles.get("good").loras == (LoRAUnit("neon", 0.5), LoRAUnit("rose"))
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        styles.get("bad")


def test_saving_and_reading_back(tmp_path: Path) -> None:
    styles = Styles([], tmp_path / "own")
    title = {"en": "Über: ink #1", "zh": "墨"}
    adapters = (LoRAUnit("woodcut", 0.5, steps=(1, 4)), LoRAUnit("rose", -1.0))
    style = Style("ink", title, "{prompt}, ink", "colour", adapters, "sum", False, saved=True)
    file = styles.save(style)
    assert styles.get("ink") == style and file.read_text(encoding="utf-8").startswith("#")
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["ink.yaml"]
    with pytest.raises(ConfigError, match="already"):
        styles.save(style)
    styles.save(Style("ink", title), overwrite=True)
    assert styles.get("ink").loras == ()


def test_nothing_half_written_is_left_of_a_style(tmp_path: Path, monkeypatch) -> None:
    def full(*_) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(ConfigError, match="cannot be written"):
        Styles([], tmp_path / "own").save(Style("ink"))
    assert list((tmp_path / "own").iterdir()) == []


@pytest.mark.parametrize("name", ["", "../ink", "a/b", ".ink", "a b", "x" * 60, "base", "a\x00b"])
def test_names_that_are_no_file_names_are_refused(tmp_path: Path, name) -> None:
    with pytest.raises(ConfigError):
        Styles([], tmp_path / "own").save(Style(name))
    assert not list(tmp_path.rglob("*.yaml"))


def test_a_pipe_among_styles_is_said_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "deep.yaml").write_text("title: " + "[" * 3000)
    (tmp_path / "long.yaml").write_text("title: x\nstrategy: " + "9" * 5000)
    by_name = {style.name: style for style in Styles([tmp_path], tmp_path / "own").all()}
    assert "no file" in by_name["pipe"].problem
    assert "cannot be read" in by_name["deep"].problem
    assert "cannot be read" in by_name["long"].problem
