import pytest

from autolora.retrieval.prompt_terms import MAX_CONCEPTS, find_concepts, read_words


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (
            "a neon elephant on a blue background",
            {"neon", "elephant", "neon elephant", "neon elephant on a blue background"},
        ),
        ("an elephant", {"elephant"}),
        ("a blue whale", {"whale", "blue whale"}),
        ("an orange on a white background", {"orange", "orange on a white background"}),
        ("a cat in blue", {"cat", "cat in blue"}),
        ("cat, dog", {"cat", "dog"}),
        ("a picture of a cat", {"cat", "picture of a cat"}),
        ("on a blue background", {"blue background"}),
        ("a neon background", {"neon", "neon background"}),
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


def negated(prompt: str) -> list[str]:
    return [word.text for word in read_words(prompt) if word.negated and word.role != "stop"]


@pytest.mark.parametrize(
    ("prompt", "left_out"),
    [
        ("a cat without neon", ["neon"]),
        ("a cat without neon on a roof", ["neon"]),
        ("a rose, no glow", ["glow"]),
        ("an elephant, not in pixel art", ["pixel", "art"]),
        ("no dogs and cats, just a snake", ["dogs", "cats"]),
        ("a dog but no cat", ["cat"]),
        ("a cat without a hat and a dog", ["hat"]),
        ("anything but a banana", ["banana"]),
        ("a rocket rather than a boat", ["boat"]),
        ("a teapot instead of a cup", ["cup"]),
        ("a non-neon cat", ["neon"]),
        ("a neon-free cat", ["neon"]),
        ("don't use stained glass", ["use", "stained", "glass"]),
        ("a mushroom that isn't a woodcut", ["woodcut"]),
        ("a cat w/o neon", ["neon"]),
        ("not only a cat but also a dog", []),
        ("nothing but a cat", []),
        ("a knot and a notebook", []),
    ],
)
def test_what_stands_behind_a_negation_is_left_out(prompt: str, left_out: list[str]) -> None:
    assert negated(prompt) == left_out


@pytest.mark.parametrize(
    ("prompt", "verbs"),
    [
        ("I rose early", ["rose"]),
        ("prices rose sharply", ["rose"]),
        ("temperatures rose above forty", ["rose"]),
        ("a rose", []),
        ("the red rose on a table", []),
        ("two cats", []),
        ("she saw a rose", ["saw"]),
    ],
)
def test_verbs_by_their_place(prompt: str, verbs: list[str]) -> None:
    assert [word.text for word in read_words(prompt) if word.verb] == verbs


def test_a_misspelled_word_stands_for_what_is_meant() -> None:
    words = read_words("an elefant, qwrtz", ["elephant", "swan"])
    assert [(w.stem, w.unknown) for w in words if w.role == "content"] == [
        ("elephant", False),
        ("qwrtz", True),
    ]
    assert "elephant" in {concept.text for concept in find_concepts(words)}


def test_chatter_is_nothing() -> None:
    chatter = "(masterpiece:1.2), best quality, 8k, ultra detailed, score_9, trending on artstation"
    assert not [word for word in read_words(chatter) if word.role == "content"]


def test_a_long_prompt_stays_cheap() -> None:
    assert len(find_concepts(read_words("lorem ipsum dolor " * 2000))) <= MAX_CONCEPTS
