"""The shell: output where it belongs, one sentence for wrong input, nothing half done."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from autolora.cli import main
from autolora.generate.report import read_report
from tests.cli.shell import pictures, run


def test_generate_prints_the_path_and_shows_the_table(home: Path, capsys) -> None:
    status, out, err = run(capsys, "generate", "a neon rocket")
    assert (status, out) == (0, "a-neon-rocket-0.png\n")
    for part in ("adapter", "strength", "neon", "rocket", "0.70", "drawing", "2/2"):
        assert part in err
    assert read_report(home / "a-neon-rocket-0.png")["prompt"] == "a neon rocket"
    assert run(capsys, "generate", "a neon rocket")[1] == "a-neon-rocket-0-2.png\n"
    assert pictures(home) == ["a-neon-rocket-0-2.png", "a-neon-rocket-0.png"]


def test_options_reach_the_picture(home: Path, capsys) -> None:
    arguments = (
        "generate a cat <lora:neon:0.5> --lora rocket:0.25 --no-retrieval --strategy sum --steps 3 "
        "--seed 5 --seed 6 --size 96x64 --guidance 2 --negative dogs --out new/cat.png --json"
    )
    words = arguments.replace("a cat <lora:neon:0.5>", "PROMPT").split()
    words[words.index("PROMPT")] = "a cat <lora:neon:0.5>"
    status, out, _ = run(capsys, *words)
    assert status == 0
    reports = json.loads(out)["pictures"]
    assert [report["path"] for report in reports] == ["new/cat-5.png", "new/cat-6.png"]
    for report, seed in zip(reports, (5, 6), strict=True):
        used = {entry["name"]: entry["strength"] for entry in report["adapters"]}
        assert used == {"rocket": 0.25, "neon": 0.5}
        expected = {
            "seed": seed,
            "steps": 3,
            "width": 96,
            "height": 64,
            "guidance": 2.0,
            "negative_prompt": "dogs",
            "strategy": "sum",
        }
        assert {key: report[key] for key in expected} == expected
        with Image.open(home / report["path"]) as image:
            assert image.size == (96, 64)


def test_out_may_be_a_folder(home: Path, capsys) -> None:
    assert run(capsys, "generate", "a cat", "--no-retrieval", "--out", "a/b/")[1] == (
        "a/b/a-cat-0.png\n"
    )


def test_the_prompt_may_come_from_stdin(home: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n"))
    status, _, err = run(capsys, "generate", "-")
    assert status == 2 and "prompt is empty" in err


def test_search_prints_a_table_or_json(home: Path, capsys) -> None:
    status, out, _ = run(capsys, "search", "a neon thing", "-k", "2")
    assert status == 0
    lines = out.splitlines()
    assert lines[0].split() == ["adapter", "score", "why"]
    assert lines[1].split()[:3] == ["*", "neon", "0.98"] and len(lines) == 3
    rows = json.loads(run(capsys, "search", "a cat <lora:rocket>", "--json")[1])
    assert {row["name"] for row in rows if row["chosen"]} == {"rocket"}
    rows = json.loads(run(capsys, "search", "a neon thing", "--json")[1])
    assert rows[0]["name"] == "neon" and rows[0]["chosen"] and not rows[1]["chosen"]


def test_index_is_built_kept_and_rebuilt(home: Path, capsys) -> None:
    (home / "pool" / "broken.safetensors").write_bytes(b"x")
    status, out, err = run(capsys, "index")
    assert status == 0 and "3 LoRAs" in out and "3 encoded, 0 kept" in out
    assert "0 files removed, 1 left out" in out
    assert "Left out" in err and "broken.safetensors" in err
    assert "0 encoded, 3 kept" in run(capsys, "index")[1]
    assert "cannot be searched: 1; `autolora index`" in run(capsys, "search", "a rocket")[2]
    facts = json.loads(run(capsys, "index", "--rebuild", "--json")[1])
    assert facts["loras"] == len(facts["encoded"]) == 3 and facts["kept"] == 0
    assert list(facts["left_out"]) == ["broken"]


def test_pool_commands(home: Path, capsys) -> None:
    rows = json.loads(run(capsys, "pool", "list", "--json")[1])
    assert [row["name"] for row in rows] == ["elephant", "neon", "rocket"]
    assert rows[1]["trigger_words"] == ["neon"]
    assert "Elephant" in run(capsys, "pool", "list")[1]
    status, out, _ = run(capsys, "pool", "show", "neon")
    assert status == 0 and "diffusers" in out and "0.7" in out
    assert json.loads(run(capsys, "pool", "show", "neon", "--json")[1])["report"]["layers"] == 16
    assert run(capsys, "pool", "check")[:2] == (
        0,
        "Formats: 1 kohya, 1 diffusers, 1 diffsynth.\n3 LoRA files, 0 problems.\n",
    )
    (home / "pool" / "broken.safetensors").write_bytes(b"x")
    status, out, _ = run(capsys, "pool", "check")
    assert status == 1 and "broken.safetensors" in out and "1 problem." in out


BAD_INPUT = [
    (["generate", ""], "prompt is empty"),
    (["generate", "   "], "prompt is empty"),
    (["search", ""], "prompt is empty"),
    (["search", "cat", "-k", "0"], "at least 1"),
    (["generate", "cat", "--lora", "neom"], "No LoRA named 'neom'", "did you mean neon?"),
    (["generate", "cat <lora:rokcet:1>"], "No LoRA named 'rokcet'", "did you mean rocket?"),
    (["generate", "cat", "--lora", "neon:lots"], "'lots'", "not a number"),
    (["generate", "cat", "--size", "100x3000"], "100x3000", "between 64 and 2048"),
    (["generate", "cat", "--size", "16x16"], "between 64 and 2048"),
    (["generate", "cat", "--size", "big"], "WIDTHxHEIGHT"),
    (["generate", "cat", "--steps", "0"], "between 1 and 200"),
    (["generate", "cat", "--steps", "1000"], "between 1 and 200"),
    (["generate", "cat", "--steps", "few"], "--steps", "integer"),
    (["generate", "cat", "--seed", "-3"], "Seed must be"),
    (["generate", "cat", "--top-k", "-1"], "Top_k must be"),
    (["generate", "cat", "--guidance", "nan"], "Guidance must be"),
    (["generate", "cat", "--strategy", "magic"], "magic", "gated"),
    (["generate", "cat", "--out", "cat.jpg"], ".png"),
    (["generate", "cat", "--out", "cat"], ".png"),
    (["generate", "cat", "--model", "tinny"], "did you mean tiny?"),
    (["generate", "cat", "--model", "gone.yaml"], "no configuration file"),
    (["generate", "cat", "--pool", "nowhere"], "nowhere", "does not exist"),
    (["index", "--pool", "nowhere"], "nowhere", "does not exist"),
    (["pool", "list", "--pool", "nowhere"], "nowhere", "does not exist"),
    (["pool", "list", "--pool", "empty"], "has no .safetensors file"),
    (["search", "cat", "--pool", "empty"], "has no .safetensors file"),
    (["pool", "show", "elefant"], "did you mean elephant?"),
    (["generate", "cat", "--strategy", ""], "gated"),
    (["generate", "cat", "--out", "empty/file/a.png"], "cannot be written", "is no folder"),
    (["generate", "cat", "--negative", "\udcff"], "negative prompt is not valid text"),
    (["generate", "cat", "--negative", "x" * 10_001], "negative prompt has 10001 characters"),
    (["generate"], "Missing argument"),
    (["generate", "cat", "--colour", "red"], "--colour"),
    (["draw"], "draw"),
]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(row[0], row[1:]) for row in BAD_INPUT],
    ids=lambda v: ascii(" ".join(v))[:80],
)
def test_bad_input_gives_one_sentence(home: Path, capsys, arguments, words) -> None:
    (home / "empty").mkdir()
    (home / "empty" / "file").touch()
    status, out, err = run(capsys, *arguments)
    assert status == 2, err
    assert out == "" and "Traceback" not in err
    message = err.strip().splitlines()
    assert message[-1].startswith("autolora: "), err
    for word in words:
        assert word in message[-1]
    assert pictures(home) == []


def corrupt(home: Path, kind: str, tiny_shapes) -> None:
    """Put a file that cannot be used into the pool as ``bad``."""
    from autolora.lora import save_lora
    from tests.conftest import random_factors

    path = home / "pool" / "bad.safetensors"
    factors = random_factors(tiny_shapes, 4)
    if kind == "other model":
        factors = random_factors({n: (2 * o, 2 * i) for n, (o, i) in tiny_shapes.items()}, 4)
    save_lora(path, factors)
    content = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    if kind == "garbage":
        path.write_bytes(b"<html>404</html>" * 20)
    if kind == "nan":
        path.write_bytes(content[:-4] + b"\x00\x00\xc0\x7f")


@pytest.mark.parametrize("kind", ["truncated", "garbage", "nan", "other model"])
def test_a_bad_file_is_refused_by_name_and_left_out_otherwise(
    home: Path, capsys, kind: str, tiny_shapes
) -> None:
    corrupt(home, kind, tiny_shapes)
    status, _, err = run(capsys, "generate", "a cat", "--lora", "bad", "--no-retrieval")
    assert status == 2 and "Traceback" not in err
    assert "bad" in err.strip().splitlines()[-1]
    assert pictures(home) == []
    status, out, err = run(capsys, "generate", "a bad rocket")
    assert status == 0 and out == "a-bad-rocket-0.png\n"
    assert "note: Left out:" in err and "bad" in err


def test_a_pool_of_bad_files_only_still_draws(home: Path, capsys) -> None:
    for file in (home / "pool").iterdir():
        if file.suffix == ".safetensors":
            file.write_bytes(b"x")
    status, out, err = run(capsys, "generate", "a rocket")
    assert status == 0 and err.count("note: Left out:") == 3
    # What a picture says about its making does not tell where the files lay.
    status, _, err = run(capsys, "show", out.strip())
    assert status == 0 and err.count("note: Left out:") == 3 and str(home) not in err


def test_an_interrupt_leaves_no_half_file(home: Path, capsys, monkeypatch) -> None:
    from autolora.cli.output import PicturesView

    def interrupt(self, done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PicturesView, "step", interrupt)
    status, out, err = run(capsys, "generate", "a rocket", "--out", "pics/")
    assert status == 130 and out == "" and "Traceback" not in err
    assert not (home / "pics").exists()


def test_an_unexpected_error_is_not_hidden(home: Path, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("autolora.pipeline.load_config", fail)
    with pytest.raises(ZeroDivisionError):
        main(["search", "cat"])


def test_version(capsys) -> None:
    import autolora

    assert run(capsys, "--version") == (0, f"autolora {autolora.__version__}\n", "")
