import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from autolora.errors import LoRAFormatError, RetrievalError
from autolora.lora import LoRA, Pool
from autolora.retrieval import index as index_module
from autolora.retrieval.index import (
    PoolIndex,
    Provenance,
    build_vectors,
    choose_kind,
    common_phrases,
    current_generation,
    get_vectors,
    metadata_texts,
    readable,
    refresh_index,
    search_vectors,
    write_vectors,
)
from tests.retrieval.synthetic import WordVectors, concept_names, write_pool

NAMES = concept_names(6)
WORDS = WordVectors()
PROVENANCE = Provenance("encoder-1", WORDS.dim, WORDS.name, WORDS.dim)
Encode = Callable[[LoRA], "torch.Tensor | None"]


def unit(count: int, dim: int, seed: int) -> np.ndarray:
    x = np.random.RandomState(seed).randn(count, dim).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize(("kind", "recall"), [("flat", 1.0), ("hnsw", 0.99), ("ivf", 0.9)])
def test_search_equals_brute_force(kind: str, recall: float) -> None:
    vectors, queries = unit(800, 16, 0), unit(10, 16, 1)
    index = build_vectors(vectors, kind)  # type: ignore[arg-type]
    scores, rows = search_vectors(index, queries, 10)
    exact = queries @ vectors.T
    order = np.argsort(-exact, axis=1)[:, :10]
    shared = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(rows, order, strict=True)])
    assert shared >= recall
    np.testing.assert_allclose(scores, np.take_along_axis(exact, rows, 1), atol=1e-5)
    np.testing.assert_array_equal(get_vectors(index), vectors)
    np.testing.assert_array_equal(get_vectors(index, np.array([5, 2])), vectors[[5, 2]])


def test_more_results_than_vectors_and_wrong_lengths() -> None:
    index = build_vectors(unit(3, 4, 0))
    assert search_vectors(index, unit(2, 4, 1), 10)[1].shape == (2, 3)
    assert search_vectors(build_vectors(np.zeros((0, 4))), unit(2, 4, 1), 5)[1].shape == (2, 0)
    with pytest.raises(RetrievalError, match="query has 5 dimensions and the index 4"):
        search_vectors(index, unit(1, 5, 0), 1)
    with pytest.raises(RetrievalError, match="cannot be indexed"):
        build_vectors(np.full((1, 4), np.nan))
    assert (choose_kind(50_000), choose_kind(50_001)) == ("flat", "hnsw")


