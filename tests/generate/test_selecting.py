"""Strengths and trigger words of the adapters that take part."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from autolora.generate.active_adapters import Chosen
from autolora.generate.plan import MAX_NOTES, MAX_TRIGGERS, left_out_notes, with_triggers
from autolora.lora.metadata import Metadata, recommended_strength


@pytest.mark.parametrize(
    ("preferred", "bounds", "strength"),
    [
        (None, None, 1.0),
        (None, (0.2, 0.4), 1.0),  # nothing is recommended, only allowed
        (0.7, None, 0.7),
        (-0.5, None, -0.5),
        (0.0, None, 1.0),
        (20.0, None, 20.0),
        (20.5, None, 1.0),
        (0.9, (0.2, 0.4), 0.4),
        (0.1, (0.2, 0.4), 0.2),
        (0.3, (0.2, 0.4), 0.3),
        (0.3, (0.4, 0.2), 0.3),
    ],
)
def test_the_recommended_strength(preferred, bounds, strength: float) -> None:
    metadata = Metadata(preferred_strength=preferred, strength_bounds=bounds)
    assert recommended_strength(metadata) == strength


def chosen(*words: str, strength: float = 1.0) -> Chosen:
    lora = SimpleNamespace(metadata=SimpleNamespace(trigger_words=list(words)))
    return Chosen(lora, strength, "found")


def test_the_first_few_trigger_words_are_added() -> None:
    one, other = chosen("a", "b", "c", "d"), chosen("neon", "glow")
    assert MAX_TRIGGERS == 3
    assert with_triggers("some glow", [one, other]) == "some glow, a, b, c"
    assert (one.triggers, other.triggers) == (["a", "b", "c"], [])


@pytest.mark.parametrize("strength", [0.0, -1.0])
def test_what_is_subtracted_is_not_asked_for(strength: float) -> None:
    entry = chosen("blueprint", strength=strength)
    entry.triggers = ["of a call before"]
    assert with_triggers("a teapot", [entry]) == "a teapot" and entry.triggers == []


def test_files_left_out_are_named_as_far_as_they_are_few() -> None:
    left_out = {f"{n}": f"/pool/{n}.safetensors is bad." for n in range(MAX_NOTES + 2)}
    notes = left_out_notes(left_out, Path("/pool"))
    assert len(notes) == MAX_NOTES + 1 and notes[0] == "Left out: 0.safetensors is bad."
    assert notes[-1].startswith("2 more files")
    assert len(left_out_notes(dict(list(left_out.items())[:MAX_NOTES]), Path("/pool"))) == MAX_NOTES
