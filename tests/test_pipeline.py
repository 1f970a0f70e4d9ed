"""The whole chain on a random tiny model and a small pool."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from autolora import AutoLoRAPipeline, LoRA
from autolora.config import PipelineConfig
from autolora.errors import (
    AutoLoRAError,
    FusionError,
    GenerationError,
    LoRAFormatError,
    PoolError,
)
from autolora.fusion import Gate, GateBank, attached_layers, save_gates
from autolora.generate.report import read_report
from autolora.lora import save_lora
from autolora.request import MAX_SEED
from tests.conftest import random_factors


@pytest.fixture(scope="module")
def pipe(tmp_path_factory, tiny_weights: Path, make_pool) -> AutoLoRAPipeline:
    folder = tmp_path_factory.mktemp("pipeline")
    make_pool(folder / "pool")
    (folder / "pool" / "broken.safetensors").write_bytes(b"\x00" * 30)
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


@pytest.fixture(autouse=True)
def nothing_stays_attached(pipe: AutoLoRAPipeline):
    yield
    pipe.detach()


def pixels(output) -> bytes:
    return np.asarray(output.image).tobytes()


def weights(pipe: AutoLoRAPipeline) -> dict[str, bytes]:
    state = pipe.base.dit.state_dict()
    return {name: t.view(torch.uint8).numpy().tobytes() for name, t in state.items()}


def names(output) -> list[str]:
    return [used.name for used in output.report.adapters]


def test_a_prompt_finds_its_adapters_and_says_why(pipe) -> None:
    output = pipe("a neon elephant on a blue background", seed=4)
    assert {hit.name for hit in output.hits} == {"neon", "elephant"} == set(names(output))
    for used in output.report.adapters:
        assert used.why and 0.5 < used.score <= 1 and used.layers == 16 and len(used.sha256) == 64
    strengths = {used.name: used.strength for used in output.report.adapters}
    assert strengths == {"neon": 0.7, "elephant": 1.0}  # what the style's author recommends
    assert output.image.size == (64, 64)
    assert output.report.seed == 4 and output.report.steps == 2
    assert output.prompt == "a neon elephant on a blue background, elphnt animal"
    timings = output.report.timings
    parts = ("retrieve", "load", "attach", "encode", "denoise", "decode")
    assert sum(timings[part] for part in parts) == pytest.approx(timings["total"], rel=0.05)
    assert {"autolora", "diffsynth", "torch"} <= set(output.report.versions)


def test_nothing_is_taken_when_nothing_fits(pipe) -> None:
    output = pipe("a quarterly tax report")
    assert output.hits == [] and names(output) == []
    assert pixels(output) == pixels(pipe("a quarterly tax report", retrieve=False))


def test_a_bad_file_is_left_out_and_named(pipe) -> None:
    notes = " ".join(pipe("a rocket").report.notes)
    assert "broken.safetensors" in notes
    assert "broken" not in [hit.name for hit in pipe.search("broken", k=10)]


def test_search_ranks_and_ignores_tags(pipe) -> None:
    hits = pipe.search("a neon thing <lora:rocket:1>", k=2)
    assert hits[0].name == "neon" and hits[0].score > hits[1].score
    assert pipe.search("<lora:rocket>", k=1)[0].name == "rocket"


def test_asked_adapters_are_taken_as_asked_and_retrieval_fills_the_rest(pipe) -> None:
    output = pipe("a neon picture <lora:rocket:-0.4>")
    assert [(used.name, used.strength) for used in output.report.adapters] == [
        ("rocket", -0.4),
        ("neon", 0.7),
    ]
    assert output.report.adapters[0].why == "asked for"
    assert output.prompt == "a neon picture"
    assert names(pipe("a neon picture <lora:rocket:1>", top_k=1)) == ["rocket"]
    assert names(pipe("a neon picture", loras=["rocket"], retrieve=False)) == ["rocket"]
    both = pipe("x <lora:rocket:0.5>", loras=[("rocket", 1.0)], retrieve=False)
    assert both.report.adapters[0].strength == 0.5
    assert names(pipe("a neon elephant", top_k=0)) == []


def test_trigger_words_can_be_left_out(pipe) -> None:
    assert pipe("an elephant", use_triggers=False).prompt == "an elephant"
    assert pipe("an elephant").prompt == "an elephant, elphnt animal"
    assert pipe("an Elphnt Animal").prompt == "an Elphnt Animal"


def test_attachments_are_afterwards_as_before_and_bytes_are_the_same(pipe) -> None:
    before, state = pixels(pipe("a red cat", seed=1, retrieve=False)), weights(pipe)
    pipe.attach([("elephant", 0.8), ("neon", 1.0)], strategy="sum")
    layers = attached_layers(pipe.base.dit)
    changed = pixels(pipe("a red cat", seed=1))
    assert changed != before
    pipe("a red cat <lora:rocket:1>", seed=1)
    assert attached_layers(pipe.base.dit) == layers, "the very same objects"
    assert pixels(pipe("a red cat", seed=1)) == changed
    pipe.detach()
    assert not attached_layers(pipe.base.dit)
    assert weights(pipe) == state
    assert pixels(pipe("a red cat", seed=1, retrieve=False)) == before


def test_attached_adapters_stay_in_force_beside_what_is_asked_for(pipe) -> None:
    pipe.attach([("elephant", 0.8)], strategy="sum")
    output = pipe("a neon thing <lora:rocket:0.5>")
    strengths = [(used.name, used.strength, used.why) for used in output.report.adapters]
    assert strengths == [("elephant", 0.8, "attached"), ("rocket", 0.5, "asked for")]
    assert output.report.strategy == "sum"
    replaced = pipe("a thing <lora:elephant:0.2>").report.adapters
    assert [(used.name, used.strength) for used in replaced] == [("elephant", 0.2)]


def test_attachments_are_restored_after_an_interrupt(pipe) -> None:
    pipe.attach([("elephant", 0.8)])
    layers = attached_layers(pipe.base.dit)

    def interrupt(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe("a cat <lora:rocket:1>", progress=interrupt)
    assert attached_layers(pipe.base.dit) == layers


def test_a_failed_attach_changes_nothing(pipe, tiny_shapes) -> None:
    pipe.attach([("elephant", 0.8)])
    layers = attached_layers(pipe.base.dit)
    wide = {name: (2 * out, inner) for name, (out, inner) in tiny_shapes.items()}
    other = LoRA.from_factors("other", random_factors(wide, 0))
    with pytest.raises(LoRAFormatError, match="another base model"):
        pipe.attach([(other, 1.0)])
    with pytest.raises(PoolError, match="did you mean neon"):
        pipe.attach([("neom", 1.0)])
    assert attached_layers(pipe.base.dit) == layers


def test_the_order_of_asking_does_not_matter(pipe) -> None:
    one = pipe("x <lora:rocket:1> <lora:neon:0.3> <lora:elephant:1>", use_triggers=False)
    two = pipe("x <lora:elephant:1> <lora:rocket:1> <lora:neon:0.3>", use_triggers=False)
    assert pixels(one) == pixels(two)


def test_seeds_reproduce_and_differ(pipe) -> None:
    one, again, two = (pipe("a rocket", seed=seed) for seed in (1, 1, 2))
    assert pixels(one) == pixels(again) != pixels(two)


def test_a_report_is_enough_to_make_the_picture_again(pipe, tmp_path: Path) -> None:
    first = pipe("a neon elephant", seed=9, steps=3, size=(96, 64), guidance=2.0)
    report = read_report(first.save(tmp_path / "first.png"))
    again = pipe(
        report["used_prompt"],
        report["seed"],
        loras=[(used["name"], used["strength"]) for used in report["adapters"]],
        retrieve=False,
        strategy=report["strategy"],
        steps=report["steps"],
        size=(report["width"], report["height"]),
        guidance=report["guidance"],
        negative_prompt=report["negative_prompt"],
    )
    assert pixels(again) == pixels(first)
    assert again.image.size == (96, 64)


def test_progress_and_plan_are_told(pipe) -> None:
    steps, plans = [], []
    pipe("a rocket", progress=lambda *step: steps.append(step), planned=plans.append)
    assert steps == [(0, 2), (1, 2), (2, 2)]
    assert [used.name for used in plans[0].adapters] == ["rocket"]


def test_gates_act_and_are_reported(pipe, tiny_shapes, tmp_path: Path) -> None:
    shapes = {layer: shape for layer, shape in tiny_shapes.items() if "blocks." in layer}
    bank = GateBank.neutral(shapes)
    summed = pixels(pipe("a rocket", strategy="sum"))
    for _, gate in bank.items():
        gate.bias.data.fill_(-20.0)  # closed
    save_gates(bank, tmp_path / "gates.safetensors")
    config = PipelineConfig(**{**vars(pipe.config), "gate": tmp_path / "gates.safetensors"})
    gated = AutoLoRAPipeline(config)
    gated.__dict__["base"] = pipe.base
    output = gated("a rocket")
    assert output.report.adapters[0].gate == pytest.approx(0, abs=1e-4)
    assert pixels(output) != summed
    np.testing.assert_allclose(
        np.asarray(output.image, float),
        np.asarray(pipe("a rocket", retrieve=False).image, float),
        atol=1,
    )
    assert pipe("a rocket").report.adapters[0].gate is None
    assert any("no trained gates" in note for note in pipe("a rocket").report.notes)
    assert isinstance(Gate.neutral(4), torch.nn.Module)


def test_an_index_that_is_up_to_date_needs_no_base_model(pipe, monkeypatch) -> None:
    pipe.search("a rocket")
    fresh = AutoLoRAPipeline(pipe.config)

    def fail(_: object) -> None:
        raise AssertionError("the base model was loaded")

    monkeypatch.setattr("autolora.families.load.load_pipeline", fail)
    assert fresh.search("a rocket", k=1)[0].name == "rocket"
    assert fresh.choose("a rocket")[0].name == "rocket"


def test_new_files_are_found_without_a_restart(pipe, tiny_shapes) -> None:
    path = pipe.config.pool / "submarine.safetensors"
    save_lora(path, random_factors(tiny_shapes, 8))
    assert pipe.search("a submarine", k=1)[0].name == "submarine"
    path.unlink()
    assert "submarine" not in [hit.name for hit in pipe.search("a submarine", k=9)]


def test_an_adapter_for_another_model_is_left_out_or_refused(pipe, tiny_shapes) -> None:
    path = pipe.config.pool / "giant.safetensors"
    wide = {name: (2 * out, 2 * inner) for name, (out, inner) in tiny_shapes.items()}
    save_lora(path, random_factors(wide, 8))
    try:
        output = pipe("a giant")
        assert names(output) == []
        assert any("giant" in note and "another base model" in note for note in output.report.notes)
        with pytest.raises(LoRAFormatError, match="another base model"):
            pipe("a giant <lora:giant:1>")
    finally:
        path.unlink()


class PortraitEncoder:
    """Stands in for a trained encoder: the mean of a portrait's channels, as a unit vector."""

    needs_portraits = True
    calibrated = False
    dim = 16
    sha256 = "0" * 64
    spec = SimpleNamespace(text_encoder="")

    def __init__(self) -> None:
        self.portraits: dict[str, torch.Tensor] = {}

    def encode(self, lora: LoRA, portrait: torch.Tensor) -> torch.Tensor:
        self.portraits[lora.name] = portrait
        return torch.nn.functional.normalize(portrait.mean((0, 1, 3, 4)), dim=0)

    def encode_text(self, text: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(text[:, :16], dim=1)


def test_portraits_reach_the_encoder_whatever_is_attached(pipe, tmp_path: Path) -> None:
    taken = []
    for attached in ([], [("neon", 1.0)]):
        config = PipelineConfig(**{**vars(pipe.config), "index": tmp_path / f"i{len(taken)}"})
        other = AutoLoRAPipeline(config)
        other.__dict__["base"] = pipe.base
        encoder = PortraitEncoder()
        other._search.__dict__["_retriever"] = encoder
        other.attach(attached, strategy="sum")
        assert other.index().size == 3
        assert other.search("a rocket", k=3)
        assert set(encoder.portraits) == {"elephant", "neon", "rocket"}
        taken.append(encoder.portraits)
        other.detach()
    for name, portrait in taken[0].items():
        assert portrait.abs().mean() > 1e-3
        assert torch.equal(portrait, taken[1][name])


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"prompt": " "}, GenerationError, "prompt is empty"),
        ({"prompt": "<lora:neon:1>", "use_triggers": False}, GenerationError, "nothing but"),
        ({"steps": 0}, GenerationError, "Steps must be between"),
        ({"steps": 201}, GenerationError, "Steps must be between"),
        ({"size": (40, 64)}, GenerationError, "between 64 and 2048"),
        ({"size": (64, 4096)}, GenerationError, "between 64 and 2048"),
        ({"guidance": float("nan")}, GenerationError, "Guidance"),
        ({"seed": -1}, GenerationError, "Seed"),
        ({"seed": MAX_SEED + 1}, GenerationError, "Seed"),
        ({"top_k": 99}, GenerationError, "Top_k"),
        ({"loras": ["elefant"]}, PoolError, "did you mean elephant"),
        ({"loras": [("neon", float("inf"))]}, GenerationError, "out of range"),
        ({"loras": ["broken"]}, LoRAFormatError, "broken"),
        ({"strategy": "magic"}, FusionError, "magic"),
    ],
)
def test_impossible_requests(pipe, arguments: dict, error: type, words: str) -> None:
    prompt = arguments.pop("prompt", "a cat")
    with pytest.raises(error, match=words) as caught:
        pipe(prompt, **arguments)
    assert isinstance(caught.value, AutoLoRAError) and "\n" not in str(caught.value)
    assert not attached_layers(pipe.base.dit)