class Counter:
    """Encodes by name and remembers what it was asked for."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, lora: LoRA) -> torch.Tensor | None:
        self.names.append(lora.name)
        return WORDS.encode([lora.name])[0]


def refresh(root: Path, encode: Encode | None, provenance: Provenance = PROVENANCE, **more: bool):
    return refresh_index(root / "index", Pool(root / "pool"), provenance, WORDS, encode, **more)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "pool").mkdir()
    write_pool(tmp_path / "pool", NAMES)
    return tmp_path


def test_a_new_index_equals_what_was_encoded(root: Path) -> None:
    index, report = refresh(root, Counter())
    assert report.written and sorted(report.encoded) == sorted(NAMES)
    assert [r.name for r in index.records] == sorted(NAMES) and len(index) == 6
    opened = PoolIndex.open(root / "index", PROVENANCE)
    assert (opened.records, opened.texts) == (index.records, index.texts)
    np.testing.assert_array_equal(opened.vectors("weights"), WORDS.encode(sorted(NAMES)).numpy())
    for row, vector in zip(opened.texts, opened.vectors("texts"), strict=True):
        mean = WORDS.encode(row.pieces).mean(0)
        np.testing.assert_allclose(vector, (mean / mean.norm()).numpy(), atol=1e-6)
    query = WORDS.encode([NAMES[2]]).numpy()
    found = opened.search("weights", query, 2)[0]
    assert opened.records[found[0][0]].name == NAMES[2]


def test_only_changed_files_are_encoded_again(root: Path) -> None:
    refresh(root, Counter())
    again = Counter()
    _, report = refresh(root, again)
    assert again.names == [] and not report.written and report.kept == 6
    pool = root / "pool"
    os.utime(pool / f"{NAMES[0]}.safetensors", ns=(1, 1))  # touched
    (pool / "sub").mkdir()
    (pool / f"{NAMES[1]}.safetensors").rename(pool / "sub" / "moved.safetensors")
    (pool / f"{NAMES[2]}.safetensors").unlink()
    write_pool(pool, ["newcomer"])
    index, report = refresh(root, again)
    assert again.names == ["newcomer"] == report.encoded
    assert report.removed == sorted(f"{NAMES[i]}.safetensors" for i in (1, 2))
    moved = next(r for r in index.records if r.name == "moved")
    assert moved.vector is not None
    np.testing.assert_array_equal(
        index.vectors("weights")[moved.vector], WORDS.encode([NAMES[1]])[0].numpy()
    )


def test_copies_are_encoded_once_and_keep_their_own_words(root: Path) -> None:
    for name in ("copy_one", "copy_two"):
        copy = (root / "pool" / f"{NAMES[0]}.safetensors").read_bytes()
        (root / "pool" / f"{name}.safetensors").write_bytes(copy)
    counter = Counter()
    index, report = refresh(root, counter)
    assert len(counter.names) == 6 == len(report.encoded) and report.kept == 2
    assert len(index) == 8 and index.channel_size("weights") == 8
    own = {index.records[row.lora].name: row.text for row in index.texts if row.kind == "title"}
    assert own["copy_one"] == "copy one" and own["copy_two"] == "copy two"


def test_a_changed_sidecar_changes_the_texts_only(root: Path) -> None:
    refresh(root, Counter())
    (root / "pool" / f"{NAMES[0]}.json").write_text('{"activation text": "zigzag"}')
    again = Counter()
    WORDS.calls.clear()
    index, _ = refresh(root, again)
    assert again.names == []
    assert [row.text for row in index.texts if row.kind == "trigger"] == ["zigzag"]
    assert [text for call in WORDS.calls for text in call] == ["zigzag"]


@pytest.mark.parametrize("channel", ["weights", "texts"])
def test_rows_and_vectors_must_agree(root: Path, channel: str) -> None:
    refresh(root, Counter())
    home = root / "index"
    short = build_vectors(unit(3, WORDS.dim, 0))
    write_vectors(short, home / current_generation(home) / f"{channel}.faiss")
    with pytest.raises(RetrievalError, match="rows and vectors do not agree"):
        PoolIndex.open(home, PROVENANCE)


def test_verify_finds_a_change_that_size_and_time_hide(root: Path) -> None:
    refresh(root, Counter())
    file = root / "pool" / f"{NAMES[0]}.safetensors"
    stat = file.stat()
    raw = bytearray(file.read_bytes())
    raw[-2] ^= 1
    file.write_bytes(raw)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again = Counter()
    refresh(root, again)
    assert again.names == []
    refresh(root, again, verify=True)
    assert again.names == [NAMES[0]]


def test_bad_files_are_left_out_and_listed(root: Path) -> None:
    (root / "pool" / "broken.safetensors").write_bytes(b"not a lora")

    def encode(lora: LoRA) -> torch.Tensor | None:
        if lora.name == NAMES[0]:
            raise LoRAFormatError("It is for another base model; use one for this.")
        if lora.name == NAMES[1]:
            return torch.full((WORDS.dim,), torch.nan)
        return WORDS.encode([lora.name])[0]

    index, report = refresh(root, encode)
    assert set(report.left_out) == {"broken", NAMES[0], NAMES[1]}
    assert "another base model" in report.left_out[NAMES[0]]
    assert "not finite" in report.left_out[NAMES[1]]
    assert len(index) == 4 and {r.name for r in index.problems} == set(report.left_out)
    assert not {index.records[row.lora].name for row in index.texts} & set(report.left_out)
    # A file known to be bad is not opened again while it is unchanged.
    again = Counter()
    assert set(refresh(root, again)[1].left_out) == set(report.left_out) and again.names == []


def test_a_failure_leaves_the_index_as_it_was(root: Path) -> None:
    index, _ = refresh(root, Counter())
    before = current_generation(root / "index")
    files = sorted(p.relative_to(root) for p in (root / "index").rglob("*"))
    write_pool(root / "pool", ["newcomer"])

    def fail(lora: LoRA) -> torch.Tensor | None:
        raise KeyboardInterrupt

    def wrong_length(lora: LoRA) -> torch.Tensor | None:
        return torch.zeros(3)

    with pytest.raises(KeyboardInterrupt):
        refresh(root, fail)
    with pytest.raises(RetrievalError, match=r"shape \[3\].*expected \[24\]"):
        refresh(root, wrong_length)
    assert current_generation(root / "index") == before
    assert sorted(p.relative_to(root) for p in (root / "index").rglob("*")) == files
    assert PoolIndex.open(root / "index", PROVENANCE).records == index.records


def test_a_failure_while_writing_leaves_no_trace(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refresh(root, Counter())
    before = sorted(p.relative_to(root) for p in (root / "index").rglob("*"))
    write_pool(root / "pool", ["newcomer"])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("autolora.retrieval.index.write_vectors", full)
    with pytest.raises(RetrievalError, match="No space left"):
        refresh(root, Counter())
    assert sorted(p.relative_to(root) for p in (root / "index").rglob("*")) == before


@pytest.mark.parametrize(
    ("function", "error"),
    [("faiss.write_index", RuntimeError("fwrite")), ("sqlite3.connect", sqlite3.Error("full"))],
)
def test_what_libraries_say_of_a_full_disk_is_one_sentence(
    root: Path, monkeypatch: pytest.MonkeyPatch, function: str, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(function, fail)
    with pytest.raises(RetrievalError, match=r"cannot be written.*make room") as caught:
        refresh(root, Counter())
    assert "\n" not in str(caught.value)
    assert not [p for p in (root / "index").iterdir() if p.is_dir()]


def test_two_programs_may_build_at_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that finishes while another is still building must not clear the other's work away."""
    write = index_module.write_vectors

    def finish_another_first(*arguments: object) -> None:
        monkeypatch.setattr(index_module, "write_vectors", write)
        for _ in range(2):
            refresh(root, Counter(), rebuild=True)
        write(*arguments)

    monkeypatch.setattr(index_module, "write_vectors", finish_another_first)
    refresh(root, Counter())
    assert len(PoolIndex.open(root / "index", PROVENANCE)) == 6
    assert not list((root / "index").glob("building-*"))


