"""Configurations: every mistake is named, and relative paths count from the right place."""

from pathlib import Path

import pytest

from autolora.config import PipelineConfig, find_config, load_config, rounded_size
from autolora.errors import ConfigError


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
        ("kind: sd9", ["kind must be one of", "sd9"]),
        ("storage: int4", ["storage must be one of"]),
        ("storage: bfloat16\ncompute: float32", ["bfloat16", "float32"]),
        ("steps: 0", ["steps must be between 1 and 200, not 0"]),
        ("width: 40", ["40x128", "between 64 and 2048"]),
        ("guidance: .nan", ["guidance"]),
        ("guidance: true", ["guidance must be a number"]),
        ("top_k: -1", ["top_k"]),
        ("portrait: {sigmas: [0.5, 2]}", ["portrait.sigmas"]),
        ("portrait: {size: 8}", ["portrait.size"]),
        ("portrait: 3", ["portrait must hold keys"]),
        ("pool: 3", ["pool must be a path"]),
        ("pool: null", ["pool must be a path"]),
        ("storage: nf4", ["nf4 is for full-size models"]),
        ("kind: flux1\nstorage: nf4\nmemory: {offload: layers}", ["memory.offload none or parts"]),
        (
            "memory: {offload: some, text_storage: x}",
            ["memory.offload must", "memory.text_storage"],
        ),
        (
            "memory: {offload: parts, vram_limit: 8}",
            ["vram_limit belongs to memory.offload layers"],
        ),
        ("memory: {vram_limit: -1}", ["memory.vram_limit must be a positive number"]),
        ("memory: {vram: 3}", ["unknown key memory.vram"]),
        ("checkpoint: {source: ftp}", ["checkpoint.source must be one of"]),
        ("checkpoint: {download: 1}", ["checkpoint.download must be true or false, not 1"]),
        ("checkpoint: {bass: x}", ["unknown key checkpoint.bass", "mean checkpoint.base?"]),
        ("text: clip", ["kind tiny has no CLIP"]),
        ("text: bert", ["text must be one of"]),  # a model of one's own has a slash in it
        ("true_cfg: -1", ["true_cfg must be a number"]),
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


def test_parts_of_a_checkpoint_are_paths_where_something_is_there(tmp_path: Path) -> None:
    (tmp_path / "o" / "there").mkdir(parents=True)
    text = """
checkpoint:
  base: o/there
  transformer: o/n:flux.safetensors
  vae: o/n
  text_encoder: ./clip
  tokenizer: ~/t
"""
    found = load_config(write(tmp_path, text)).checkpoint
    assert found.base == str(tmp_path.resolve() / "o" / "there")
    assert (found.transformer, found.vae) == ("o/n:flux.safetensors", "o/n")
    assert found.text_encoder == str(tmp_path.resolve() / "clip")
    assert found.tokenizer == str(Path("~/t").expanduser())
    assert found.folder == tmp_path.resolve() / "models" and found.text_encoder_2 is None


def test_sizes_are_rounded_up() -> None:
    assert rounded_size(64, 64) == (64, 64)
    assert rounded_size(65, 2047) == (80, 2048)


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


@pytest.mark.parametrize(
    "text",
    [
        "steps: " + "9" * 400,
        "steps: " + "9" * 5000,
        "pool: " + "[" * 3000,
        "loras: " + "[" * 3000 + "]" * 3000,
        "loras: &a [*a]",
        "adapters: &a {cache_gb: *a}",
        "guidance: 1e999",
    ],
    ids=lambda text: text[:12],
)
def test_numbers_and_depths_without_end_are_a_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"kind: tiny\n{text}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800
