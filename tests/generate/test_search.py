"""What the vectors of an index depend on."""

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from autolora.config import PipelineConfig, load_config
from autolora.errors import GenerationError
from autolora.generate.search import PoolSearch, in_english, rank


def digest(config: PipelineConfig, sha256: str = "a", portraits: bool = True) -> str:
    search = PoolSearch(config, None, None)
    # In place of what is loaded when it is first needed.
    search.__dict__["_retriever"] = SimpleNamespace(needs_portraits=portraits, sha256=sha256, dim=4)
    search.__dict__["_text_encoder"] = SimpleNamespace(name="words", dim=3)
    return search._provenance().encoder


def test_vectors_hang_on_encoder_base_model_and_portraits(tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"x")
    config = PipelineConfig("random", weights=weights)
    first = digest(config)
    assert digest(config) == first
    assert digest(config, sha256="b") != first
    portrait = replace(config.portrait, noises=config.portrait.noises + 1)
    for changes in ({"portrait": portrait}, {"storage": "float32"}):
        assert digest(replace(config, **changes)) != first
    os.utime(weights, ns=(1, 1))
    assert digest(config) != first, "other weights of the same name"


def test_an_encoder_of_weights_alone_does_not_hang_on_the_base_model(tmp_path: Path) -> None:
    config = PipelineConfig("random", weights=tmp_path / "gone.safetensors")
    one = digest(config, portraits=False)
    assert one == digest(replace(config, storage="float32"), portraits=False)
    assert one != digest(config, portraits=True)


def test_copies_of_one_file_take_one_place() -> None:
    """Three files, two of them with the same bytes, found in the order of their scores."""
    hits = [SimpleNamespace(name=name) for name in ("a", "copy of a", "b", "c")]
    records = [
        SimpleNamespace(name=name, sha256=sha)
        for name, sha in (("c", ""), ("b", "22"), ("a", "11"), ("copy of a", "11"), ("d", "22"))
    ]
    searcher = SimpleNamespace(
        search=lambda prompt, k: hits[:k], index=SimpleNamespace(records=records)
    )
    assert [hit.name for hit in rank(searcher, "a", 5)] == ["a", "b", "c"]
    assert [hit.name for hit in rank(searcher, "a", 2)] == ["a", "b"]


def test_prompts_of_other_languages_are_read_in_english_by_the_embedded_model() -> None:
    notes: list[str] = []
    tiny, flux = load_config("tiny"), load_config("flux1-dev")
    assert in_english(tiny, "eine Katze ohne Neon", notes) == "cat, without neon" and not notes
    assert in_english(tiny, "a cat, 8k", notes) == "a cat, 8k"
    assert in_english(flux, "eine Katze", notes) == "eine Katze" and not notes
    assert in_english(tiny, "eine Katze mit Schnurrbarthaaren", notes) == "cat"
    assert notes == ["Nicht verstanden: schnurrbarthaaren."]
    with pytest.raises(GenerationError, match="\uc774\ud574"):
        in_english(tiny, "\ubdc1\ubdc1", notes)
