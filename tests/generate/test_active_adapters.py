"""What stays attached acts only where just that is wanted; the order of asking changes nothing."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from autolora.config import PipelineConfig
from autolora.errors import GenerationError, PoolError
from autolora.pipeline import AutoLoRAPipeline
from autolora.unit import LoRAUnit, acts_in

NAMES = ("elephant", "neon", "rocket")


@pytest.fixture(scope="module")
def pipe(tmp_path_factory, tiny_weights: Path, make_pool) -> AutoLoRAPipeline:
    folder = tmp_path_factory.mktemp("applying")
    config = PipelineConfig(
        "random",
        weights=tiny_weights,
        pool=make_pool(folder / "pool"),
        index=folder / "index",
        strategy="sum",
        device="cpu",
        steps=1,
        width=64,
        height=64,
    )
    return AutoLoRAPipeline(config)


def draw(pipe: AutoLoRAPipeline, **options) -> bytes:
    return pipe("a cat", 3, retrieve=False, use_triggers=False, **options).image.tobytes()


def test_the_order_of_asking_does_not_change_a_byte(pipe) -> None:
    pairs = [(name, 0.7 + number) for number, name in enumerate(NAMES)]
    first = draw(pipe, loras=pairs)
    assert draw(pipe, loras=pairs[::-1]) == draw(pipe, loras=pairs[1:] + pairs[:1]) == first
    pipe.attach(pairs[::-1])
    try:
        assert draw(pipe) == first
    finally:
        pipe.detach()


def test_a_call_may_ask_for_another_strength_or_strategy_than_is_attached(pipe) -> None:
    weak, merged = (
        draw(pipe, loras=[("neon", 0.2)]),
        draw(pipe, loras=[("neon", 1.0)], strategy="merged"),
    )
    pipe.attach([("neon", 1.0)])
    try:
        strong = draw(pipe)
        assert draw(pipe, loras=[("neon", 0.2)]) == weak != strong
        assert draw(pipe, strategy="merged") == merged != strong
        assert draw(pipe) == strong and pipe.attached == {"neon": 1.0}
    finally:
        pipe.detach()


UNITS = (
    LoRAUnit("elephant", 0.8, steps=(1, 2)),
    LoRAUnit("neon", 0.7),
    LoRAUnit("rocket", 0.6, steps=(3, 3)),
)


@pytest.fixture(scope="module")
def gated(pipe) -> AutoLoRAPipeline:
    """The same model with gates that do something."""
    import torch

    from autolora.fusion import Gate, GateBank, linear_shapes

    torch.manual_seed(1)
    other = AutoLoRAPipeline(pipe.config)
    other.__dict__["base"] = pipe.base
    shapes = linear_shapes(pipe.base.family.model(pipe.base))
    gates = {name: Gate(out) for name, (out, _) in shapes.items()}
    for gate in gates.values():
        for parameter in gate.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    other.__dict__["gates"] = GateBank(gates)
    return other


@pytest.mark.parametrize("strategy", ["sum", "gated", "merged"])
@pytest.mark.parametrize("units", [UNITS, UNITS[:1], UNITS[2:]], ids=["three", "first", "last"])
def test_units_act_in_their_steps_only(gated, strategy: str, units) -> None:
    """Compared with attaching anew before each step just what acts in it."""
    from autolora.fusion import attach, detach

    model = gated.base.family.model(gated.base)
    bits = {name: value.clone() for name, value in model.state_dict().items()}

    def by_hand(done: int, total: int) -> None:
        acting = [unit for unit in units if acts_in(unit.steps, done + 1)]
        if done < total:
            pairs = [(gated.pool.load(unit.name), unit.strength) for unit in acting]
            detach(model)
            attach(model, pairs, strategy, gated.gates)

    picture = draw(gated, loras=units, strategy=strategy, steps=4)
    always = [replace(unit, steps=None) for unit in units]
    assert draw(gated, strategy=strategy, steps=4, progress=by_hand) == picture
    assert draw(gated, loras=always, strategy=strategy, steps=4) != picture
    after = model.state_dict()
    assert bits.keys() == after.keys()
    assert all(value.equal(after[name]) for name, value in bits.items())


def test_units_act_in_their_steps_of_every_picture(gated) -> None:
    options = {"retrieve": False, "use_triggers": False, "loras": UNITS, "steps": 3}
    options["strategy"] = "gated"
    alone = [gated("a cat", seed, **options) for seed in (3, 4)]
    several = gated.generate_many("a cat", [3, 4], **options)
    assert [o.image.tobytes() for o in several] == [o.image.tobytes() for o in alone]
    gates = alone[0].gates.to_dict()["adapters"]
    for name, silent in (("elephant", [2]), ("rocket", [0, 1]), ("neon", [])):
        rows = [row for row in gates[name] if row is not None]
        for step in range(3):
            assert any(row[step] for row in rows) is (step not in silent), (name, step)
    report = alone[0].report.to_dict()["adapters"]
    assert [used["steps"] for used in report] == [[1, 2], [], [3, 3]]


def test_a_unit_is_narrowed_to_layers(pipe) -> None:
    from autolora.lora import LoRA

    whole = pipe.pool.load("neon")
    some = [layer for layer in whole.layers if layer.startswith("single")]
    part = LoRA.from_factors("part", {layer: whole.factors(layer) for layer in some})
    unit = LoRAUnit("neon", 1.0, layers=("single*",))
    narrowed = draw(pipe, loras=[unit])
    pipe.attach([(part, 1.0)])
    try:
        assert draw(pipe) == narrowed
    finally:
        pipe.detach()
    assert draw(pipe, loras=[("neon", 1.0)]) != narrowed
    with pytest.raises(GenerationError, match="no layer 'nothing"):
        draw(pipe, loras=[replace(unit, layers=("nothing*",))])


def test_files_are_attached_and_asked_for_by_path(pipe, tmp_path: Path) -> None:
    named = draw(pipe, loras=[("neon", 0.5)])
    shutil.copy(pipe.pool.entry("neon").path, tmp_path / "mine.safetensors")
    path = tmp_path / "mine.safetensors"
    assert draw(pipe, loras=[(path, 0.5)]) == draw(pipe, loras=[f"{path}:0.5"]) == named
    for adapter in ((str(path), 0.5), (path, 0.5), LoRAUnit(strength=0.5, path=path)):
        pipe.attach([adapter])
        try:
            assert pipe.attached == {"mine": 0.5} and draw(pipe) == named
        finally:
            pipe.detach()
    pipe.attach([("neon", 1.0)])
    try:
        for wrong in (str(tmp_path / "gone.safetensors"), tmp_path / "gone.safetensors"):
            with pytest.raises(PoolError, match="no LoRA file"):
                pipe.attach([(wrong, 0.5)])
        assert pipe.attached == {"neon": 1.0}
    finally:
        pipe.detach()


def test_a_base_models_own_units_take_part_unless_turned_off(pipe) -> None:
    own = AutoLoRAPipeline(replace(pipe.config, loras=(LoRAUnit("neon", 0.5, steps=(1, 1)),)))
    own.__dict__["base"] = pipe.base
    bare = draw(pipe)
    assert draw(own, steps=2) == draw(pipe, steps=2, loras=own.config.loras) != draw(pipe, steps=2)
    assert draw(own, loras=[LoRAUnit("neon", enabled=False)]) == bare == draw(own, drop=["neon"])
    far = AutoLoRAPipeline(replace(pipe.config, loras=(LoRAUnit("neon", steps=(1, 9)),)))
    far.__dict__["base"] = pipe.base
    with pytest.raises(GenerationError, match="acts in steps 1-9, and the picture has 1"):
        draw(far)