def test_what_a_dead_program_left_behind_goes_after_a_day(root: Path) -> None:
    refresh(root, Counter())
    for name, age in (("building-old", 90_000), ("building-new", 10)):
        folder = root / "index" / name
        folder.mkdir()
        os.utime(folder, (time.time() - age,) * 2)
    refresh(root, Counter(), rebuild=True)
    assert [p.name for p in (root / "index").glob("building-*")] == ["building-new"]


def test_an_index_is_as_readable_as_other_files(root: Path) -> None:
    before = os.umask(0o022)
    try:
        refresh(root, Counter())
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in (root / "index").rglob("*")}
    assert {modes[name] for name in ("CURRENT", "pool.sqlite", "texts.faiss")} == {0o644}
    assert modes[current_generation(root / "index")] == 0o755


def test_another_encoder_is_refused_and_rebuilt(root: Path) -> None:
    refresh(root, Counter())
    other = Provenance("encoder-2", WORDS.dim, WORDS.name, WORDS.dim)
    with pytest.raises(RetrievalError) as caught:
        PoolIndex.open(root / "index", other)
    assert str(caught.value).endswith(
        "was made with another retriever (LoRA encoder encoder-1, now encoder-2); "
        "run autolora index --rebuild."
    )
    again = Counter()
    index, report = refresh(root, again, other)
    assert len(again.names) == 6 and "encoder-2" in report.rebuilt
    assert index.provenance == other


