"""Training configs: every mistake is named at once."""

from dataclasses import dataclass, field

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


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"- 1\n- 2\n", "key: value"),
        (b"a: [1\n", "cannot be read"),
        (b"a: \xff\n", "cannot be read"),
    ],
)
def test_not_a_mapping(tmp_path, content, words):
    file = tmp_path / "a.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as caught:
        read_config(Example, file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("steps: 3.7", "steps must be int, not 3.7"),
        ("steps: true", "steps must be int, not True"),
        ("steps: null", "steps must be int, not None"),
        ("names: abc", "names must be tuple"),
        ("names: [a, 1]", r"names\[1\] must be str, not 1"),
        ("fast: 1", "fast must be bool, not 1"),
        ("lr: much", "lr must be float, not 'much'"),
        ("3: 4", "unknown key '3'"),
    ],
)
def test_values_are_not_bent_into_the_type(tmp_path, line, words):
    file = tmp_path / "a.yaml"
    file.write_text(line)
    with pytest.raises(ConfigError, match=words):
        read_config(Example, file)


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Example = field(default_factory=Example)


def test_required_and_nested_fields(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("name: x\ninner: {steps: 3, lr: 1e-3}\n")
    assert read_config(Outer, file) == Outer("x", Example(3, 0.001))
    file.write_text("inner: {stepz: 3, lr: []}\n")
    with pytest.raises(ConfigError) as caught:
        read_config(Outer, file)
    for words in ("missing key 'name'", "unknown key 'inner.stepz'", "inner.lr must be float"):
        assert words in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="no config file"):
        read_config(Example, tmp_path / "none.yaml")
