"""One request through every face: Python, shell, JSON lines, HTTP, the page, a style, a picture."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autolora.config import PipelineConfig
from autolora.errors import AutoLoRAError
from autolora.prompt_syntax import parse_prompt
from autolora.request import GenerateRequest, read_request

pytest.importorskip("gradio", reason="the console extra is not installed")

STEPS = {"name": "neon", "strength": 0.8, "steps": [1, 2]}
REQUESTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "words": {"negative_prompt": "grey", "use_triggers": False},
    "numbers": {"steps": 3, "width": 64, "height": 80, "guidance": 2.5, "top_k": 2},
    "adapters": {"loras": ["neon:0.8", "rocket"], "retrieve": False, "strategy": "sum"},
    "units": {"loras": [STEPS, {"name": "rocket", "layers": "single*", "text_encoder": 0.5}]},
}
"""By what they show, in the words of `GenerateRequest`."""
PROMPT = "a neon <lora:elephant:0.5> elephant"


def value(name: str) -> GenerateRequest:
    return read_request({"prompt": PROMPT, **REQUESTS[name]})


class Read(Exception):
    """Carries a request out of a face that was about to draw it."""


@pytest.fixture
def pipe(home: Path):
    from autolora.pipeline import AutoLoRAPipeline

    return AutoLoRAPipeline(PipelineConfig("random", pool=home / "pool", width=64, height=64))


def python(pipe, fields: dict[str, Any], monkeypatch) -> GenerateRequest:
    fields = dict(fields)
    if "width" in fields:
        fields["size"] = (fields.pop("width"), fields.pop("height"))
    monkeypatch.setattr(pipe._planner, "plan", _raise)
    with pytest.raises(Read) as caught:
        pipe(PROMPT, 0, **fields)
    return caught.value.args[0]


def _raise(asked: GenerateRequest, *_) -> None:
    raise Read(asked)


def shell(pipe, fields: dict[str, Any], monkeypatch) -> GenerateRequest:
    from autolora.cli import generate as command
    from autolora.cli import main

    if not all(isinstance(unit, str) for unit in fields.get("loras", [])):
        pytest.skip("the shell takes names and files; its styles take units")
    words = ["generate", PROMPT]
    flags = {"retrieve": "--no-retrieval", "use_triggers": "--no-triggers"}
    names = {"negative_prompt": "--negative", "top_k": "--top-k"}
    for name, given in fields.items():
        if name in flags:
            words.append(flags[name])
        elif name == "loras":
            words += [word for unit in given for word in ("--lora", unit)]
        elif name == "width":
            words += ["--size", f"{given}x{fields['height']}"]
        elif name != "height":
            words += [names.get(name, f"--{name}"), str(given)]
    found = []
    monkeypatch.setattr(command.Job, "check", lambda job, _: found.append(job.asked))
    monkeypatch.setattr(command.Job, "open_index", lambda *_: None)
    monkeypatch.setattr(command, "draw", lambda *_: None)
    assert main(words) == 0
    return found[0]


def lines(pipe, fields: dict[str, Any], monkeypatch) -> GenerateRequest:
    from autolora.cli.generate import read_line

    fields = {"prompt": PROMPT, **fields}
    if "width" in fields:
        fields["size"] = f"{fields.pop('width')}x{fields.pop('height')}"
    for name, short in (("negative_prompt", "negative"), ("use_triggers", "triggers")):
        if name in fields:
            fields[short] = fields.pop(name)
    return read_line(json.dumps(fields), {}, [], 1, None).asked


def http(pipe, fields: dict[str, Any], monkeypatch) -> GenerateRequest:
    from fastapi.testclient import TestClient

    from autolora.console.server import make_app
    from autolora.console.studio import Studio

    fields = dict(fields)
    for name, old in (("loras", "adapters"), ("retrieve", "automatic")):
        if name in fields:
            fields[old] = fields.pop(name)
    found = []

    def submit(studio, asked, *_) -> None:
        found.append(asked)
        raise AutoLoRAError("enough")

    monkeypatch.setattr(Studio, "submit", submit)
    monkeypatch.setattr(Studio, "indexing", lambda studio: None)
    app = make_app(Studio(pipe, Path("outputs")), page=False)
    with TestClient(app) as client:
        answer = client.post("/api/generate", json={"prompt": PROMPT, **fields})
    assert answer.json()["error"] == "enough"
    return found[0]


def page(pipe, fields: dict[str, Any], monkeypatch) -> GenerateRequest:
    from autolora.console.models import desk_of
    from autolora.console.page import VALUES, Forms

    asked = read_request({"prompt": PROMPT, **fields})
    form = {
        "prompt": PROMPT,
        "negative": asked.negative_prompt,
        "seed": 0,
        "steps": asked.steps or 20,
        "size": f"{asked.width or 64}x{asked.height or 64}",
        "guidance": asked.guidance or 3,
        "count": 1,
        "strategy": asked.strategy or "",
        "compare": False,
        "desk": json.loads(json.dumps({**desk_of(asked), "top_k": asked.top_k})),
    }
    return Forms(SimpleNamespace(pipe=pipe)).order(*(form[name] for name in VALUES))


def picture(pipe, fields: dict[str, Any], monkeypatch) -> GenerateRequest:
    from autolora.console.models import request_of_report
    from autolora.generate.active_adapters import Chosen
    from autolora.generate.plan import plan_report
    from autolora.generate.report import Report
    from autolora.request import settle

    asked = read_request({"prompt": PROMPT, **fields})
    chosen = [
        Chosen(
            pipe.pool.load(unit.name),
            1.0 if unit.strength is None else unit.strength,
            "asked for",
            steps=unit.steps,
            text_encoder=unit.text_encoder,
            patterns=unit.layers,
        )
        for unit in asked.loras
    ]
    config = pipe.config
    report = plan_report(
        settle(config, asked),
        parse_prompt(PROMPT).text,
        config,
        asked.strategy or "gated",
        chosen,
        [],
        None,
    )
    written = json.loads(report.texts()["autolora"])
    return request_of_report(Report.from_dict(written))


FACES = {f.__name__: f for f in (python, shell, lines, http, page, picture)}


def seen(asked: GenerateRequest, face: str) -> dict[str, Any]:
    """A request's values; a form and a picture have none left out, and a picture no search."""
    usual = {"steps": 20, "width": 64, "height": 64, "guidance": 3.0, "strategy": "gated"}
    values = {name: getattr(asked, name) for name in GenerateRequest.model_fields}
    for name in ("seed", "image", "control"):
        del values[name]
    if face in ("page", "picture"):
        filled = {**usual, "strategy": None} if face == "page" else usual
        values |= {n: v for n, v in filled.items() if values[n] is None}
    if face == "picture":
        for name in ("retrieve", "top_k", "use_triggers"):
            del values[name]
        values["prompt"] = parse_prompt(asked.prompt).text
        values["loras"] = [replace(u, strength=u.strength or 1.0) for u in asked.loras]
    return values


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("face", FACES)
def test_every_face_reads_the_same(pipe, face: str, name: str, monkeypatch) -> None:
    found = FACES[face](pipe, REQUESTS[name], monkeypatch)
    assert seen(found, face) == seen(value(name), face)


