"""Prompts of other languages in English."""

import pytest

from autolora.retrieval.languages import understand
from autolora.retrieval.prompt_terms import read_words


@pytest.mark.parametrize(
    ("prompt", "language", "english"),
    [
        ("一只大象在森林里", "zh", {"elephant", "forest"}),
        ("霓虹風格的貓", "zh", {"neon"}),
        ("ドット絵の猫", "ja", {"pixel art", "cat"}),
        ("코끼리가 숲에", "ko", {"elephant", "forest"}),
        ("drei Hunde am Strand", "de", {"three dog beach"}),
        ("deux chats et une tortue", "fr", {"two cat", "turtle"}),
        ("unos perros en la playa", "es", {"dog", "beach"}),
        ("un elefante e una rosa", "it", {"elephant", "rose"}),
        ("um gato no jardim", "pt", {"cat", "garden"}),
        ("een olifant in de tuin", "nl", {"elephant", "garden"}),
        ("кошка в саду", "ru", {"cat", "garden"}),
    ],
)
def test_things_are_found(prompt: str, language: str, english: set[str]) -> None:
    found = understand(prompt)
    assert found.language == language
    words = set(found.text.replace(",", "").split())
    assert {word for phrase in english for word in phrase.split()} <= words


@pytest.mark.parametrize(
    "prompt",
    ["eine Katze ohne Neon", "un chat sans néon", "un gato sin neón", "un gatto senza neon",
     "猫 不要霓虹", "ネオンなしの猫", "네온 없는 고양이", "кошка без неона",
     "een kat zonder neon"],
)  # fmt: skip
def test_what_is_left_out_stays_left_out(prompt: str) -> None:
    words = {word.stem: word.negated for word in read_words(understand(prompt).text)}
    assert words["neon"] and not words["cat"]


@pytest.mark.parametrize(
    "prompt",
    ["a neon elephant on a blue background", "asdf qwer", "eleph", "<lora:x:1>",
     "masterpiece, best quality, 8k", "a die-cast car", "", "12345", "a piñata", "k", "zzz qqq"],
)  # fmt: skip
def test_english_and_nonsense_are_left_alone(prompt: str) -> None:
    assert understand(prompt).text == prompt and understand(prompt).problem == ""


@pytest.mark.parametrize(
    ("prompt", "said"),
    [("ꙮ", ""), ("ふにゃらかちょめ", "理解"), ("龘靐齉", "无法理解"), ("뷁뷁", "이해할 수")],
)
def test_what_is_not_understood_is_said_in_its_language(prompt: str, said: str) -> None:
    assert said in understand(prompt).problem
    assert (understand(prompt).problem == "") == (said == "")


def test_words_that_are_not_understood_are_named() -> None:
    found = understand("eine Katze mit Schnurrbarthaaren")
    assert found.text == "cat" and found.problem == "Nicht verstanden: schnurrbarthaaren."
