"""Configurations: every mistake is named, and relative paths count from the right place."""

from pathlib import Path

import pytest

from autolora.errors import ConfigError
from autolora.flux.config import PipelineConfig, find_config, load_config


def write(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_all_mistakes_are_named_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "kind: tiny\nstepz: 3\nwidth: wide\nportrait: {sigma: 1, noises: 2.5}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    for part in ("stepz", "did you mean steps?", "width must be a whole number, not 'wide'"):
        assert part in message
    assert "portrait.sigma " in message and "portrait.noises must be a whole number" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kind: sdxl", ["kind must be one of", "sdxl"]),
        ("storage: int4", ["storage must be one of"]),
        ("storage: bfloat16\ncompute: float32", ["bfloat16", "float32"]),
        ("steps: 0", ["steps must be between 1 and 200, not 0"]),
        ("width: 100", ["100x128", "multiples of 16"]),
        ("guidance: .nan", ["guidance"]),
        ("guidance: true", ["guidance must be a number"]),
        ("top_k: -1", ["top_k"]),
        ("portrait: {sigmas: [0.5, 2]}", ["portrait.sigmas"]),
        ("portrait: {size: 8}", ["portrait.size"]),
        ("portrait: 3", ["portrait must hold keys"]),
        ("pool: 3", ["pool must be a path"]),
        ("pool: null", ["pool must be a path"]),
        ("kind: [tiny", ["cannot be read as YAML"]),
        ("- kind", ["must hold keys and values"]),
    ],
)
def test_wrong_values(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_relative_paths_count_from_the_files_folder(tmp_path: Path) -> None:
    config = load_config(write(tmp_path / "somewhere", "pool: loras\nweights: a/b.safetensors"))
    assert config.name == "mine"
    assert config.pool == (tmp_path / "somewhere" / "loras").resolve()
    assert config.weights == (tmp_path / "somewhere" / "a" / "b.safetensors").resolve()
    assert config.encoder is None


def test_relative_paths_in_a_configs_folder_count_from_beside_it(tmp_path: Path) -> None:
    config = load_config(write(tmp_path / "configs", f"pool: loras\nindex: {tmp_path}/i"))
    assert config.pool == tmp_path.resolve() / "loras"
    assert config.index == tmp_path / "i"


def test_names_are_found_and_near_misses_suggested() -> None:
    assert find_config("tiny").name == "tiny.yaml"
    with pytest.raises(ConfigError, match=r"'tinny'.*did you mean tiny\?"):
        find_config("tinny")
    with pytest.raises(ConfigError, match=r"choose .*tiny.*, or give the path of a \.yaml file"):
        find_config("qqqq")
    with pytest.raises(ConfigError, match="no configuration file"):
        find_config("missing.yaml")


def test_another_pool_gets_an_index_of_its_own(tmp_path: Path) -> None:
    config = PipelineConfig(name="a", index=tmp_path / "index")
    one, two = config.with_pool(tmp_path / "x" / "pool"), config.with_pool(tmp_path / "y" / "pool")
    assert one.pool == tmp_path / "x" / "pool"
    assert len({config.index, one.index, two.index}) == 3
    assert one.index.parent == tmp_path
    assert one.index == config.with_pool(tmp_path / "x" / "pool").index
