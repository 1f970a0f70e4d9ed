import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from autolora.errors import ConfigError
from autolora.lora import LoRA
from autolora.retrieval.retriever import Retriever
from tests.retrieval.synthetic import (
    WordVectors,
    concept_names,
    read_activations,
    write_pool,
    write_portraits,
)
from train.retrieval.config import RetrieverTrainConfig, load_config
from train.retrieval.data import load_data, make_features, split_concepts
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


def test_newcomers_are_chosen_by_an_encoder_that_learned_no_pairs(
    world: Path, tmp_path: Path
) -> None:
    """Extending keeps the encoders as they are; both ways write the same encoder of newcomers."""
    settings = config(world, portraits="", families=("weights",), paper_steps=0, steps=20)
    out = str(tmp_path / "extended.safetensors")
    train(settings, WordVectors(), lambda line: None, activate)
    before = Retriever.load(settings.out)
    assert before.spec.newcomers is None
    extending = config(world, extend=settings.out, out=out)
    for _ in range(2):  # the second time in place of the first one's
        result = train(extending, WordVectors(), lambda line: None, activate)
        extending = replace(extending, extend=out)
    after = Retriever.load(out)
    assert after.dim == before.dim + after.members[-1].dim and sum(after.spec.weights) == 1
    pool = sorted((world / "pool").glob("*.safetensors"))
    loras = [LoRA.load(path) for path in pool[:6]]
    for lora in loras:
        joined, plain = after.encode(lora), before.encode(lora)
        assert joined is not None and plain is not None
        torch.testing.assert_close(joined[: before.dim] * 2**0.5, plain)
    numbers = result["numbers"]
    unseen, chance = (numbers[n]["never seen"] for n in ("the encoder of newcomers", "chance"))
    assert unseen["recall"]["1"] > 4 * chance["recall"]["1"]
    assert after.spec.newcomers is not None
    assert result["calibration"] == after.spec.newcomers.to_dict()


def test_words_of_the_test_part_and_reserved_words_are_left_out(world: Path) -> None:
    class WithWords(WordVectors):
        def words(self, count: int) -> list[str]:
            return [NAMES[i] for i in range(60)] + ["unrelated"]

    asked: list[str] = []

    def listen(base: str, texts: Sequence[str], layers: Sequence[str]) -> dict[str, Tensor]:
        asked.extend(texts)
        return activate(base, texts, layers)

    settings = config(world, families=("responses",), portraits="")
    encoder = WithWords()
    data = load_data(settings, encoder)
    split = split_concepts(data.concepts, data.concept_names, settings)
    make_features(data, split.seen, settings, encoder, listen)
    unseen = {data.concept_names[i] for i in data.concepts[split.test].tolist()}
    assert unseen & set(NAMES[:60]) and "unrelated" in asked
    assert not [text for text in asked if set(text.split()) & unseen]


def test_splits_share_no_concept_and_do_not_depend_on_the_others(world: Path) -> None:
    settings = config(world)
    concepts = torch.arange(80).repeat(2)
    split = split_concepts(concepts, NAMES, settings)
    parts = [set(concepts[rows].tolist()) for rows in (split.fit, split.validation, split.test)]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    assert sum(map(len, parts)) == 80 and 5 <= len(parts[2]) <= 28
    assert 0 < len(parts[1]) < len(parts[0]) / 2
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
        "ridges must be tuple",
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
        (["--config", "{tmp}/none.yaml"], "no config file"),
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
