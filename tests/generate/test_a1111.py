"""What we write is read by A1111's own rules, written here anew; and what A1111 writes by us."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autolora.generate.report import (
    BaseModel,
    Report,
    UsedAdapter,
    write_parameters,
)
from autolora.infotext import read_parameters
from autolora.prompt_syntax import parse_prompt

# The rules of A1111's infotext reader, as its re_param and parse_generation_parameters have them.
PARAM = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
NETWORK = re.compile(r"<(\w+):([^>]+)>")


def parse(text: str) -> tuple[str, str, dict[str, str]]:
    """Read a text by those rules: prompt, negative prompt, settings."""
    *lines, last = text.strip().split("\n")
    if len(PARAM.findall(last)) < 3:
        lines.append(last)
        last = ""
    prompt = negative = ""
    in_negative = False
    for line in lines:
        line = line.strip()
        if line.startswith("Negative prompt:"):
            in_negative, line = True, line[16:].strip()
        if in_negative:
            negative += ("" if negative == "" else "\n") + line
        else:
            prompt += ("" if prompt == "" else "\n") + line
    settings = {}
    for name, value in PARAM.findall(last):
        if value[:1] == '"' and value[-1:] == '"':
            value = json.loads(value)
        settings[name] = value
    return prompt, negative, settings


def lora_hashes(settings: dict[str, str]) -> dict[str, str]:
    """Read the hashes as A1111's extension does when a text is pasted."""
    pairs = [pair.strip().split(":", 1) for pair in settings["Lora hashes"].split(",")]
    return {name.strip().replace(",", ""): digest.strip() for name, digest in pairs}


def make_report(prompt: str = "a neon cat", negative: str = "", **changes) -> Report:
    values = {
        "model": "tiny",
        "strategy": "gated",
        "seed": 2**53 + 1,
        "steps": 20,
        "width": 128,
        "height": 96,
        "guidance": 3.5,
        "adapters": [UsedAdapter("neon", 0.8, "asked for", data_sha256="ab" * 32)],
        "base": BaseModel(
            "tiny", "float8", "float32", "cpu", 1, {"transformer": "sha256:0123456789abcdef"}
        ),
        "versions": {"autolora": "0.1.0"},
        **changes,
    }
    return Report(prompt, prompt, negative, **values)


def without_tags(prompt: str) -> str:
    return NETWORK.sub("", prompt).rstrip()


def test_the_whole_text() -> None:
    assert write_parameters(make_report(negative="dogs, cats")).splitlines() == [
        "a neon cat <lora:neon:0.8>",
        "Negative prompt: dogs, cats",
        "Steps: 20, Sampler: Euler, Schedule type: Simple, CFG scale: 3.5, Seed: 9007199254740993, "
        "Size: 128x96, Model hash: 0123456789, Model: tiny, RNG: CPU, "
        'Lora hashes: "neon: abababababab", Version: AutoLoRA 0.1.0',
    ]


def test_embedded_guidance_is_written_as_forge_does() -> None:
    settings = parse(write_parameters(make_report(true_cfg=1.0)))[2]
    assert settings["CFG scale"] == "1" and settings["Distilled CFG Scale"] == "3.5"


NASTY = [
    "a cat",
    'a "quoted" cat, with: colons, and \\ backslashes \\n',
    "Steps: 3",
    "Steps: 3, Sampler: Fake, CFG scale: 9, Seed: 1, Size: 1x1",
    "a cat\nSteps: 3, Sampler: Fake, CFG scale: 9, Seed: 1, Size: 1x1",
    "two\n\nlines\r\nand a third",
    "一只霓虹色的猫、水彩",
    "🐈 cat 🌈",
    "(cat:1.2), [dog|cat], {a|b}",
    "x" * 5000,
    'a cat "Lora hashes: neon: 000"',
]


@pytest.mark.parametrize("prompt", NASTY, ids=lambda text: text[:20])
@pytest.mark.parametrize("negative", ["", 'dogs, "ugly": yes', "two\nlines: a, b", "🐕 狗"])
def test_nasty_prompts_come_back_by_a1111s_rules(prompt: str, negative: str) -> None:
    text = write_parameters(make_report(prompt, negative))
    found_prompt, found_negative, settings = parse(text)
    assert without_tags(found_prompt) == prompt.replace("\r\n", "\n")
    assert found_negative == negative
    assert (settings["Steps"], settings["Seed"]) == ("20", str(2**53 + 1))
    assert (settings["Sampler"], settings["Size"]) == ("Euler", "128x96")
    assert NETWORK.findall(found_prompt)[-1] == ("lora", "neon:0.8")


