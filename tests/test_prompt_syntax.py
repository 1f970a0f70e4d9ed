"""Tags, weights, choices and wildcards; trigger words, sizes and file names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autolora.errors import GenerationError
from autolora.prompt_syntax import add_triggers, escape, parse_prompt, plain_text, slug
from autolora.request import parse_size
from autolora.unit import LoRAUnit, merge_units, parse_lora


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
        ("a cat <lora:neon:21>", "out of range"),
        ("a cat <lora:neon:unet=x>", "'x' of LoRA 'neon' is not a number"),
    ],
)
def test_wrong_prompts(prompt: str, words: str) -> None:
    with pytest.raises(GenerationError, match=words):
        parse_prompt(prompt)


def test_loras_from_the_shell() -> None:
    assert parse_lora("neon") == LoRAUnit("neon")
    assert parse_lora("neon:0.8") == LoRAUnit("neon", 0.8)
    assert parse_lora("a:b:0.8") == LoRAUnit("a:b", 0.8)
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
    merged = merge_units([LoRAUnit("a", 1.0), LoRAUnit("b")], [LoRAUnit("a", 0.5)])
    assert merged == [LoRAUnit("a", 0.5), LoRAUnit("b")]


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


@pytest.mark.parametrize(
    ("tag", "lora", "unused"),
    [
        ("<lora:foo:0.8:lbw=IN02>", ("foo", 0.8), "lbw=IN02"),
        ('<lora:"lora name":1:1:lbw=0,0,1>', ("lora name", 1.0), "lbw=0,0,1"),
        ('<lora:"a:b">', ("a:b", None), ""),
        ("<lora:foo:unet=0.8>", ("foo", 0.8), ""),
        ("<lora:foo:te=0.5:unet=0.8>", ("foo", 0.8), "te=0.5"),
        ("<lora:foo:te=0.5>", ("foo", 0.5), ""),
        ("<lora:foo:dyn=64>", ("foo", None), "dyn=64"),
        ("<lora:foo:0.8:in=0:mid=1>", ("foo", 0.8), "in=0, mid=1"),
        ("<lora:foo:1:0.9:32>", ("foo", 0.9), "te=1, 32"),
        ("<lora:foo:0.8:MIDD:stop=12>", ("foo", 0.8), "MIDD, stop=12"),
        ("<lora:foo:0@0,0.6@0.5>", ("foo", 0.6), ""),
        ("<lora:slider:-17.5>", ("slider", -17.5), ""),
        ("<lyco:foo:0.7>", ("foo", 0.7), ""),
        ("<LyCO:foo>", ("foo", None), ""),
        (r"<lora:Style\add_detail:1>", (r"Style\add_detail", 1.0), ""),
        ("<lora:foo [v1, overfit]:1>", ("foo [v1, overfit]", 1.0), ""),
    ],
)
def test_tags_of_other_programs(tag: str, lora: tuple, unused: str) -> None:
    parsed = parse_prompt(f"a cat, {tag} at night")
    assert parsed.text == "a cat, at night"
    assert [(asked.name, asked.strength) for asked in parsed.loras] == [lora]
    if unused:
        (note,) = parsed.notes
        assert f"{unused} was not used" in note and tag.rstrip(">") in note.replace("\\\\", "\\")
    else:
        assert parsed.notes == ()


@pytest.mark.parametrize(
    ("prompt", "text", "words"),
    [
        ("a cat <hypernet:foo:1>", "a cat", "<hypernet:foo:1> means nothing here"),
        ("a <segment:face> cat", "a cat", "<segment:face> means nothing here"),
        ("a <param[sigma shift]:3> cat", "a cat", "means nothing here"),
        ("a <random:red, blue> cat", "a red cat", "first, 'red'"),
        ("a <random:<wildcard:x>||blue> cat", "a blue cat", "wildcards"),
        ("a <wildcard:color> cat", "a cat", "<wildcard:color> names a file of wildcards"),
        ("a cat <break> a dog", "a cat a dog", "<break>"),
        ("embedding:EasyNegative, a cat", "a cat", "textual inversion"),
        ("a (neon:1.3) cat", "a neon cat", "Weights of words such as (neon:1.3)"),
        ("a [neon] cat", "a neon cat", "such as [neon]"),
        ("a ((neon)) cat", "a neon cat", "such as (neon)"),
        ("a ((neon:1.2) city: 0.9 ) cat", "a neon city cat", "such as (neon:1.2)"),
        ("a {neon} cat", "a neon cat", "such as {neon}"),
        ("a neon++ cat", "a neon cat", "such as"),
        ("a (neon city)1.3 cat", "a neon city cat", "such as (neon city)"),
        ("a {red|blue} cat", "a red cat", "{red|blue} is a choice; its first, 'red'"),
        ("a {0.5::red|2::blue} cat", "a red cat", "choice"),
        ("a {2$$red|blue|green} cat", "a red, blue cat", "choice"),
        ("a {{dark|light} red|blue} cat", "a dark red cat", "choice"),
        ("a [red|blue] cat", "a red cat", "[red|blue] is a choice"),
        ("a [red:blue:0.5] cat", "a blue cat", "changes the prompt between steps"),
        ("a cat [in a hat:10]", "a cat in a hat", "changes the prompt between steps"),
        ("a cat [in a hat::10]", "a cat in a hat", "changes the prompt between steps"),
        ("a __color__ cat", "a cat", "__color__ names a file of wildcards"),
        ("a __art/styles-2*__ cat", "a cat", "wildcards"),
        ("a cat BREAK at night", "a cat at night", "BREAK"),
        ("a cat <lora:neon:0.8, at night", "a cat, at night", "has no end"),
    ],
)
def test_what_is_left_out_is_said(prompt: str, text: str, words: str) -> None:
    parsed = parse_prompt(prompt)
    assert parsed.text == text
    assert any(words in note for note in parsed.notes), parsed.notes


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        (r"lucy \(cyberpunk\)", "lucy (cyberpunk)"),
        (r"a \[sic\] \{b\} \__c\__", "a [sic] {b} __c__"),
        (r"\<lora:neon:1>", "<lora:neon:1>"),
        (r"a \BREAK", "a BREAK"),
        (r"C:\new", r"C:\new"),
        ("<s0><s1> cat, <style>1234</style>", "<s0><s1> cat, <style>1234</style>"),
        ("the score (2:1 | 3", "the score (2:1 | 3"),
        ("a clock :) and 5) points", "a clock :) and 5) points"),
        ("make_my__day in C++ 18+", "make_my__day in C++ 18+"),
    ],
)
def test_what_means_itself_is_read_without_a_note(prompt: str, text: str) -> None:
    parsed = parse_prompt(prompt)
    assert (parsed.text, parsed.loras, parsed.notes) == (text, (), ())


def test_ratios_are_no_weights() -> None:
    assert parse_prompt("a screen (16:9) at (10:30)").text == "a screen 16:9 at 10:30"
    assert parse_prompt("level (no 3:1.2)").text == "level no 3"


@given(st.text(r"ab(){}[]<>|\_:+-,.1 BREAK", max_size=40))
def test_escaped_text_is_read_as_it_is(text: str) -> None:
    tidy = parse_prompt(f"x {escape(text)}").text
    assert parse_prompt(escape(tidy)).text == tidy
    assert tidy.replace(" ", "").replace(",", "") == f"x{text}".replace(" ", "").replace(",", "")
    assert parse_prompt(f"x {escape(text)}").notes == ()


COPIED = """masterpiece, <lora:neon:0.7> a knight
Negative prompt: lowres, blurry
Steps: 28, Sampler: DPM++ 2M, CFG scale: 6.5, Seed: 1234567, Size: 512x768, Hashes: {"a": "b, c"}"""


@pytest.mark.parametrize("text", [COPIED, COPIED.replace("\n", " "), COPIED.replace("\n", "\r\n")])
def test_pasted_parameters_are_recognised(text: str) -> None:
    parsed = parse_prompt(text)
    assert parsed.text == "masterpiece, a knight" and parsed.loras == (LoRAUnit("neon", 0.7),)
    assert parsed.pasted is not None
    assert parsed.pasted.negative_prompt == "lowres, blurry"
    assert parsed.pasted.settings["Size"] == "512x768"
    assert parsed.pasted.settings["Hashes"] == '{"a": "b, c"}'
    assert any("Steps: 28" in note for note in parsed.notes)


def test_few_settings_are_enough_and_words_are_none() -> None:
    found = parse_prompt("a cat, Steps: 20, Size: 512x512")
    assert found.text == "a cat" and found.pasted is not None
    for text in (
        "Steps: a short story, in two parts",
        "Title: a, Style: b, Mood: c",
        "a cat Steps: 3",
    ):
        assert parse_prompt(text).pasted is None


def test_negative_prompts_are_read_alike() -> None:
    words, notes = plain_text("(ugly:1.4), embedding:bad <lora:neon:1>", "The negative prompt")
    assert words == "ugly" and len(notes) == 3
    assert plain_text("", "The negative prompt") == ("", ())


def test_long_prompts_of_brackets_are_read_in_time() -> None:
    for text in (
        "(" * 4999 + ")" * 4999,
        "{a|" * 3000,
        "<" * 9999,
        "__" * 4999,
        "Steps: 1 " * 1000,
    ):
        assert parse_prompt(text + "a").text
