"""What words have to do with each other."""

import pytest

from autolora.retrieval.lexicon import lexicon, nearest_word


@pytest.mark.parametrize(
    ("word", "singular"),
    [
        ("elephants", "elephant"), ("cherries", "cherry"), ("churches", "church"),
        ("glass", "glass"), ("glasses", "glass"), ("cactus", "cactus"), ("cacti", "cactus"),
        ("mosaic", "mosaic"), ("ferris", "ferris"), ("pixels", "pixel"), ("dog's", "dog"),
        ("octopuses", "octopus"), ("wolves", "wolf"), ("women", "woman"), ("grapes", "grape"),
        ("heroes", "hero"), ("zorkles", "zorkle"),
    ],
)  # fmt: skip
def test_lemma(word: str, singular: str) -> None:
    assert lexicon().lemma(word) == singular


def test_spellings_share_a_key() -> None:
    key = lexicon().key
    assert key("pixel-art") == key("Pixel Art") == key("pixelart")
    assert key("jack-o'-lanterns") == key("jack o lantern")
    assert key("wine glasses") == key("wineglass")


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("elefant", "elephant"), ("bycicle", "bicycle"), ("saxaphone", "saxophone"),
        ("swna", None),  # four letters are too few to tell
        ("elephan", "elephant"), ("bananaphone", None), ("42elephant", None),
    ],
)  # fmt: skip
def test_a_misspelled_word_is_the_nearest(word: str, meant: str | None) -> None:
    vocabulary = ["elephant", "bicycle", "saxophone", "swan", "banana"]
    assert nearest_word(word, vocabulary) == meant


def test_a_half_typed_word_is_nothing_yet() -> None:
    assert nearest_word("elephan", ["elephant"], last=True) is None
    assert nearest_word("elefant", ["elephant"], last=True) == "elephant"
    assert nearest_word("bat's", ["bats", "cats"]) is None


def test_two_words_that_are_equally_near_are_neither() -> None:
    assert nearest_word("plane", ["plant", "plate"]) is None


def kinds(phrase: str) -> set[int]:
    return {s for own in lexicon().synsets(phrase) for s, _ in lexicon().ancestors(own)}


@pytest.mark.parametrize(
    ("one", "kind"),
    [
        ("parrot", "bird"),
        ("poodle", "dog"),
        ("racing car", "car"),
        ("saxophone", "musical instrument"),
    ],
)
def test_kinds_lie_above_and_below(one: str, kind: str) -> None:
    """Going up from one and down from its kind meet, whichever is walked."""
    above = kinds(one) & set(lexicon().synsets(kind))
    assert above
    below = lexicon().descendants(above.pop())
    assert set(lexicon().synsets(one)) & set(below)
    assert not kinds(kind) & set(lexicon().synsets(one))


def test_what_is_too_general_asks_for_nothing() -> None:
    assert lexicon().synsets("animal") == []
    (artifact, *_) = lexicon().synsets("instrumentality")
    assert lexicon().descendants(artifact) == {}


def test_a_person_is_meant_only_where_nothing_else_can_be() -> None:
    assert not set(lexicon().synsets("cat")) & set(lexicon().synsets("gossip"))
    assert lexicon().synsets("vampire")


@pytest.mark.parametrize("phrase", ["hot dog", "sea lion", "banana republic", "mushroom cloud"])
def test_fixed_expressions(phrase: str) -> None:
    assert lexicon().is_compound(phrase)


def test_looks_have_several_names() -> None:
    number = lexicon().style("8-bit")
    assert number is not None and number == lexicon().style("pixel art style")
    assert "pixel art" in lexicon().looks(number)
    assert lexicon().style("elephant") is None


@pytest.mark.parametrize("word", ["running", "painted", "bigger", "quickly", "swam", "zebras"])
def test_forms_of_words_are_words(word: str) -> None:
    assert lexicon().is_word(word)


def test_what_is_no_word() -> None:
    assert not lexicon().is_word("elefant") and not lexicon().is_word("qwrtz")
