"""Errors carry what they are made of, and are sentences all the same."""

import copy
import pickle

import pytest

from autolora.errors import GenerationError, Message


def test_a_message_is_its_sentence_with_template_and_values() -> None:
    inner = Message("did you mean {}?", "neon")
    message = Message("no LoRA {}; {}", "nein", inner)
    assert message == "no LoRA nein; did you mean neon?" and isinstance(message, str)
    assert message.to_dict() == {"template": "no LoRA {}; {}", "values": ["nein", inner.to_dict()]}
    assert message.sentence() == "No LoRA nein; did you mean neon?."
    assert Message(message) is message


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_the_parts(again) -> None:
    message = Message("{} of {{{}}}", 1, "a {b} c")
    other = again(message)
    assert (other, other.template, other.values) == (message, message.template, message.values)


def test_a_text_without_values_is_taken_as_it_is() -> None:
    error = GenerationError("The file {x} {} is odd.")
    assert str(error) == "The file {x} {} is odd." == error.to_dict()["template"]


def test_an_error_says_what_and_advises() -> None:
    error = GenerationError("{} is there already", "neon", advice="take another.", where="name")
    assert str(error) == "neon is there already; take another."
    assert (error.what, error.advice, error.where) == (
        "neon is there already",
        "take another.",
        "name",
    )
    assert error.to_dict() == {
        "error": "neon is there already; take another.",
        "where": "name",
        "template": "{} is there already; {}",
        "values": ["neon", {"template": "take another.", "values": []}],
    }
    assert pickle.loads(pickle.dumps(error)).args == error.args
