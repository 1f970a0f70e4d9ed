"""Which adapters are planned: what is asked for, what the search fills up, what stays attached."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from autolora.generate.active_adapters import Chosen
from autolora.generate.plan import Planner
from autolora.request import AskedLoRA


def lora(name: str) -> SimpleNamespace:
    metadata = SimpleNamespace(preferred_strength=None, strength_bounds=None, trigger_words=[])
    return SimpleNamespace(name=name, metadata=metadata)


class Search:
    """Finds a, b, c, ... for any prompt, with the scores that it is told."""

    def __init__(self, scores: dict[str, float]) -> None:
        self.scores, self.asked = scores, []

    def choose(self, prompt: str, k: int, taken: list[str]) -> list[SimpleNamespace]:
        self.asked.append((prompt, k, list(taken)))
        return [SimpleNamespace(name=n, score=s, why="found") for n, s in self.scores.items()][:k]

    def open(self) -> SimpleNamespace:
        return SimpleNamespace(report=SimpleNamespace(left_out={}))


def planner(search: Search | None, attached: tuple[Chosen, ...] = ()) -> Planner:
    def find() -> Search:
        assert search is not None, "nothing is to be searched"
        return search

    pool = SimpleNamespace(load=lora, folder=Path("/pool"))
    nothing = lambda: None  # noqa: E731
    standing = SimpleNamespace(chosen=list(attached), strategy="sum")
    return Planner(None, lambda: pool, nothing, nothing, find, standing)


def request(top_k: int = 3, prompt: str = "a cat") -> SimpleNamespace:
    return SimpleNamespace(prompt=prompt, top_k=top_k)


def names(chosen: list[Chosen]) -> list[str]:
    return [entry.lora.name for entry in chosen]


def test_retrieval_fills_what_is_left() -> None:
    search = Search({"a": 0.9, "b": 0.8, "c": 0.7})
    asked = [AskedLoRA("x", 0.5), AskedLoRA("y")]
    found = planner(search)._select(request(), asked, True, [])
    assert names(found) == ["x", "y", "a"] and [e.strength for e in found] == [0.5, 1.0, 1.0]
    assert search.asked == [("a cat", 1, ["x", "y"])]


@pytest.mark.parametrize(("top_k", "retrieve"), [(2, True), (1, True), (9, False)])
def test_nothing_is_searched_where_nothing_is_left(top_k: int, retrieve: bool) -> None:
    asked = [AskedLoRA("x"), AskedLoRA("y")]
    assert names(planner(None)._select(request(top_k), asked, retrieve, [])) == ["x", "y"]


def test_what_stays_attached_replaces_the_search_and_yields_to_what_is_asked_for() -> None:
    attached = (Chosen(lora("x"), 1.0, "attached"), Chosen(lora("z"), 1.0, "attached"))
    found = planner(None, attached)._select(request(), [AskedLoRA("x", 0.2)], True, [])
    assert [(e.lora.name, e.strength) for e in found] == [("z", 1.0), ("x", 0.2)]


def test_equally_good_hits_have_an_order_of_their_own() -> None:
    search = Search({"c": 0.80004, "b": 0.80001, "a": 0.5, "d": 0.9})
    hits = planner(search).retrieve(request(9), [])
    assert [hit.name for hit in hits] == ["d", "b", "c", "a"]


def test_a_prompt_of_tags_alone_finds_nothing() -> None:
    assert planner(None).retrieve(request(prompt=""), []) == []
