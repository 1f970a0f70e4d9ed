"""Which adapters are planned: what is asked for, what the search fills up, what stays attached."""

from types import SimpleNamespace

import pytest

from autolora.config import PipelineConfig
from autolora.generate.active_adapters import Chosen
from autolora.generate.plan import Pick, Planner, pick
from autolora.prompt_syntax import parse_prompt
from autolora.request import GenerateRequest, read_request
from autolora.styles import PLAIN, Style
from autolora.unit import LoRAUnit


class Search:
    """Finds a, b, c, ... for any prompt, with the scores that it is told."""

    def __init__(self, scores: dict[str, float]) -> None:
        self.scores, self.asked = scores, []

    def __call__(
        self, prompt: str, k: int, taken: list[str], negative: str
    ) -> list[SimpleNamespace]:
        self.asked.append((prompt, k, list(taken)))
        return [SimpleNamespace(name=n, score=s, why="fits") for n, s in self.scores.items()][:k]


def nothing(*_) -> list:
    raise AssertionError("nothing is to be searched")


def picks(find, style: Style = PLAIN, model: tuple = (), **fields) -> list[Pick]:
    asked = read_request({"prompt": "a cat", **fields})
    words = parse_prompt(asked.prompt)
    config = PipelineConfig("x", loras=model)
    return pick(asked, words.text, words.loras, style, config, find)


def named(found: list[Pick]) -> list[tuple]:
    return [(entry.unit.name, entry.unit.strength, entry.source) for entry in found]


def test_retrieval_fills_what_is_left() -> None:
    search = Search({"a": 0.9, "b": 0.8, "c": 0.7})
    found = picks(search, loras=["x:0.5", "y"])
    assert named(found) == [("x", 0.5, "asked"), ("y", None, "asked"), ("a", None, "found")]
    assert search.asked == [("a cat", 1, ["x", "y"])] and found[2].why == "fits"


@pytest.mark.parametrize(("top_k", "retrieve"), [(2, True), (1, True), (9, False)])
def test_nothing_is_searched_where_nothing_is_left(top_k: int, retrieve: bool) -> None:
    found = picks(nothing, loras=["x", "y"], top_k=top_k, retrieve=retrieve)
    assert [entry.unit.name for entry in found] == ["x", "y"]


def test_a_tag_wins_over_a_name_and_both_over_style_and_model() -> None:
    style = Style("s", loras=(LoRAUnit("x", 0.1), LoRAUnit("y", 0.2), LoRAUnit("z", 0.3)))
    model = (LoRAUnit("z", 0.7), LoRAUnit("w", 0.6, steps=(2, 3)))
    prompt = "a cat <lora:x:0.9>"
    found = picks(nothing, style, model, prompt=prompt, loras=["x:0.5", "y"], retrieve=False)
    expected = [("x", 0.9, "prompt"), ("y", None, "asked"), ("z", 0.3, "style")]
    assert named(found) == [*expected, ("w", 0.6, "model")]
    assert found[-1].unit.steps == (2, 3)


def test_what_is_off_is_neither_taken_nor_found() -> None:
    search = Search({"a": 0.9, "b": 0.8, "c": 0.7})
    off = [{"name": "a", "enabled": False}]
    found = picks(search, model=(LoRAUnit("a"), LoRAUnit("w")), loras=off, drop=["w", "b"])
    assert named(found) == [("c", None, "found")]
    assert search.asked == [("a cat", 6, [])], "three more, as three may be passed over"


def test_a_strength_can_be_set_for_what_is_found() -> None:
    found = picks(Search({"a": 0.9}), strengths={"a": 0.25})
    assert named(found) == [("a", 0.25, "found")]


def test_equally_good_hits_have_an_order_of_their_own() -> None:
    search = Search({"c": 0.80004, "b": 0.80001, "a": 0.5, "d": 0.9})
    assert [entry.unit.name for entry in picks(search, top_k=9)] == ["d", "b", "c", "a"]


def test_a_prompt_of_tags_alone_finds_nothing() -> None:
    assert named(picks(nothing, prompt="<lora:x:1>")) == [("x", 1.0, "prompt")]


def test_nothing_is_searched_while_adapters_stay_attached() -> None:
    standing = SimpleNamespace(chosen=[Chosen(SimpleNamespace(name="z"), 1.0, "attached")])
    planner = Planner(PipelineConfig("x"), *[nothing] * 5, standing)
    assert planner._find([])("a cat", 3, [], "") == []


def test_a_request_is_not_changed_by_a_style_without_words() -> None:
    asked = GenerateRequest(prompt="a cat")
    assert PLAIN.apply(asked) is asked
    style = Style("s", prompt="{prompt}, ink", negative_prompt="grey")
    changed = style.apply(asked.changed(negative_prompt="blurry"))
    assert (changed.prompt, changed.negative_prompt) == ("a cat, ink", "blurry, grey")
