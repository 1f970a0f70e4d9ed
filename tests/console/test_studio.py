"""From a prompt and cards to pictures, histories and styles."""

import threading

import numpy as np
import pytest
from PIL import Image

from autolora.console.history import MAX_ENTRIES, MAX_VISITS, Entry, Visits
from autolora.console.jobs import JobQueue
from autolora.console.models import ServerRequest, request_of_report
from autolora.console.studio import Studio
from autolora.errors import (
    AutoLoRAError,
    ConfigError,
    GenerationError,
    PoolError,
    RetrievalError,
)
from autolora.generate.report import Report, read_report
from autolora.request import read_request
from autolora.retrieval import Hit
from autolora.unit import LoRAUnit
from tests.console.asking import ask


def draw(studio: Studio, order: ServerRequest, visit: str = ""):
    view = studio.queue.wait(studio.submit(order, "me", visit), 60)
    assert view.state == "done", view.error
    return view.results


def pixels(picture) -> bytes:
    with Image.open(picture.path) as image:
        return np.asarray(image).tobytes()


def cards(plan) -> list[tuple[str, float, str]]:
    return [(card.item.name, card.strength, card.source) for card in plan.cards]


def test_cards_are_what_the_pipeline_would_take(studio: Studio) -> None:
    for prompt in ("a neon elephant", "an elephant", "a rocket in neon", "a tax report"):
        plan = studio.plan(ask(prompt))
        assert [card.item.name for card in plan.cards] == [
            hit.name for hit in studio.pipe.choose(prompt)
        ]
    card = studio.plan(ask("a neon elephant")).cards[0].to_dict()
    assert 0.5 < card["score"] <= 1 and card["why"] and card["channels"]
    assert "neon" in str(card["concepts"]) or "elephant" in str(card["concepts"])


def test_cards_can_be_pinned_dropped_and_set(studio: Studio) -> None:
    selection = {"pinned": {"rocket": 0.4}, "dropped": ["elephant"], "strengths": {"neon": 0.25}}
    plan = studio.plan(ask("a neon elephant", **selection))
    assert cards(plan) == [("rocket", 0.4, "pinned"), ("neon", 0.25, "found")]
    alone = {"automatic": False, "pinned": {"rocket": None}}
    assert cards(studio.plan(ask("a neon elephant", **alone))) == [("rocket", 1.0, "pinned")]
    assert cards(studio.plan(ask("a neon elephant", top_k=0))) == []
    assert cards(studio.plan(ask("", **alone))) == [("rocket", 1.0, "pinned")]


def test_better_cards_come_first_and_dropped_ones_are_asked_for_too(studio, monkeypatch) -> None:
    asked = []

    def choose(searcher, prompt, k, taken, negative):
        asked.append(k)
        return [Hit("elephant", 0.6, "x"), Hit("rocket", 0.9, "x"), Hit("neon", 0.9001, "x")][:k]

    monkeypatch.setattr("autolora.retrieval.choose", choose)
    plan = studio.plan(ask("a thing", top_k=3))
    assert [card.item.name for card in plan.cards] == ["neon", "rocket", "elephant"]
    plan = studio.plan(ask("a thing", top_k=2, dropped=("elephant",)))
    assert [card.item.name for card in plan.cards] == ["neon", "rocket"]
    assert asked == [3, 3], "one more than is wanted, as one will be passed over"


def test_tags_in_the_prompt_are_cards_too(studio: Studio) -> None:
    plan = studio.plan(ask("a neon thing <lora:rocket:-0.5>", pinned={"rocket": 1.0}))
    assert cards(plan) == [("rocket", -0.5, "prompt"), ("neon", 0.7, "found")]
    assert plan.prompt == "a neon thing"
    with pytest.raises(PoolError, match="did you mean rocket"):
        studio.plan(ask("a thing <lora:rockte>"))
    with pytest.raises(GenerationError, match="Top_k"):
        studio.plan(ask("a thing", top_k=99))


