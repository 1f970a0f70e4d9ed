"""Training configs: every mistake is named at once."""

from dataclasses import dataclass

import pytest

from autolora.errors import ConfigError
from train.config import read_config


@dataclass(frozen=True)
class Example:
    steps: int = 10
    lr: float = 0.1
    names: tuple[str, ...] = ()
    fast: bool = False


def test_values_are_read_and_converted(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("steps: 3\nlr: 1\nnames: [a, b]\nfast: true\n")
    assert read_config(Example, file) == Example(3, 1.0, ("a", "b"), True)
    assert read_config(Example, file, {"steps": 7, "lr": None}).steps == 7
    assert read_config(Example, None) == Example()


def test_all_mistakes_in_one_sentence(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("stepz: 3\nlr: much\nfast: 1\n")
    with pytest.raises(ConfigError) as caught:
        read_config(Example, file)
    for word in ("stepz", "lr", "fast", str(file)):
        assert word in str(caught.value)


@pytest.mark.parametrize("content", ["- 1\n- 2\n", "a: [1\n"])
def test_not_a_mapping(tmp_path, content):
    file = tmp_path / "a.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError):
        read_config(Example, file)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="no config file"):
        read_config(Example, tmp_path / "none.yaml")