def test_a_prompt_cannot_begin_the_negative_prompt() -> None:
    report = make_report("Negative prompt: all of this\n  Negative prompt: this", "dogs")
    prompt, negative, _ = parse(write_parameters(report))
    assert without_tags(prompt) == "Negative prompt : all of this\nNegative prompt : this"
    assert negative == "dogs"


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("neon", "neon"),
        ("Neon Style v2", "Neon Style v2"),
        ('the "best", really: yes', "the best really yes"),
        ("a\nb", "a b"),
        ("x>y<z", "x y z"),
        ("霓虹", "霓虹"),
        ("sub/neon", "sub/neon"),
        ("it's", "it's"),
    ],
)
def test_names_agree_in_tag_and_hashes(name: str, plain: str) -> None:
    adapters = [
        UsedAdapter(name, 0.5, "asked for", data_sha256="0123456789abcdef" * 4),
        UsedAdapter("other", -1.0, "asked for", data_sha256="ff" * 32),
        UsedAdapter("unknown", 1.0, "asked for"),
    ]
    prompt, _, settings = parse(write_parameters(make_report(adapters=adapters)))
    assert [inside for _, inside in NETWORK.findall(prompt)] == [
        f"{plain}:0.5",
        "other:-1",
        "unknown:1",
    ]
    assert lora_hashes(settings) == {plain: "0123456789ab", "other": "f" * 12}


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def lines_of(text: str) -> str:
    """What survives A1111's reader: lines without blanks at their ends."""
    joined = "\n".join(
        line.strip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    )
    return joined.strip("\n")


@given(text, text)
def test_any_prompt_survives(typed: str, negative: str) -> None:
    typed, negative = f"cat {typed}", negative.strip()
    if "negative prompt" in (typed + negative).lower() or "<" in typed:
        return
    written = write_parameters(make_report(parse_prompt(typed).text, negative))
    prompt, found, settings = parse(written)
    assert prompt == f"{parse_prompt(typed).text.strip()} <lora:neon:0.8>"
    assert found == lines_of(negative)
    assert settings["Version"] == "AutoLoRA 0.1.0"
    ours = read_parameters(written)
    assert (ours.prompt, ours.negative_prompt, ours.settings) == (prompt, found, settings)


@given(st.text(max_size=80))
def test_any_text_can_be_read(text: str) -> None:
    prompt, negative, settings = parse_or_skip(text)
    found = read_parameters(text)
    assert (found.prompt, found.negative_prompt, found.settings) == (prompt, negative, settings)


def parse_or_skip(text: str) -> tuple[str, str, dict[str, str]]:
    try:
        return parse(text)
    except ValueError:
        found = read_parameters(text)  # broken quotes: it is enough that they are no error
        return found.prompt, found.negative_prompt, found.settings


def test_blank_lines_at_the_beginning_do_not_count() -> None:
    settings = "Steps: 1, Sampler: Euler, Seed: 2"
    written = f"a cat\n\nat night\nNegative prompt:\n\ndogs\n\ncats\n{settings}"
    found = read_parameters(written)
    assert (found.prompt, found.negative_prompt) == parse(written)[:2]
    assert found.negative_prompt == "dogs\n\ncats"


@pytest.mark.parametrize("line", ["a" * 500_000, "a: " + " " * 500_000 + "b", 'a1:"' * 100_000])
def test_endless_lines_are_read_in_time(line: str) -> None:
    # By A1111's own pattern these take hours.
    assert read_parameters(line).prompt[:2] in (line[:2], "")


def test_fewer_than_three_settings_are_a_line_of_the_prompt() -> None:
    for last in ("Steps: 3, Seed: 4", "Steps: 3"):
        text = f"a cat\n{last}"
        assert parse(text)[0] == text
        found = read_parameters(text)
        assert (found.prompt, found.settings) == (text, {})
    assert read_parameters("a cat\nSteps: 3, Seed: 4, Size: 8x8").prompt == "a cat"


def test_a_text_of_a1111_is_read() -> None:
    found = read_parameters(
        "masterpiece, <lora:neon:1>\nsecond line\nNegative prompt: ugly\nSteps: 28, Sampler: "
        'DPM++ 2M Karras, CFG scale: 7, Seed: 5, Size: 512x768, Lora hashes: "neon: 0a1b2c3d4e5f"'
    )
    assert found.prompt == "masterpiece, <lora:neon:1>\nsecond line"
    assert found.negative_prompt == "ugly"
    assert found.settings["Lora hashes"] == "neon: 0a1b2c3d4e5f"
    assert found.settings["Sampler"] == "DPM++ 2M Karras"


def test_json_is_a_whole_value() -> None:
    """Civitai and ComfyUI's savers write lists and objects without quotes around them."""
    resources = [
        {"type": "checkpoint", "modelVersionId": 1, "modelName": "A [XL], {b}"},
        {"type": "lora", "weight": 0.7, "modelName": 'neon, city: "night"'},
    ]
    hashes = {"model": "0123456789", "LORA:neon, city": "abcdef012345"}
    found = read_parameters(
        "a cat\nSteps: 8, Sampler: Euler, Seed: 1, "
        f"Civitai resources: {json.dumps(resources)}, Hashes: {json.dumps(hashes)}}}), "
        "Civitai metadata: {}, Version: v1"
    )
    assert json.loads(found.settings["Civitai resources"]) == resources
    assert json.loads(found.settings["Hashes"]) == hashes
    assert found.settings["Civitai metadata"] == "{}" and found.settings["Version"] == "v1"


@pytest.mark.parametrize("value", ["[unclosed", "{1: 2}", "[" * 5000, '["a, "b"]'])
def test_what_only_looks_like_json_ends_at_the_comma(value: str) -> None:
    found = read_parameters(f"a cat\nSteps: 8, Odd: {value}, Seed: 1, Size: 8x8").settings
    assert found["Steps"] == "8" and found["Seed"] == "1" and found["Size"] == "8x8"