def test_old_generations_go_but_the_last_stays(root: Path) -> None:
    for number in range(4):
        write_pool(root / "pool", [f"newcomer{number}"])
        refresh(root, Counter())
    assert len(list((root / "index").glob("generation-*"))) == 2


def test_without_an_encoder_there_is_metadata(root: Path) -> None:
    provenance = Provenance("", 0, WORDS.name, WORDS.dim)
    index, report = refresh(root, None, provenance)
    assert report.written and index.channel_size("weights") == 0
    opened = PoolIndex.open(root / "index", provenance)
    assert opened.search("weights", unit(1, 4, 0), 3) == [[]]
    found = opened.search("texts", WORDS.encode([NAMES[3]]).numpy(), 1)[0][0]
    assert opened.records[found[0]].name == NAMES[3]


def test_without_metadata_there_are_weights(tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    write_pool(tmp_path / "pool", NAMES[:2], captions=False)
    for i, file in enumerate(sorted((tmp_path / "pool").iterdir())):
        file.rename(file.with_name(f"lora_000{i}.safetensors"))
    index, _ = refresh(tmp_path, Counter())
    assert index.texts == [] and index.channel_size("weights") == 2
    assert PoolIndex.open(tmp_path / "index", PROVENANCE).channel_size("texts") == 0


@pytest.mark.parametrize("part", ["CURRENT", "pool.sqlite", "weights.faiss", "texts.faiss"])
@pytest.mark.parametrize("damage", ["remove", "garbage"])
def test_a_damaged_index_is_named_and_rebuilt(root: Path, part: str, damage: str) -> None:
    refresh(root, Counter())
    home = root / "index"
    file = home / part if part == "CURRENT" else home / current_generation(home) / part
    file.unlink() if damage == "remove" else file.write_bytes(b"\xff\x00garbage" * 9)
    with pytest.raises(RetrievalError, match="index") as caught:
        PoolIndex.open(home, PROVENANCE)
    assert "\n" not in str(caught.value)
    assert refresh(root, Counter())[1].written
    assert len(PoolIndex.open(home, PROVENANCE)) == 6


@pytest.mark.parametrize("name", ["", "..", "/etc", "a/b", "generation-a/b", "\0", "pool"])
def test_a_pointer_to_anything_but_a_generation_is_damage(root: Path, name: str) -> None:
    (root / "index").mkdir()
    (root / "index" / "CURRENT").write_text(name)
    with pytest.raises(RetrievalError, match="is damaged"):
        current_generation(root / "index")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Neon_Sign-flux_v2", "Neon Sign"),
        ("lora_0034", ""),
        ("flux1-dev-lora-000012", ""),
        ("pixel-art", "pixel art"),
    ],
)
def test_readable_names(name: str, words: str) -> None:
    assert readable(name) == words


def test_metadata_texts_are_bounded() -> None:
    from autolora.lora import Metadata

    metadata = Metadata(title="zork", tags=[f"t{i}" for i in range(99)], captions=["a\nb", " "])
    texts = metadata_texts(metadata)
    assert texts[0] == ("title", "zork") and len(texts) == 24
    assert texts[-1] == ("captions", "a b")


def test_a_known_look_brings_its_description() -> None:
    from autolora.lora import Metadata

    texts = metadata_texts(Metadata(title="My_Neon"))
    assert texts == [("title", "My Neon")]
    looks = [text for kind, text in metadata_texts(Metadata(title="Neon_Style")) if kind == "look"]
    assert "glowing light tubes" in looks and 5 < len(looks) < 40


def test_what_most_captions_speak_of_is_a_name() -> None:
    captions = ["a garden gnome on a red background", "garden gnome, 4k", "a blue garden gnome"]
    assert common_phrases(captions) == ["garden gnome"]
    assert common_phrases(["a cat", "a dog"]) == [] == common_phrases(["a gnome"])
    assert common_phrases(["a cat in pop art style", "a dog, pop art style"]) == ["pop art"]
