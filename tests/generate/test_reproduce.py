"""Pictures are made again from their files to the byte; what differs is named."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from autolora import AutoLoRAPipeline
from autolora.config import PipelineConfig
from autolora.errors import GenerationError
from autolora.generate.picture_texts import read_texts
from autolora.generate.png import write_png
from autolora.generate.report import CHUNK
from autolora.generate.reproduce import check, compare, load_report, repeat
from autolora.lora import save_lora
from tests.conftest import random_factors


@pytest.fixture(scope="module")
def pipe(tmp_path_factory, tiny_weights: Path, make_pool) -> AutoLoRAPipeline:
    folder = tmp_path_factory.mktemp("repeat")
    make_pool(folder / "pool")
    config = PipelineConfig(
        "random",
        weights=tiny_weights,
        pool=folder / "pool",
        index=folder / "index",
        device="cpu",
        steps=2,
        width=64,
        height=64,
    )
    return AutoLoRAPipeline(config)


@pytest.fixture(scope="module")
def picture(pipe: AutoLoRAPipeline, tmp_path_factory) -> Path:
    """A picture with one adapter found by the search and one asked for."""
    output = pipe(
        "a neon, , thing <lora:elephant:0.3> at\nnight",
        7,
        guidance=2.5,
        steps=3,
        size=(96, 64),
        negative_prompt='dogs,\n"Steps: 3"',
    )
    assert [used.name for used in output.report.adapters] == ["elephant", "neon"]
    return output.save(tmp_path_factory.mktemp("pictures") / "a.png")


def test_the_same_request_gives_the_same_bytes(pipe, picture: Path, tmp_path: Path) -> None:
    again = repeat(picture, pipe)
    assert again.save(tmp_path / "b.png").read_bytes() == picture.read_bytes()
    assert again.report.timings  # though they are not in the file


def test_a_picture_of_a_batch_is_repeated_with_it(pipe, tmp_path: Path, monkeypatch) -> None:
    seeds = [4, 9, 2]
    outputs = pipe.generate_many("a neon elephant", seeds, batch=3)
    calls = []
    many = pipe.generate_many
    monkeypatch.setattr(
        pipe,
        "generate_many",
        lambda prompt, seeds, **options: (
            calls.append((list(seeds), options["batch"])) or many(prompt, seeds, **options)
        ),
    )
    for output in outputs[1:]:
        path = output.save(tmp_path / "a.png")
        assert repeat(path, pipe).png() == path.read_bytes()
    assert calls == [(seeds, 3)] * 2


@pytest.mark.parametrize(
    ("prompt", "negative"),
    [
        ('a "cat", with: colons\nSteps: 3, Seed: 4, Size: 1x1', "Steps: 3\nNegative prompt: x"),
        ("Negative prompt: a cat", ""),
        ("一只霓虹色的猫\r\n🐈 <lora:neon:0.123456789>", "🐕 \x00 \\ \u2028"),
        ("word " * 1000, "no " * 1000),
    ],
    ids=["quotes", "negative", "unicode", "5000 characters"],
)
def test_nasty_prompts_are_repeated(pipe, tmp_path: Path, prompt: str, negative: str) -> None:
    output = pipe(prompt, 3, steps=1, negative_prompt=negative, retrieve=False, loras=["rocket"])
    path = output.save(tmp_path / "a.png")
    assert repeat(path, pipe).png() == path.read_bytes()
    report = load_report(path)
    assert (report.prompt, report.negative_prompt) == (prompt, negative.strip())


def test_the_file_says_what_took_part(pipe, picture: Path) -> None:
    report = load_report(picture)
    elephant, neon = report.adapters
    assert (elephant.score, elephant.channels) == (None, {})
    assert 0 < neon.score <= 1 and neon.channels
    for used in report.adapters:
        lora = pipe.pool.load(used.name)
        assert used.sha256 == lora.sha256 and len(used.data_sha256) == 64
        assert used.layers == len(lora.layers)
    assert report.base.files["transformer"].startswith("sha256:")
    assert {"autolora", "torch", "diffsynth"} <= set(report.versions)


def changed_pool(pipe, folder: Path, **config) -> AutoLoRAPipeline:
    """A pipeline over a copy of the pool, sharing the loaded base model where that is right."""
    shutil.copytree(pipe.config.pool, folder)
    return AutoLoRAPipeline(dataclasses.replace(pipe.config, pool=folder, **config))


def test_a_missing_lora_is_named_and_never_left_out(pipe, picture, tmp_path: Path) -> None:
    other = changed_pool(pipe, tmp_path / "pool")
    for file in (tmp_path / "pool").glob("neon.*"):
        file.unlink()
    other.pool.refresh()
    for force in (False, True):
        with pytest.raises(GenerationError, match=r"has no LoRA neon \([0-9a-f]{12}\)"):
            check(load_report(picture), other, force)


def test_another_file_of_the_same_name_is_refused(pipe, picture, tmp_path, tiny_shapes) -> None:
    other = changed_pool(pipe, tmp_path / "pool")
    save_lora(tmp_path / "pool" / "neon.safetensors", random_factors(tiny_shapes, 9), "diffusers")
    report = load_report(picture)
    with pytest.raises(GenerationError, match="LoRA neon is another file") as caught:
        check(report, other)
    assert "elephant" not in str(caught.value) and "--force" in str(caught.value)
    notes = check(report, other, force=True)
    assert len(notes) == 1 and "LoRA neon is another file" in notes[0]


def test_another_base_model_is_refused(pipe, picture, tmp_path: Path) -> None:
    copy = tmp_path / "other.safetensors"
    content = bytearray(pipe.config.weights.read_bytes())
    content[-1] ^= 1
    copy.write_bytes(content)
    for changes, words in (
        ({"weights": copy}, "the base model's transformer is another file"),
        ({"storage": "float32"}, "the base model's storage is float32, was float8"),
        ({"sigma_shift": 2.0}, "sigma_shift is 2.0, was None"),
    ):
        other = AutoLoRAPipeline(dataclasses.replace(pipe.config, **changes))
        with pytest.raises(GenerationError) as caught:
            check(load_report(picture), other)
        assert words in str(caught.value)


def test_a_forced_repetition_says_so_in_its_file(pipe, picture, tmp_path: Path) -> None:
    config = dataclasses.replace(pipe.config, sigma_shift=2.0)
    other = AutoLoRAPipeline(config)
    other.__dict__["base"] = pipe.base
    output = repeat(picture, other, force=True)
    assert any("sigma_shift is 2.0" in note for note in output.report.notes)
    assert output.png() != picture.read_bytes()


def test_surroundings_are_only_noted(pipe, picture: Path) -> None:
    report = load_report(picture)
    assert compare(report, pipe) == type(compare(report, pipe))()
    report.versions = {**report.versions, "torch": "1.0"}
    report.base.device = "NVIDIA H200"
    (note,) = check(report, pipe)
    assert "torch 1.0 then" in note and "NVIDIA H200" in note


def test_what_is_attached_would_take_part(pipe, picture: Path) -> None:
    pipe.attach([("rocket", 1.0)])
    try:
        with pytest.raises(GenerationError, match="rocket would take part too"):
            repeat(picture, pipe)
    finally:
        pipe.detach()


def test_damaged_and_foreign_pictures(pipe, picture: Path, tmp_path: Path) -> None:
    from PIL import Image

    image = Image.open(picture)
    texts = read_texts(picture)
    facts = json.loads(texts[CHUNK])
    foreign = write_png(image, {"parameters": texts["parameters"]}, tmp_path / "foreign.png")
    facts["seed"] = "seven"
    damaged = write_png(image, {CHUNK: json.dumps(facts)}, tmp_path / "damaged.png")
    facts.update(seed=7, batch=[1, 2])
    astray = write_png(image, {CHUNK: json.dumps(facts)}, tmp_path / "astray.png")
    facts.update(batch=[], adapters=[{**facts["adapters"][0], "strength": 1e30}])
    absurd = write_png(image, {CHUNK: json.dumps(facts)}, tmp_path / "absurd.png")
    workflow = write_png(
        image, {"prompt": json.dumps({"1": {"class_type": "KSampler"}})}, tmp_path / "workflow.png"
    )
    for path, words in (
        (foreign, "another program"),
        (workflow, "another program"),
        (damaged, "seed is 'seven'"),
        (astray, "batch is without its seed"),
        (absurd, "strength 1e\\+30 of LoRA 'elephant' is out of range"),
    ):
        with pytest.raises(GenerationError, match=words):
            repeat(path, pipe)


def test_files_are_known_by_their_hashes(pipe, picture: Path, tmp_path: Path) -> None:
    """Renamed, moved, or with a second file of its name: the picture is the same to the byte."""
    other = changed_pool(pipe, tmp_path / "pool")
    other.__dict__["base"] = pipe.base
    folder = tmp_path / "pool"
    (folder / "sub").mkdir()
    (folder / "neon.safetensors").rename(folder / "sub" / "Something else.safetensors")
    (folder / "other").mkdir()
    (folder / "elephant.safetensors").rename(folder / "other" / "elephant.safetensors")
    shutil.copy(folder / "rocket.safetensors", folder / "sub" / "elephant.safetensors")
    other.pool.refresh()
    assert "elephant" not in other.pool and "neon" not in other.pool
    again = repeat(picture, other)
    assert again.report.to_dict() | {"timings": {}} == load_report(picture).to_dict()
    assert again.png() == picture.read_bytes()


def test_no_file_stands_for_two(pipe, picture: Path) -> None:
    report = load_report(picture)
    report.adapters[1] = dataclasses.replace(report.adapters[0], name="copy of it")
    with pytest.raises(GenerationError, match="has no LoRA copy of it"):
        check(report, pipe)


def test_brackets_that_were_read_are_read_again(pipe, tmp_path: Path) -> None:
    output = pipe(
        r"lucy \(cyberpunk\) \<a:b>", 3, steps=1, negative_prompt=r"\[x\]", loras=["rocket"]
    )
    assert output.report.used_prompt.startswith("lucy (cyberpunk) <a:b>")
    assert output.report.negative_prompt == "[x]"
    path = output.save(tmp_path / "a.png")
    assert repeat(path, pipe).png() == path.read_bytes()
