"""Sentences about how exactly adapters act are said where there is something to say."""

from types import SimpleNamespace

from autolora.generate.active_adapters import approximation_notes, rounding_note, text_note


def lora(norms: int = 0, biases: int = 0) -> SimpleNamespace:
    return SimpleNamespace(name="a\nb", norms=[0] * norms, bias_layers=[0] * biases)


def test_approximations_are_noted_where_they_lose_something() -> None:
    assert approximation_notes(lora(), {}) == []
    assert approximation_notes(lora(), {"x": 1e-4, "y": 0.0}) == []
    (note,) = approximation_notes(lora(), {"x": 0.1, "y": 0.3, "z": 1e-6})
    assert r"a\nb is not low-rank in 2 layers" in note
    assert "error 0.2 on average, 0.3 at most" in note
    (note,) = approximation_notes(lora(norms=2, biases=3), {})
    assert "also changes 5 biases or normalization weights" in note


def test_rounding_is_noted_from_a_twentieth_on() -> None:
    assert rounding_note({}) is None and rounding_note({"x": 0.0, "y": 0.09}) is None
    assert "an error of 5%" in rounding_note({"x": 0.0, "y": 0.1})


def test_text_encoders_are_told_by_the_names_that_people_know() -> None:
    assert text_note("x", "t5", 7, True) == "x also acts on the text encoder T5 (7 layers)."
    assert text_note("x", "clip", 7, False) == (
        "This base model has no CLIP; that part of x is left out."
    )
