import pytest

from autolora.retrieval.prompt_terms import find_concepts, find_phrase, read_words, stem, stems


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a neon elephant on a blue background", {"neon", "elephant", "neon elephant"}),
        ("an elephant", {"elephant"}),
        ("a blue whale", {"whale", "blue whale"}),
        ("an orange on a white background", {"orange"}),
        ("a cat in blue", {"cat"}),
        ("cat, dog", {"cat", "dog"}),
        ("a picture of a cat", {"cat"}),
        ("on a blue background", set()),
        ("a neon background", {"neon"}),
        ("", set()),
        ("!!! ,,,", set()),
        ("the the the", set()),
    ],
)
def test_concepts_of_a_prompt(prompt: str, expected: set[str]) -> None:
    assert {concept.text for concept in find_concepts(read_words(prompt))} == expected


def test_concepts_know_the_words_they_cover() -> None:
    words = read_words("a pixel art sailboat")
    by_text = {concept.text: concept.covers for concept in find_concepts(words)}
    assert by_text["pixel art"] == (1,)  # "art" is a modifier
    assert by_text["pixel art sailboat"] == (1, 3)


@pytest.mark.parametrize(
    ("word", "singular"),
    [
        ("elephants", "elephant"),
        ("cherries", "cherry"),
        ("churches", "church"),
        ("glass", "glass"),
        ("cactus", "cactus"),
        ("mosaic", "mosaic"),
        ("ferris", "ferris"),
        ("pixels", "pixel"),
        ("dog's", "dog"),
    ],
)
def test_stem(word: str, singular: str) -> None:
    assert stem(word) == singular


def test_phrases_are_found_with_stop_words_and_hyphens_inside() -> None:
    words = read_words("two jack-o-lanterns, a hot-dog")
    assert find_phrase(words, stems("jack o lantern")) == (1, 3)
    assert find_phrase(words, stems("hot dog")) == (6, 7)
    assert find_phrase(read_words("a red neon rose"), stems("red neon")) == (1, 2)
    assert find_phrase(read_words("a red rose"), ("red",)) == ()
    assert find_phrase(words, stems("dog hot")) == ()
    assert find_phrase(words, ()) == ()


def test_a_long_prompt_stays_cheap() -> None:
    assert len(find_concepts(read_words("lorem ipsum dolor " * 2000))) <= 32
