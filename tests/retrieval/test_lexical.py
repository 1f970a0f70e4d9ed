"""Names of LoRAs that a prompt uses, or means by another word."""

import pytest

from autolora.retrieval.index import TextRow
from autolora.retrieval.names import NameIndex
from autolora.retrieval.prompt_terms import read_words


def relations(rows: list[TextRow], prompt: str) -> set[tuple[int, str, str]]:
    words = read_words(prompt)
    found = NameIndex(rows).find(words)
    return {(m.lora, m.relation, " ".join(w.text for w in words[m.start : m.end])) for m in found}


def test_names_are_found_in_every_spelling() -> None:
    rows = [
        TextRow(0, "title", "Pixel Art Style"),
        TextRow(1, "trigger", "elephants"),
        TextRow(2, "tag", "art"),  # says nothing alone
        TextRow(3, "captions", "elephant"),
    ]
    found = relations(rows, "pixel-art of one elephant")
    assert {match for match in found if match[1] != "keyword"} == {
        (0, "name", "pixel art"),
        (0, "style", "pixel art"),
        (0, "style", "pixel"),
        (1, "name", "elephant"),
        (1, "synonym", "elephant"),
    }
    assert (0, "name", "pixelart") in relations(rows, "pixelart")
    assert (0, "style", "8 bit") in relations(rows, "8-bit")


@pytest.mark.parametrize(
    ("title", "prompt", "relation"),
    [
        ("doughnut", "a donut", "synonym"),
        ("fox face", "a fox", "alias"),
        ("racing car", "a car", "kind"),
        ("parrot", "a bird", "kind"),
        ("dog", "a poodle", "member"),
        ("snake", "a cobra", "member"),
        ("watercolor", "an aquarelle", "style"),
        ("rocket", "a spaceship", "alias"),
        ("garden gnome", "a gnome", "head"),
    ],
)
def test_how_words_and_names_hang_together(title: str, prompt: str, relation: str) -> None:
    assert relation in {r for _, r, _ in relations([TextRow(0, "title", title)], prompt)}


@pytest.mark.parametrize(
    ("title", "prompt"),
    [
        ("stained glass", "a glass"),  # a look is no kind of what it is made of
        ("cat", "a woman"),
        ("dog", "a sausage"),
        ("elephant", "an animal"),
        ("elephant", "a thing"),
        ("neon", "a gas"),
    ],
)
def test_what_does_not_hang_together(title: str, prompt: str) -> None:
    assert relations([TextRow(0, "title", title)], prompt) == set()


def test_tags_that_a_pool_is_full_of_say_nothing() -> None:
    rows = [TextRow(i, "tag", tag) for i in range(20) for tag in ("emoji", f"thing{i}")]
    assert {lora for lora, _, _ in relations(rows, "an emoji of thing3")} == {3}


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (("title", "Watercolor"), "style"),
        (("title", "Old Print Style"), "style"),
        (("tag", "style"), "style"),
        (("tag", "character"), "character"),
        (("tag", "clothing"), "clothing"),
        (("tag", "poses"), "pose"),
        (("title", "LCM Turbo"), "helper"),
        (("captions", "a cat in ink style\na dog in ink style"), "style"),
        (("title", "elephant"), "subject"),
    ],
)
def test_kinds_of_loras(row: tuple[str, str], kind: str) -> None:
    assert NameIndex([TextRow(0, *row)]).kind(0) == kind
