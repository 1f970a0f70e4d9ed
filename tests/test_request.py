"""Tags, trigger words, sizes and file names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autolora.errors import GenerationError
from autolora.request import (
    AskedLoRA,
    add_triggers,
    merge_asked,
    parse_lora,
    parse_prompt,
    parse_size,
    slug,
)


@pytest.mark.parametrize(
    ("prompt", "text", "loras"),
    [
        ("a cat", "a cat", []),
        ("a cat <lora:neon:0.8>", "a cat", [("neon", 0.8)]),
        ("<lora:neon> a cat", "a cat", [("neon", None)]),
        ("a <LoRA:neon v2:-.5> cat", "a cat", [("neon v2", -0.5)]),
        ("a cat, <lora:a:1>, <lora:b:0>, at night", "a cat, at night", [("a", 1.0), ("b", 0.0)]),
        ("a cat <lora:a:0.5:0.9>.", "a cat.", [("a", 0.9)]),
        ("1 < 2 and 3 > 2", "1 < 2 and 3 > 2", []),
        ("<lora:only:1>", "", [("only", 1.0)]),
        ("<lora:style/neon.v1:1e-1> x", "x", [("style/neon.v1", 0.1)]),
    ],
)
def test_tags_are_taken_out(prompt: str, text: str, loras: list) -> None:
    parsed = parse_prompt(prompt)
    assert parsed.text == text
    assert [(lora.name, lora.strength) for lora in parsed.loras] == loras


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "prompt is empty"),
        (" \n\t", "prompt is empty"),
        ("a" * 10_001, "10001 characters"),
        ("a cat \udcff", "not valid text"),
        ("a cat <lora:>", "without a name"),
        ("a cat <lora: :1>", "without a name"),
        ("a cat <lora:neon:much>", "'much' of LoRA 'neon' is not a number"),
        ("a cat <lora:neon:nan>", "out of range"),
        ("a cat <lora:neon:inf>", "out of range"),
        ("a cat <lora:neon:11>", "out of range"),
        ("a cat <lora:neon:1:1:1>", "not understood"),
    ],
)
def test_wrong_prompts(prompt: str, words: str) -> None:
    with pytest.raises(GenerationError, match=words):
        parse_prompt(prompt)


def test_loras_from_the_shell() -> None:
    assert parse_lora("neon") == AskedLoRA("neon")
    assert parse_lora("neon:0.8") == AskedLoRA("neon", 0.8)
    assert parse_lora("a:b:0.8") == AskedLoRA("a:b", 0.8)
    for wrong in (":0.8", "neon:", "neon:x", "neon:nan"):
        with pytest.raises(GenerationError):
            parse_lora(wrong)


names = st.text("abc _-.é", min_size=1).map(str.strip).filter(bool)
strengths = st.floats(-10, 10).map(lambda value: round(value, 3))


@given(st.lists(st.tuples(names, strengths), max_size=4), st.text("xyz ,", max_size=20))
def test_tags_come_back_as_they_were_written(pairs, text) -> None:
    prompt = text + "".join(f" <lora:{name}:{value}>" for name, value in pairs)
    if not prompt.strip():
        return
    parsed = parse_prompt(prompt)
    assert [(lora.name, lora.strength) for lora in parsed.loras] == pairs
    assert "<" not in parsed.text
    assert parsed.text.replace(",", " ").split() == text.replace(",", " ").split()


@given(st.text("ab ,.;:<>\n\t", max_size=30).filter(lambda text: bool(text.strip())))
def test_what_the_model_reads_is_read_the_same_again(text: str) -> None:
    once = parse_prompt(text).text
    assert not once or parse_prompt(once).text == once


def test_later_requests_win() -> None:
    merged = merge_asked([AskedLoRA("a", 1.0), AskedLoRA("b")], [AskedLoRA("a", 0.5)])
    assert merged == [AskedLoRA("a", 0.5), AskedLoRA("b")]


@pytest.mark.parametrize(
    ("text", "triggers", "result"),
    [
        ("a cat", ["neon"], "a cat, neon"),
        ("a Neon cat", ["neon"], "a Neon cat"),
        ("a neonish cat", ["neon"], "a neonish cat, neon"),
        ("line  art of a cat", ["line art"], "line  art of a cat"),
        ("a cat", ["neon", "NEON", "glow"], "a cat, neon, glow"),
        ("a cat (x+y)", ["x+y"], "a cat (x+y)"),
        ("", ["neon"], "neon"),
        ("a cat", ["", " , ", "<lora:other:1>"], "a cat"),
        ("a cat", ["<lora:other:1> glow"], "a cat, glow"),
    ],
)
def test_missing_trigger_words_are_added_once(text: str, triggers: list, result: str) -> None:
    assert add_triggers(text, triggers)[0] == result
    assert add_triggers(result, triggers)[1] == []


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A neon elephant, on blue!", "a-neon-elephant-on-blue"),
        ("../../etc/passwd", "etc-passwd"),
        ("<lora:x:1> cat", "cat"),
        ("🐘", "picture"),
        ("ein Bär", "ein-bär"),
    ],
)
def test_file_names(prompt: str, name: str) -> None:
    assert slug(prompt) == name
    assert len(slug(prompt * 30)) <= 48


def test_sizes() -> None:
    assert parse_size("128x64") == (128, 64)
    assert parse_size(" 96 ") == (96, 96)
    for wrong in ("", "x", "1x2x3", "-64x64", "64.5x64", "axb", "٦٤", "9" * 5000):
        with pytest.raises(GenerationError, match="WIDTHxHEIGHT"):
            parse_size(wrong)
