"""What a browser or program may ask a server for."""

import math

import pytest

from autolora.console.models import desk_of, read_desk, request_of_report
from autolora.console.page import whole_number
from autolora.errors import GenerationError
from autolora.generate.report import Report
from autolora.unit import LoRAUnit
from tests.console.asking import ask


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "between 1 and 20"),
        ({"count": 21}, "between 1 and 20"),
        ({"steps": 51}, "between 1 and 50"),
        ({"seed": -2}, "-1 for a random one"),
        ({"seed": 2**63 - 1}, "between 0 and"),
        ({"loras": [{"path": "x.safetensors"}]}, "no files"),
    ],
)
def test_impossible_requests_are_refused(changes, message) -> None:
    with pytest.raises(GenerationError, match=message) as caught:
        ask("a cat", **changes)
    assert caught.value.where == next(iter(changes))


def test_a_random_seed_is_chosen_once_and_a_given_one_kept() -> None:
    seeds = {ask("a cat").with_seed().seed for _ in range(20)}
    assert len(seeds) > 15 and all(0 <= seed < 2**31 for seed in seeds)
    assert ask("a cat", seed=7).with_seed().seed == 7


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([1], "not understood"),
        ({"units": [1]}, "not understood"),
        ({"pinned": {"a": "much"}}, "not a number"),
        ({"pinned": {"a": True}}, "not a number"),
        ({"pinned": {"a": 21}}, "out of range"),
        ({"pinned": {"a": 1}, "units": {"a": {"stepz": 1}}}, "unknown key"),
        ({"strengths": {"a": math.inf}}, "out of range"),
        ({"pinned": {str(n): 1.0 for n in range(65)}}, "At most 64"),
        ({"dropped": ["x"] * 65}, "At most 64"),
        ({"top_k": 1.5}, "whole number"),
    ],
)
def test_impossible_desks_are_refused(raw, message) -> None:
    with pytest.raises(GenerationError, match=f"(?i){message}"):
        ask("a cat", **read_desk(raw))


def test_nothing_and_what_the_page_notes_for_itself_are_an_empty_desk() -> None:
    assert ask("a", **read_desk(None)) == ask("a", **read_desk({"notice": "hello"}))


def test_a_desk_comes_back() -> None:
    units = (LoRAUnit("a"), LoRAUnit("b", 0.5, steps=(2, None), layers=("x*",)))
    request = ask(
        "a",
        loras=units,
        style="neon",
        retrieve=False,
        drop=["c"],
        strengths={"d": 1.5},
        use_triggers=False,
    )
    desk = desk_of(request)
    assert desk["pinned"] == {"a": None, "b": 0.5}
    assert ask("a", **read_desk(desk)) == request


REPORT = {"prompt": "p", "used_prompt": "p", "seed": 1, "steps": 2, "width": 64, "height": 64}
REPORT |= {"guidance": 3, "strategy": "sum", "negative_prompt": "", "model": "tiny"}


def asked_of(**changes):
    return request_of_report(Report.from_dict({**REPORT, **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": math.inf},
        {"steps": "many"},
        {"width": None},
        {"adapters": ["neon"]},
        {"adapters": [{"name": "neon"}]},
        {"adapters": {"neon": 1}},
        {"adapters": [{"name": "neon", "strength": 99, "why": ""}]},
        {"adapters": [{"name": "neon", "strength": 1, "why": "", "steps": [3, 1]}]},
        {"steps": 51},
        {"guidance": []},
    ],
)
def test_reports_that_no_request_can_have_are_refused(changes) -> None:
    assert asked_of().seed == 1
    with pytest.raises(GenerationError):
        asked_of(**changes)


@pytest.mark.parametrize("triggers", [[], ["glow"]])
def test_tags_of_a_report_come_back_as_units(triggers) -> None:
    typed = {"prompt": "a cat <lora:neon:0.8>", "used_prompt": ", ".join(["a cat", *triggers])}
    used = {"name": "neon", "strength": 0.8, "triggers": triggers, "why": "", "steps": [1, 4]}
    again = asked_of(**typed, adapters=[used])
    assert again.prompt == "a cat" and again.loras == (LoRAUnit("neon", 0.8, steps=(1, 4)),)
    assert again.use_triggers is bool(triggers) and not again.retrieve


@pytest.mark.parametrize("value", [None, "7", True, 1.5, math.nan])
def test_whole_numbers_are_whole_numbers(value) -> None:
    with pytest.raises(GenerationError, match="The seed must be a whole number"):
        whole_number("The seed", value)
    assert whole_number("The seed", 7.0) == 7
