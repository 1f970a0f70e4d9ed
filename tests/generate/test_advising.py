"""Notes about things that quietly have no effect."""

from types import SimpleNamespace

import pytest

from autolora.families.flux1 import FAMILY
from autolora.generate.active_adapters import Chosen
from autolora.generate.plan import base_notes, made_for


@pytest.mark.parametrize(
    ("base_model", "variant"),
    [
        ("Flux.1 D", "dev"),
        ("Flux.1 S", "schnell"),
        ("flux-1-dev/lora", "dev"),
        ("flux-1-schnell/lora", "schnell"),
        ("black-forest-labs/FLUX.1-dev", "dev"),
        ("black-forest-labs/FLUX.1-schnell", "schnell"),
        ("FLUX.1 Krea", "dev"),
        ("flux1", None),
        ("Flux.1 D, also schnell", None),
        ("developer's own", None),
        ("", None),
    ],
)
def test_variants_are_told_from_what_people_write(base_model: str, variant: str | None) -> None:
    assert made_for(base_model) == variant


def notes(
    variant="dev",
    guidance_embedder="a module",
    negative="",
    scale=1.0,
    made="",
    words=3,
    strength=1.0,
    bounds=None,
    preferred=None,
):
    base = SimpleNamespace(
        notes=["loaded so"],
        variant=variant,
        text_length=8,
        dit=SimpleNamespace(guidance_embedder=guidance_embedder),
        family=FAMILY,
        tokenizer_2=lambda prompt: SimpleNamespace(input_ids=[0] * len(prompt.split())),
    )
    lora = SimpleNamespace(
        name="a\nb",
        metadata=SimpleNamespace(
            base_model=made, strength_bounds=bounds, preferred_strength=preferred
        ),
    )
    request = SimpleNamespace(negative_prompt=negative, guidance=scale, true_cfg=scale)
    found = base_notes(base, request, [Chosen(lora, strength, "asked for")], "x " * words)
    assert found[0] == "loaded so"
    return found[1:]


def test_notes_are_given_where_they_are_due() -> None:
    assert notes() == notes(made="Flux.1 D") == notes(negative="dogs", scale=2.0) == []
    (other,) = notes(made="Flux.1 S")
    assert r"a\nb was made for FLUX.1 schnell (Flux.1 S)" in other and "dev model" in other
    (reverse,) = notes(variant="schnell", made="flux-1-dev/lora")
    assert "made for FLUX.1 dev" in reverse
    assert notes(variant=None, made="Flux.1 S") == []
    assert "it needs true_cfg" in notes(negative="dogs")[0]
    assert "it needs guidance" in notes(negative="dogs", guidance_embedder=None)[0]
    assert "longer than 8 tokens" in notes(words=9)[0]


def test_recommendations_that_cannot_be_followed_are_noted() -> None:
    (note,) = notes(strength=1.0, preferred=25.0)
    assert "acts at strength 1: the 25 that its author recommends is beyond 20." in note
    (note,) = notes(strength=0.4, preferred=0.9, bounds=(0.2, 0.4))
    assert "the 0.9 that its author recommends is outside the bounds" in note
    assert notes(strength=0.7, preferred=0.7) == notes(strength=0.5, preferred=25.0) == []


def test_strengths_beyond_what_is_meant_are_noted() -> None:
    assert notes(strength=2.0) == notes(strength=-2.0) == []
    assert "acts at strength 2.5; pictures often fall apart" in notes(strength=2.5)[0]
    assert "acts at strength -3;" in notes(strength=-3.0)[0]
    assert notes(strength=3.0, bounds=(0.5, 3.0)) == notes(strength=0.5, bounds=(0.5, 3.0)) == []
    for strength in (0.4, 3.1):
        (note,) = notes(strength=strength, bounds=(0.5, 3.0))
        assert f"acts at strength {strength:g}; its author recommends 0.5 to 3." in note
    assert len(notes(strength=5.0, bounds=(3.0, 1.0))) == 1, "bounds that are none are passed over"
