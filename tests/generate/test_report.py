"""Reports survive the way through a file, and damaged ones are told from good ones."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autolora.errors import GenerationError
from autolora.generate.report import BaseModel, Report, UsedAdapter

text = st.text(max_size=40)
number = st.floats(allow_nan=False, allow_infinity=False)
adapters = st.builds(
    UsedAdapter,
    name=text,
    strength=number,
    why=text,
    score=st.none() | number,
    sha256=text,
    layers=st.integers(0, 1000),
    triggers=st.lists(text, max_size=2),
    gate=st.none() | number,
    channels=st.dictionaries(text, number, max_size=2),
    data_sha256=text,
)
reports = st.builds(
    Report,
    prompt=text,
    used_prompt=text,
    negative_prompt=text,
    model=text,
    strategy=text,
    seed=st.integers(0, 2**63 - 1),
    steps=st.integers(1, 200),
    width=st.integers(64, 2048),
    height=st.integers(64, 2048),
    guidance=number,
    sigma_shift=st.none() | number,
    true_cfg=st.none() | number,
    text_encoders=st.booleans(),
    batch=st.lists(st.integers(0, 2**63 - 1), max_size=3),
    adapters=st.lists(adapters, max_size=2),
    base=st.none()
    | st.builds(
        BaseModel,
        kind=text,
        storage=text,
        compute=text,
        device=text,
        threads=st.integers(0, 64),
        files=st.dictionaries(text, text, max_size=2),
    ),
    notes=st.lists(text, max_size=2),
    timings=st.just({}),
    versions=st.dictionaries(text, text, max_size=2),
)


@given(reports)
def test_reports_survive_json(report: Report) -> None:
    written = json.loads(report.texts()["autolora"])
    assert written.pop("version") == 1
    assert Report.from_dict(written) == report


def plain(**changes) -> dict:
    report = Report("a", "a", "", "tiny", "sum", 0, 2, 64, 64, 3.0)
    report.adapters = [UsedAdapter("neon", 1.0, "asked for")]
    report.base = BaseModel("tiny", "float8", "float32", "cpu")
    return {**report.to_dict(), **changes}


def test_keys_of_other_versions_are_passed_over() -> None:
    assert Report.from_dict(plain(new_thing=3)) == Report.from_dict(plain())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": "7"}, "seed is '7'"),
        ({"seed": True}, "seed is True"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"guidance": None}, "guidance is None"),
        ({"prompt": ["a"]}, "prompt is"),
        ({"notes": [1]}, "notes[0] is 1"),
        ({"batch": [1.5]}, "batch[0] is 1.5"),
        ({"timings": {"total": "1"}}, "timings.total is"),
        ({"adapters": "neon"}, "adapters is"),
        ({"adapters": ["neon"]}, "adapters[0] must hold keys and values"),
        ({"adapters": [{"name": "neon"}]}, "strength is missing"),
        ({"adapters": [{"name": 1, "strength": 1, "why": ""}]}, "adapters[0].name is 1"),
        ({"base": []}, "base must hold keys and values"),
        ({"base": {"kind": "tiny"}}, "storage is missing"),
    ],
)
def test_damage_is_named(changes: dict, words: str) -> None:
    with pytest.raises(GenerationError, match="report is damaged") as caught:
        Report.from_dict(plain(**changes))
    assert words in str(caught.value)


def test_what_must_be_there() -> None:
    data = plain()
    del data["seed"]
    with pytest.raises(GenerationError, match="seed is missing"):
        Report.from_dict(data)