def test_a_style_brings_adapters_prompt_and_strategy(studio: Studio) -> None:
    folder = studio.pictures.folder / "styles"
    folder.mkdir(parents=True)
    (folder / "glow.yaml").write_text(
        "prompt: '{prompt}, glowing'\nadapters: [{name: neon, strength: 0.4}, gone]\n"
        "strategy: sum\nnegative_prompt: grey\n"
    )
    plan = studio.plan(ask("an elephant", style="glow"))
    assert cards(plan) == [("neon", 0.4, "style"), ("elephant", 1.0, "found")]
    assert (plan.prompt, plan.strategy) == ("an elephant, glowing", "sum")
    assert "gone" in plan.notes[0] and len(plan.notes) == 1
    report = draw(studio, ask("an elephant", negative="blurry", seed=1, style="glow"))[0].report
    assert report["prompt"] == "an elephant, glowing" and report["strategy"] == "sum"
    assert report["negative_prompt"] == "blurry, grey"
    assert report["adapters"][0]["why"] == "part of the style"
    with pytest.raises(ConfigError, match="no style 'glwo'"):
        studio.plan(ask("an elephant", style="glwo"))


def test_pictures_are_those_of_the_pipeline_and_say_why(studio: Studio) -> None:
    picture = draw(studio, ask("a neon elephant", seed=4, steps=3))[0]
    output = studio.pipe("a neon elephant", seed=4, steps=3)
    assert pixels(picture) == np.asarray(output.image).tobytes()
    ours = {used["name"]: used for used in picture.report["adapters"]}
    theirs = {used.name: used for used in output.report.adapters}
    assert set(ours) == set(theirs) == {"neon", "elephant"}
    for name, used in ours.items():
        assert used["why"] == theirs[name].why and used["score"] == theirs[name].score
        assert used["strength"] == theirs[name].strength
    saved = read_report(picture.path)
    assert [used["why"] for used in saved["adapters"]] == [used["why"] for used in ours.values()]


def test_several_pictures_count_seeds_up_and_a_random_seed_is_shown(studio: Studio) -> None:
    pictures = draw(studio, ask("a neon thing", seed=7, count=3))
    assert [picture.report["seed"] for picture in pictures] == [7, 8, 9]
    assert len({picture.path for picture in pictures}) == len({p.id for p in pictures}) == 3
    assert draw(studio, ask("a neon thing"))[0].report["seed"] >= 0


def test_strength_zero_is_silence(studio: Studio) -> None:
    silent = {"neon": 0.0, "elephant": 0.0}
    order = ask("a neon elephant", seed=2, strengths=silent, use_triggers=False)
    without = ask("a neon elephant", seed=2, automatic=False)
    loud = ask("a neon elephant", seed=2, use_triggers=False)
    a, b, c = (draw(studio, each)[0] for each in (order, without, loud))
    assert pixels(a) == pixels(b) != pixels(c)


def test_a_comparison_changes_nothing_but_the_adapters(studio: Studio) -> None:
    pictures = draw(studio, ask("a neon elephant", seed=3, compare=True, count=5), "ann")
    labels = {picture.label for picture in pictures}
    assert labels == {"fused", "only neon", "only elephant", "no adapters"}
    assert pictures[0].label == "fused" and pictures[-1].label == "no adapters"
    assert {picture.report["seed"] for picture in pictures} == {3}
    assert len({picture.report["used_prompt"] for picture in pictures}) == 1
    assert "elphnt animal" in pictures[-1].report["used_prompt"]
    assert [len(picture.report["adapters"]) for picture in pictures] == [2, 1, 1, 0]
    assert len({pixels(picture) for picture in pictures}) == 4
    entries = {e.picture.label: e for e in studio.visits.entries("ann")}
    for picture in pictures:
        again = read_request(entries[picture.label].order, ServerRequest)
        assert pixels(draw(studio, again)[0]) == pixels(picture), picture.label
    one = draw(studio, ask("an elephant", seed=3, compare=True))
    assert [picture.label for picture in one] == ["fused", "no adapters"]


