"""What the page says in another language than the program's, and that it knows what is said."""

# ruff: noqa: RUF001 (Chinese has brackets and colons of its own)

import re

import pytest

from autolora.console.api import check_upload_name
from autolora.console.i18n import (
    CHINESE,
    CHINESE_ERRORS,
    ENGLISH,
    ENGLISH_ERRORS,
    MESSAGES,
    PHRASES,
    compiled,
)
from autolora.errors import AutoLoRAError
from tests.console.asking import ask


def say(sentence, language: str = "zh") -> str:
    """What `say` of core.js gives."""
    if not isinstance(sentence, str):
        template, values = sentence["template"], sentence["values"]
        said = MESSAGES.get(language, {}).get(template)
        if said is None and "error" in sentence:
            return say(sentence["error"], language)
        said, places = said or template, iter(range(len(values)))
        return re.sub(
            r"\{(\d*)\}", lambda p: say(values[int(p[1] or next(places))], language), said
        )
    for pattern, said in compiled(PHRASES.get(language, {})):
        if found := re.match(pattern, sentence):
            return re.sub(r"\{(\d+)\}", lambda place: say(found[int(place[1]) + 1], language), said)
    return sentence


@pytest.mark.parametrize("templates", [CHINESE, ENGLISH], ids=["zh", "en"])
def test_every_part_of_a_sentence_is_kept(templates) -> None:
    for english, other in templates.items():
        parts = english.count("{}")
        sentence = english.replace("{}", "%s") % tuple(f"<{n}>" for n in range(parts))
        ((pattern, said),) = compiled({english: other})
        found = re.match(pattern, sentence)
        assert found and found.groups() == tuple(f"<{n}>" for n in range(parts)), english
        places = {int(n) for n in re.findall(r"\{(\d+)\}", said)}
        assert places == set(range(parts)) and "{}" not in said, english


@pytest.mark.parametrize("templates", [CHINESE_ERRORS, ENGLISH_ERRORS], ids=["zh", "en"])
def test_every_value_of_an_error_is_kept(templates) -> None:
    for english, other in templates.items():
        parts = english.count("{}")
        numbered = {int(n) for n in re.findall(r"\{(\d+)\}", other)}
        if "No LoRA named" in english:  # the folder of the pool is nobody's business
            assert numbered == {0, 2, 3} and parts == 4
        else:
            assert other.count("{}") + len(numbered) == parts, english


def test_sentences_inside_sentences_are_translated_in_their_turn() -> None:
    inside = 'its weights look like "neon" (0.61)'
    assert say(inside) == "它的权重像“neon”（0.61）"
    assert say(f"Left out: {inside}") == "未使用：它的权重像“neon”（0.61）"
    assert say("Nobody ever said this.") == "Nobody ever said this."
    assert say("a $1 {0} <b>", "en") == "a $1 {0} <b>"


def test_every_reason_to_take_an_adapter_is_known(studio) -> None:
    prompts = ("a neon elephant", "an elphnt animal", "a rocket in neon", "elephants", "glow")
    whys = {hit.why for prompt in prompts for hit in studio.desk.search(prompt, 10)}
    assert len({re.sub(r'".*?"|[\d.]+', "", why) for why in whys}) >= 3, whys
    assert all(say(why) != why for why in whys)


def sentence_of(call) -> dict:
    with pytest.raises(AutoLoRAError) as caught:
        call()
    said = caught.value.to_dict()
    assert said["template"] in CHINESE_ERRORS, said["template"]
    return said


def test_what_people_do_wrong_on_the_page_is_said_in_chinese(studio) -> None:
    orders = [
        ask(" "),
        ask("x" * 100_000),
        ask("a cat <lora:nobody:1>"),
        ask("a cat <lora:rockte>"),
        ask("<lora:neon:1>"),
        ask("a cat", guidance=1000.0),
        ask("a cat", width=8, height=64),
        ask("a cat", style="nothing"),
    ]
    sentences = [sentence_of(lambda order=order: studio.submit(order, "me")) for order in orders]
    sentences += [
        sentence_of(lambda: ask("a cat", steps=51)),
        sentence_of(lambda: ask("a cat", count=0)),
        sentence_of(lambda: ask("a cat", seed=-7)),
        sentence_of(lambda: ask("a cat", pinned={"neon": 99})),
        sentence_of(lambda: studio.save_style("x", "", ask(""))),
        sentence_of(lambda: check_upload_name("model.ckpt")),
        sentence_of(lambda: check_upload_name("../x.safetensors")),
    ]
    sentences += [sentence_of(lambda: ask("a cat", loras=["neon", "neon"]))]
    for sentence in sentences:
        chinese = say(sentence)
        assert re.search(r"[\u4e00-\u9fff]", chinese), sentence
        assert "`" not in chinese, "nothing of the shell"


def test_the_page_speaks_of_itself_and_not_of_the_shell(studio) -> None:
    sentence = sentence_of(lambda: studio.plan(ask("a <lora:qqqqqqqq:1>")))
    said = say(sentence, "en")
    assert (
        said
        == "There is no 'qqqqqqqq' among the pool's 3 LoRAs; “Add from pool” shows all of them."
    )
