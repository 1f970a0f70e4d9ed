"""LoRA units: every way to write one is the same value; what is wrong is one sentence."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autolora.errors import GenerationError
from autolora.unit import (
    MAX_STRENGTH,
    LoRAUnit,
    acts_in,
    check_steps,
    matching_layers,
    merge_units,
    parse_lora,
    read_units,
    steps_text,
)


@pytest.mark.parametrize(
    ("raw", "unit"),
    [
        ("neon", LoRAUnit("neon")),
        ("neon:0.8", LoRAUnit("neon", 0.8)),
        (("neon", 1), LoRAUnit("neon", 1.0)),
        ({"name": "neon", "weight": 0.5}, LoRAUnit("neon", 0.5)),
        ({"name": "neon", "steps": "3-8"}, LoRAUnit("neon", steps=(3, 8))),
        ({"name": "neon", "steps": [3, 8]}, LoRAUnit("neon", steps=(3, 8))),
        ({"name": "neon", "steps": "3-"}, LoRAUnit("neon", steps=(3, None))),
        ({"name": "neon", "steps": "-8"}, LoRAUnit("neon", steps=(1, 8))),
        ({"name": "neon", "steps": [None, 8]}, LoRAUnit("neon", steps=(1, 8))),
        ({"name": "neon", "steps": "3"}, LoRAUnit("neon", steps=(3, 3))),
        ({"name": "neon", "layers": "blocks.*"}, LoRAUnit("neon", layers=("blocks.*",))),
        ({"path": "a/b.safetensors"}, LoRAUnit("b", path=Path("a/b.safetensors"))),
        ("a/b.safetensors:0.5", LoRAUnit("b", 0.5, path=Path("a/b.safetensors"))),
        ("a/b.safetensors", LoRAUnit("b", path=Path("a/b.safetensors"))),
        ((Path("a/b.safetensors"), 0.5), LoRAUnit("b", 0.5, path=Path("a/b.safetensors"))),
        ({"name": "x", "path": "b.safetensors"}, LoRAUnit("x", path=Path("b.safetensors"))),
        ({"name": "neon", "enabled": False}, LoRAUnit("neon", enabled=False)),
    ],
)
def test_every_way_to_write_a_unit(raw, unit: LoRAUnit) -> None:
    assert read_units([raw]) == (unit,) == read_units([unit.to_dict()])


def test_a_table_of_strengths_is_units_too() -> None:
    assert read_units({"a": 0.5, "b": None}) == (LoRAUnit("a", 0.5), LoRAUnit("b"))
    assert read_units(None) == read_units([]) == ()


@pytest.mark.parametrize(
    ("raw", "words", "where"),
    [
        ([{"name": "neon", "stepz": "1-2"}], "did you mean [0].steps?", "[0].stepz"),
        ([{"name": "neon", True: 1}], "[0]", None),
        ([{"name": "neon", "steps": "8-3"}], "must go up", "[0].steps"),
        ([{"name": "neon", "steps": "3-0"}], "must go up", "[0].steps"),
        ([{"name": "neon", "steps": "0-3"}], "from step 1 on", "[0].steps"),
        ([{"name": "neon", "steps": [1, 2, 3]}], "must be such as 3-8", "[0].steps"),
        ([{"name": "neon", "steps": [True, 2]}], "must be such as 3-8", "[0].steps"),
        ([{"name": "neon", "steps": "-"}], "must be such as 3-8", "[0].steps"),
        ([{"name": "neon", "steps": 0.5}], "must be such as 3-8", "[0].steps"),
        ([{"name": "neon", "strength": math.nan}], "out of range", None),
        ([{"name": "neon", "strength": MAX_STRENGTH + 1}], "out of range", None),
        ([{"name": "neon", "strength": "much"}], "not a number", None),
        ([{"name": "neon", "strength": True}], "not a number", None),
        ([{"name": "neon", "text_encoder": math.inf}], "out of range", None),
        ([{"name": "neon", "weight": 1, "strength": 1}], "which are the same", "[0]"),
        ([{"name": "neon", "enabled": "no"}], "must be true or false", "[0].enabled"),
        ([{"name": "neon", "layers": [3]}], "must be text", "[0].layers[0]"),
        ([{"name": 3}], "must be text", "[0].name"),
        ([{"path": 3}], "must be a path", "[0].path"),
        ([{}], "without a name", None),
        ([{"name": " "}], "without a name", None),
        ([3], "must be a name such as", "[0]"),
        (["a", "a:1"], "'a' is given twice", None),
        (["x/a.safetensors", "a"], "'a' is given twice", None),
        ("neon", "must be a list", ""),
        ([str(n) for n in range(65)], "at most 64", ""),
    ],
)
def test_what_is_wrong_with_units_is_one_sentence(raw, words: str, where) -> None:
    with pytest.raises(GenerationError) as caught:
        read_units(raw)
    sentence = str(caught.value)
    assert words in sentence and "\n" not in sentence
    assert where is None or caught.value.where == where


def test_files_and_names_are_told_apart_in_the_shell() -> None:
    assert parse_lora("a.safetensors").path == Path("a.safetensors")
    assert parse_lora("a.SAFETENSORS:0.5").strength == 0.5
    assert parse_lora("a/b").path is None and parse_lora("a/b").name == "a/b"
    with pytest.raises(GenerationError, match="not a number"):
        parse_lora("a.safetensors:much")


limits = st.none() | st.tuples(st.integers(1, 9), st.none() | st.integers(1, 9)).filter(
    lambda pair: pair[1] is None or pair[0] <= pair[1]
)


@given(limits, st.integers(1, 9))
def test_a_unit_acts_from_its_first_to_its_last_step(steps, step: int) -> None:
    first, last = steps or (1, None)
    assert acts_in(steps, step) == (step in range(first, (last or 9) + 1))
    if steps is not None:
        unit = LoRAUnit("a", steps=steps)
        assert read_units([{"name": "a", "steps": steps_text(steps)}]) == (unit,)


def test_steps_are_steps_of_the_picture() -> None:
    check_steps([LoRAUnit("a", steps=(1, 4)), LoRAUnit("b"), LoRAUnit("c", steps=(4, None))], 4)
    for steps in ((1, 5), (5, None)):
        with pytest.raises(GenerationError, match=r"'a' acts in steps .*, and the picture has 4"):
            check_steps([LoRAUnit("a", steps=steps)], 4)


def test_patterns_choose_layers() -> None:
    known = ["blocks.0.a", "blocks.1.a", "single.0"]
    assert matching_layers(LoRAUnit("x", layers=("blocks.?.a",)), known) == known[:2]
    with pytest.raises(GenerationError, match=r"no layer 'double\.\*'.*blocks\.0\.a"):
        matching_layers(LoRAUnit("x", layers=("single.*", "double.*")), known)


def test_later_units_win_whole() -> None:
    early, late = LoRAUnit("a", 1.0, steps=(1, 2)), LoRAUnit("a", 0.5)
    assert merge_units([early, LoRAUnit("b")], [late]) == [late, LoRAUnit("b")]