def test_gates_are_known_by_layer_and_step(studio: Studio, tmp_path) -> None:
    from autolora.families.flux1.layers import LAYERS
    from autolora.fusion import Gate, GateBank
    from autolora.pipeline import AutoLoRAPipeline

    pipe = AutoLoRAPipeline(studio.pipe.config)
    pipe.__dict__["base"] = studio.pipe.base
    shapes = LAYERS.shapes(pipe.base.dit)
    pipe.__dict__["gates"] = GateBank({name: Gate(out) for name, (out, _) in shapes.items()})
    studio.pipe = pipe
    picture = draw(studio, ask("a neon elephant", seed=1, steps=3))[0]
    gates = studio.pictures.gates(picture.id)
    assert gates["steps"] == 3 and set(gates["adapters"]) == {"neon", "elephant"}
    assert len(gates["layers"]) == 16
    for rows in gates["adapters"].values():
        assert np.allclose(np.array(rows), 1.0, atol=2e-3), "an untrained gate is the plain sum"
    assert np.shape(gates["adapters"]["neon"]) == (16, 3)


def test_previews_come_along(studio: Studio) -> None:
    looks, job = [], None
    order = ask("a neon thing", seed=1, steps=4, width=64, height=80)
    started = threading.Event()
    studio.queue.submit("z", [_waiting(started)])
    job = studio.submit(order, "me")
    job._watchers.append(lambda: looks.append(job.preview))
    started.set()
    studio.queue.wait(job, 60)
    shown = [look for look in looks if look is not None]
    assert shown and shown[0].image.size == (64, 80)
    assert job.preview is None, "nothing is kept of a finished job"


def _waiting(event: threading.Event):
    from autolora.console.jobs import Task

    return Task("wait", lambda job: event.wait(10))


def test_what_is_wrong_is_said_before_anything_is_queued(studio: Studio) -> None:
    for order in (
        ask("   "),
        ask("x" * 100_000),
        ask("a cat", width=30),
        ask("a cat", guidance=float("nan")),
        ask("a cat", strategy="magic"),
        ask("a cat <lora:nobody:1>"),
        ask("<lora:neon:1>"),
        ask("a cat", style="nothing"),
    ):
        with pytest.raises(AutoLoRAError):
            studio.submit(order, "me")
    assert studio.queue.active() == []


def test_settings_come_back_from_the_history(studio: Studio) -> None:
    selection = {"pinned": {"rocket": 0.3}, "dropped": ["neon"]}
    more = {"steps": 2, "size": "64x80", "guidance": 2.0, "count": 2}
    order = ask("a neon elephant", negative="grey", **more, **selection)
    pictures = draw(studio, order, visit="ann")
    entries = studio.visits.entries("ann")
    assert [entry.picture.id for entry in entries] == [pictures[1].id, pictures[0].id]
    assert studio.visits.entries("bob") == []
    assert studio.visits.find("bob", pictures[0].id) is None
    again = read_request(studio.visits.find("ann", pictures[1].id).order, ServerRequest)
    assert again.seed == pictures[1].report["seed"] and again.count == 1
    assert again.loras == (LoRAUnit("rocket", 0.3),) and again.drop == ("neon",)
    assert again.negative_prompt == "grey"
    assert pixels(draw(studio, again)[0]) == pixels(pictures[1])


@pytest.mark.parametrize("triggers", [True, False])
def test_settings_come_back_from_the_png(studio: Studio, triggers) -> None:
    prompt, more = "a neon elephant <lora:rocket:0.3>", {"negative": "grey", "steps": 3}
    order = ask(prompt, seed=11, use_triggers=triggers, **more)
    picture = draw(studio, order)[0]
    again = request_of_report(Report.from_dict(read_report(picture.path)))
    assert again.retrieve is False and again.seed == 11
    assert pixels(draw(studio, again)[0]) == pixels(picture)


def test_the_cards_can_be_saved_as_a_style(studio: Studio) -> None:
    order = ask("a neon thing", pinned={"rocket": 0.3}, strengths={"neon": 0.5})
    studio.save_style("mine", "Mine", order)
    assert studio.styles.get("mine").loras == (LoRAUnit("rocket", 0.3), LoRAUnit("neon", 0.5))
    plan = studio.plan(ask("a tree", style="mine"))
    assert cards(plan) == [("rocket", 0.3, "style"), ("neon", 0.5, "style")]
    with pytest.raises(PoolError, match="no adapter to save"):
        studio.save_style("other", "", ask(""))


