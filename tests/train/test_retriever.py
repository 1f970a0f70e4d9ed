import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from autolora.errors import ConfigError
from autolora.retrieval.retriever import Retriever
from tests.retrieval.synthetic import (
    WordVectors,
    concept_names,
    read_activations,
    write_pool,
    write_portraits,
)
from train.retrieval.config import RetrieverTrainConfig, load_config
from train.retrieval.data import load_data, split_concepts
from train.retriever import main, train

NAMES = concept_names(80)
TEXT_LAYER = "blocks.0.attn.b_to_qkv"


def activate(base_model: str, texts: Sequence[str], layers: Sequence[str]) -> dict[str, Tensor]:
    """The activations that the synthetic LoRAs' text-side layer reads."""
    assert base_model == "tiny" and list(layers) == [TEXT_LAYER]
    return {TEXT_LAYER: read_activations(TEXT_LAYER, WordVectors().encode(list(texts)))}


SMALL = {
    "steps": 40,
    "batch": 32,
    "width": 32,
    "evaluate_every": 20,
    "paper_steps": 20,
    "paper_width": 64,
    "probes": 8,
    "sketch": 4,
    "portrait_grid": 4,
    "dim": 24,
    "ridges": (0.1, 1.0),
    "response_steps": 30,
    "response_directions": 16,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    (root / "pool").mkdir()
    write_pool(root / "pool", NAMES)
    write_portraits(root / "portraits.safetensors", NAMES)
    return root


def config(world: Path, **changes: object) -> RetrieverTrainConfig:
    values = {
        "pool": str(world / "pool"),
        "portraits": str(world / "portraits.safetensors"),
        "out": str(world / "out" / "retriever.safetensors"),
    }
    return RetrieverTrainConfig(**{**values, **SMALL, **changes})  # type: ignore[arg-type]


def test_it_learns_what_carries_over_to_unseen_loras(world: Path) -> None:
    lines: list[str] = []
    result = train(config(world), WordVectors(), lines.append, activate)
    assert json.loads(lines[-1]) == result
    unseen = {name: parts["never seen"] for name, parts in result["numbers"].items()}
    ours, chance = unseen["ours, joined"], unseen["chance"]
    assert ours["recall"]["1"] > 4 * chance["recall"]["1"]
    assert ours["mrr"] > unseen["paper's encoder"]["mrr"]
    assert unseen["ours, responses"]["recall"]["1"] > 4 * chance["recall"]["1"]
    assert unseen["metadata text alone"]["recall"]["1"] == 1.0
    retriever = Retriever.load(result["out"])
    assert retriever.calibrated and retriever.spec.text_encoder == WordVectors.name
    provenance = retriever.spec.provenance
    assert provenance["metrics"] == result["numbers"]
    assert provenance["portraits"] == {"sigmas": "[1.0, 0.7]"}
    assert str(world) not in json.dumps(provenance)


def test_the_same_seed_gives_the_same_file(world: Path) -> None:
    settings = config(world, families=("weights", "responses"), paper_steps=0, steps=20)
    hashes = []
    for _ in range(2):
        train(settings, WordVectors(), lambda line: None, activate)
        hashes.append(Retriever.load(settings.out).sha256)
    assert hashes[0] == hashes[1]


def test_splits_share_no_concept_and_do_not_depend_on_the_others(world: Path) -> None:
    settings = config(world)
    concepts = torch.arange(80).repeat(2)
    split = split_concepts(concepts, NAMES, settings)
    parts = [set(concepts[rows].tolist()) for rows in (split.fit, split.validation, split.test)]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    assert sum(map(len, parts)) == 80 and 5 <= len(parts[2]) <= 28
    fewer = split_concepts(torch.arange(40), NAMES[:40], settings)
    assert set(fewer.test.tolist()) == {i for i in parts[2] if i < 40}


def test_loras_without_captions_or_with_bad_files_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    write_pool(tmp_path / "pool", NAMES[:12])
    write_pool(tmp_path / "pool", NAMES[12:13], captions=False)
    (tmp_path / "pool" / f"{NAMES[0]}.safetensors").write_bytes(b"broken")
    data = load_data(config(tmp_path, portraits=""), WordVectors())
    assert len(data) == 11 and set(data.skipped) == {NAMES[0], NAMES[12]}
    assert data.skipped[NAMES[12]] == "no captions"
    assert len(data.text) == 66 and data.owners.bincount().tolist() == [6] * 11


def test_all_wrong_settings_are_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("pool: p\nstpes: 3\nbatch: many\nridges: 1\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    for words in (
        "unknown key 'stpes'",
        "batch must be int",
        "ridges must be",
        "missing key 'out'",
    ):
        assert words in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        RetrieverTrainConfig("p", "o", test_share=2, batch=0, width=30, families=("x",))
    for words in ("test_share", "batch", "width 30", "families"):
        assert words in str(caught.value)


def test_the_shipped_configuration_loads() -> None:
    path = Path(__file__).parents[2] / "configs" / "train" / "retriever.yaml"
    assert load_config(path, {"steps": 5}).steps == 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "{tmp}/none.yaml"], "cannot be read"),
        (["--config", "{tmp}/c.yaml"], "does not exist"),
        (["--config", "{tmp}/c.yaml", "--set", "steps"], "KEY=VALUE"),
        (["--config", "{tmp}/c.yaml", "--set", "pool={tmp}/few"], "Only 2 of 2 LoRAs"),
    ],
)
def test_wrong_input_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    (tmp_path / "c.yaml").write_text(f"pool: {tmp_path}/missing\nout: {tmp_path}/o\n")
    (tmp_path / "few").mkdir()
    write_pool(tmp_path / "few", NAMES[:2])
    assert main([a.format(tmp=tmp_path) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1