@pytest.mark.parametrize("name", ["adapters", "units"])
def test_a_style_takes_the_units_of_a_request(pipe, tmp_path: Path, name: str) -> None:
    import yaml

    from autolora.styles import Styles

    fields = REQUESTS[name]
    written = {"adapters": fields["loras"], "automatic": fields.get("retrieve", True)}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(written))
    style = Styles([tmp_path], tmp_path / "own").get("mine")
    asked = value(name)
    assert (style.loras, style.retrieve) == (asked.loras, asked.retrieve)


@pytest.mark.parametrize("name", ["adapters", "units"])
def test_a_configuration_takes_the_units_of_a_request(make_config, name: str) -> None:
    from autolora.config import load_config

    assert load_config(make_config(loras=REQUESTS[name]["loras"])).loras == value(name).loras


BAD = [
    ({"loras": [{"name": "neon", "steps": "2-9"}], "steps": 4}, "the picture has 4"),
    ({"loras": [{"name": "neon", "stepz": "1-2"}]}, "did you mean"),
    ({"loras": ["neon", "neon:0.5"]}, "given twice"),
    ({"loras": [{"name": "neon", "strength": float("nan")}]}, "out of range"),
    ({"steps": "many"}, "steps must be a whole number"),
    ({"stepz": 3}, "did you mean steps?"),
    ({"negative": "a", "negative_prompt": "b"}, "by another name"),
    ({"size": "3x4", "width": 5}, "ize is width and height"),
]


@pytest.mark.parametrize(("fields", "words"), BAD)
@pytest.mark.parametrize("face", ["python", "lines", "http"])
def test_what_is_wrong_is_the_same_sentence_and_changes_nothing(
    pipe, face: str, fields, words: str, monkeypatch
) -> None:
    from autolora.console.models import ServerRequest

    pipe.__dict__["base"] = None  # so that anything that would be loaded fails
    with pytest.raises(AutoLoRAError) as caught:
        if face == "python":
            pipe.check(pipe._asked(PROMPT, fields))
        elif face == "lines":
            from autolora.cli.generate import read_line

            line = json.dumps({"prompt": PROMPT, **fields})
            read_line(line, {}, [], 1, None).check(pipe)
        else:
            pipe.check(read_request({"prompt": PROMPT, "seed": 0, **fields}, ServerRequest))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_shell_takes_a_style_by_name_and_by_file(home: Path, capsys) -> None:
    from autolora.cli import main

    (home / "mine.yaml").write_text(
        "prompt: '{prompt}, ink'\nadapters: [{name: rocket, strength: 0.5, steps: 1-1}]\n"
        "automatic: false\nstrategy: sum\nnegative_prompt: grey\n"
    )
    (home / "outputs" / "styles").mkdir(parents=True)
    (home / "mine.yaml").rename(home / "outputs" / "styles" / "mine.yaml")
    pictures = []
    for style in ("mine", "outputs/styles/mine.yaml"):
        assert main(["generate", "a cat", "--style", style, "--json", "-o", "x.png"]) == 0
        pictures += json.loads(capsys.readouterr().out)["pictures"]
    for facts in pictures:
        assert facts["used_prompt"] == "a cat, ink" and facts["negative_prompt"] == "grey"
        (used,) = facts["adapters"]
        assert (used["name"], used["strength"], used["steps"]) == ("rocket", 0.5, [1, 1])
        assert used["why"] == "part of the style" and facts["strategy"] == "sum"
    again = ["generate", "--from-png", pictures[0]["path"], "-o", "again.png"]
    assert main(again) == 0
    assert (home / "again.png").read_bytes() == (home / pictures[0]["path"]).read_bytes()
    assert main(["generate", "a cat", "--style", "mien"]) == 2
    assert "no style 'mien'" in capsys.readouterr().err