def test_histories_are_limited(studio: Studio) -> None:
    picture = draw(studio, ask("a thing", seed=1))[0]
    visits = Visits()
    for number in range(MAX_ENTRIES + 5):
        visits.add("ann", Entry(picture, {"prompt": str(number)}))
    assert len(visits.entries("ann")) == MAX_ENTRIES
    assert visits.entries("ann")[0].order["prompt"] == str(MAX_ENTRIES + 4)
    for number in range(MAX_VISITS - 1):
        visits.add(f"visitor {number}", Entry(picture, {"prompt": "x"}))
    assert visits.entries("ann"), "as many visitors as are remembered"
    visits.add("one more", Entry(picture, {"prompt": "x"}))
    assert visits.entries("ann") == [] and visits.entries("one more")


def test_pictures_are_found_by_id_only_while_they_are_there(studio: Studio) -> None:
    picture = draw(studio, ask("a thing", seed=1))[0]
    assert studio.pictures.get(picture.id) == picture
    picture.path.unlink()
    for wrong in (picture.id, "", "../../etc/passwd"):
        with pytest.raises(GenerationError, match="no such picture"):
            studio.pictures.get(wrong)


def test_a_console_without_a_pool_says_so_and_still_draws(shared_pipe, tmp_path) -> None:
    from autolora.pipeline import AutoLoRAPipeline

    pipe = AutoLoRAPipeline(shared_pipe.config.with_pool(tmp_path / "nowhere"))
    pipe.__dict__["base"] = shared_pipe.base
    studio = Studio(pipe, tmp_path / "outputs")
    plan = studio.plan(ask("a neon elephant"))
    assert plan.cards == [] and "does not exist" in plan.notes[0]
    assert "nowhere" in draw(studio, ask("a neon elephant", seed=1))[0].report["notes"][0]
    studio.warm_up()
    while studio.queue.active():
        studio.queue.wait(studio.queue.active()[0], 60)
    assert "does not exist" in studio.problem
    studio.queue.close()


@pytest.mark.parametrize("error", [RetrievalError("No room."), ZeroDivisionError("secret")])
def test_an_index_that_cannot_be_built_is_tried_once_and_says_why(
    shared_pipe, tmp_path, monkeypatch, error
) -> None:
    tries = []

    def fail(*_) -> None:
        tries.append(1)
        raise error

    studio = Studio(shared_pipe, tmp_path / "outputs")
    monkeypatch.setattr(shared_pipe, "index", fail)
    monkeypatch.setattr("autolora.console.cards.POOL_LOOK", 0.0)
    assert studio.plan(ask("a neon elephant")).notes == ["The index of the pool is being built."]
    studio.queue.wait(studio._indexing, 10)
    for _ in range(3):
        assert draw(studio, ask("a neon elephant", seed=1))[0].report["adapters"] == []
        assert studio.indexing() is None, "it would fail again"
    assert len(tries) == 1
    note = studio.plan(ask("a neon elephant")).notes[0]
    assert "secret" not in note and ("No room." in note or "ZeroDivisionError" in note)
    studio.queue.close()


def test_typing_goes_on_while_the_queue_is_full(shared_pipe, tmp_path) -> None:
    go = threading.Event()
    studio = Studio(shared_pipe, tmp_path / "outputs", queue=JobQueue(max_waiting=1))
    blocker = studio.queue.submit("z", [_waiting(go)])
    assert studio.plan(ask("a neon elephant")).cards == []
    go.set()
    studio.queue.wait(blocker, 10)
    studio.queue.close()


def test_the_index_is_queued_once_until_it_begins(studio: Studio) -> None:
    go = threading.Event()
    studio.queue.submit("z", [_waiting(go)])
    first = studio.reindex()
    assert studio.reindex() is first and studio.reindex(rebuild=True) is not first
    go.set()
    result = studio.queue.wait(first, 60).results[0]
    assert result["loras"] == 3 and result["kept"] == 3 and studio.reindex() is not first
