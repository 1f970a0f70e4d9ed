"""What a browser or program may ask for."""

import math

import pytest

from autolora.console.models import GenerateRequest
from autolora.console.orders import Order, Selection, order_of_report, whole_number
from autolora.errors import GenerationError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "between 1 and 20"),
        ({"count": 21}, "between 1 and 20"),
        ({"steps": 51}, "between 1 and 50"),
        ({"seed": -2}, "-1 for a random one"),
        ({"seed": 2**63 - 1}, "between 0 and"),
    ],
)
def test_impossible_orders_are_refused(changes, message) -> None:
    with pytest.raises(GenerationError, match=message):
        Order("a cat", **changes)


def test_a_random_seed_is_chosen_once_and_a_given_one_kept() -> None:
    seeds = {Order("a cat").with_seed().seed for _ in range(20)}
    assert len(seeds) > 15 and all(0 <= seed < 2**31 for seed in seeds)
    assert Order("a cat", seed=7).with_seed().seed == 7


def test_orders_survive_plain_data() -> None:
    selection = Selection("neon", False, {"a": None, "b": 0.5}, ("c",), {"d": 1.5}, 4, False)
    order = Order("a cat", "blurry", 3, 10, 64, 80, 2.5, 2, "sum", True, selection)
    assert Order.from_dict(order.to_dict()) == order


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([1], "not understood"),
        ({"pinned": {"a": "much"}}, "not a number"),
        ({"pinned": {"a": True}}, "not a number"),
        ({"pinned": {"a": 11}}, "out of range"),
        ({"strengths": {"a": math.inf}}, "out of range"),
        ({"pinned": {str(n): 1.0 for n in range(65)}}, "At most 64"),
        ({"dropped": ["x"] * 65}, "At most 64"),
        ({"top_k": 1.5}, "whole number"),
    ],
)
def test_impossible_selections_are_refused(raw, message) -> None:
    with pytest.raises(GenerationError, match=message):
        Selection.from_dict(raw)


def test_nothing_and_unknown_keys_are_an_empty_selection() -> None:
    assert Selection.from_dict(None) == Selection.from_dict({"notice": "hello"}) == Selection()


REPORT = {"prompt": "p", "used_prompt": "p", "seed": 1, "steps": 2, "width": 64, "height": 64}
REPORT |= {"guidance": 3, "strategy": "sum"}


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": math.inf},
        {"steps": "many"},
        {"width": None},
        {"adapters": ["neon"]},
        {"adapters": [{"name": "neon"}]},
        {"adapters": {"neon": 1}},
        {"steps": 51},
        {"guidance": []},
    ],
)
def test_reports_that_no_order_can_have_are_refused(changes) -> None:
    assert order_of_report(REPORT).seed == 1
    with pytest.raises(GenerationError):
        order_of_report({**REPORT, **changes})


@pytest.mark.parametrize("triggers", [[], ["glow"]])
def test_tags_of_a_report_come_back_as_pins(triggers) -> None:
    typed = {"prompt": "a cat <lora:neon:0.8>", "used_prompt": ", ".join(["a cat", *triggers])}
    used = {"name": "neon", "strength": 0.8, "triggers": triggers}
    order = order_of_report({**REPORT, **typed, "adapters": [used]})
    assert order.prompt == "a cat" and order.selection.pinned == {"neon": 0.8}
    assert order.selection.use_triggers is bool(triggers) and not order.selection.automatic


@pytest.mark.parametrize("value", [None, "7", True, 1.5, math.nan])
def test_whole_numbers_are_whole_numbers(value) -> None:
    with pytest.raises(GenerationError, match="The seed must be a whole number"):
        whole_number("The seed", value)
    assert whole_number("The seed", 7.0) == 7


def test_a_request_becomes_an_order() -> None:
    body = GenerateRequest(
        prompt="a cat",
        seed=4,
        adapters=[{"name": "neon", "strength": 0.5}, {"name": "rocket"}],
        drop=["elephant"],
        style="base",
        automatic=False,
        strengths={"x": 0.25},
        top_k=2,
        use_triggers=False,
    )
    pinned = {"neon": 0.5, "rocket": None}
    selection = Selection("base", False, pinned, ("elephant",), {"x": 0.25}, 2, False)
    assert body.order() == Order("a cat", seed=4, selection=selection)
