"""``autolora generate``: seeds, batches, and pictures made again from their files."""

import io
import json
import shutil
from pathlib import Path

import pytest

from autolora.cli.generate import MAX_COUNT, read_seeds
from autolora.errors import GenerationError
from autolora.generate.report import read_report
from tests.cli.shell import pictures, run


@pytest.mark.parametrize(
    ("texts", "count", "seeds"),
    [
        ([], None, []),
        (["7"], None, [7]),
        (["7", "8", "7"], None, [7, 8]),
        (["3-6"], None, [3, 4, 5, 6]),
        (["3..5", "9"], None, [3, 4, 5, 9]),
        (["5-5"], None, [5]),
        ([], 3, [0, 1, 2]),
        (["7"], 2, [7, 8]),
        (["-3"], None, [-3]),  # refused with the other values of a request
    ],
)
def test_seeds(texts: list[str], count: int | None, seeds: list[int]) -> None:
    assert read_seeds(texts, count) == seeds


def test_random_seeds_differ() -> None:
    seeds = {read_seeds([text], None)[0] for text in ("random", "-1") for _ in range(8)}
    assert len(seeds) > 8 and all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize(
    ("texts", "count", "words"),
    [
        (["6-3"], None, "must go up"),
        ([f"0-{MAX_COUNT}"], None, "must go up and have at most"),
        (["x"], None, "'x'"),
        (["1.5"], None, "whole number"),
        (["٣"], None, "whole number"),
        (["1-2-3"], None, "whole number"),
        ([], 0, "between 1 and"),
        ([], MAX_COUNT + 1, "between 1 and"),
        (["1", "2"], 2, "one seed"),
    ],
)
def test_seeds_that_are_not_understood(texts: list[str], count: int | None, words: str) -> None:
    with pytest.raises(GenerationError, match=words):
        read_seeds(texts, count)


def test_several_seeds_give_several_files(home: Path, capsys) -> None:
    status, out, _ = run(capsys, "generate", "a cat", "--no-retrieval", "-n", "2", "-s", "4")
    assert (status, out) == (0, "a-cat-4.png\na-cat-5.png\n")
    status, out, _ = run(
        capsys, "generate", "a cat", "--no-retrieval", "--seed", "8-9", "--out", "x.png"
    )
    assert (status, out) == (0, "x-8.png\nx-9.png\n")


def test_a_batch_says_so_and_repeats_to_the_byte(home: Path, capsys) -> None:
    status, out, err = run(capsys, "generate", "a neon cat", "-n", "3", "-b", "2", "-o", "b/")
    assert (status, out) == (0, "b/a-neon-cat-0.png\nb/a-neon-cat-1.png\nb/a-neon-cat-2.png\n")
    assert err.count("note: Drawn in a batch of 2") == 1 and "4/4" in err
    reports = [read_report(home / line) for line in out.split()]
    assert [report["batch"] for report in reports] == [[0, 1], [0, 1], []]
    status, shown, _ = run(capsys, "show", "b/a-neon-cat-1.png")
    assert status == 0 and "seed 0, seed 1" in shown
    status, out, _ = run(capsys, "generate", "--from-png", "b/a-neon-cat-1.png", "-o", "again.png")
    assert (status, out) == (0, "again.png\n"), "one picture, though its batch was drawn"
    assert (home / "again.png").read_bytes() == (home / "b/a-neon-cat-1.png").read_bytes()


def test_a_picture_of_a_batch_may_be_drawn_alone(home: Path, capsys) -> None:
    run(capsys, "generate", "a neon cat", "-n", "2", "-b", "2", "-o", "b/")
    for options in (("-b", "1"), ("-s", "1-2")):
        words = ("generate", "--from-png", "b/a-neon-cat-1.png", *options, "-o", "alone/", "--json")
        for facts in json.loads(run(capsys, *words)[1])["pictures"]:
            assert facts["batch"] == [] and not any("batch" in note for note in facts["notes"])


def test_pictures_are_saved_one_by_one(home: Path, capsys, monkeypatch) -> None:
    from autolora.cli.output import PicturesView

    steps = iter(range(100))

    def interrupt(self, done: int, total: int) -> None:
        if next(steps) == 4:  # 0 to 2 of the first picture, then the second one's first step
            raise KeyboardInterrupt

    monkeypatch.setattr(PicturesView, "step", interrupt)
    status, out, _ = run(capsys, "generate", "a cat", "--no-retrieval", "-n", "3", "-o", "p/")
    assert (status, out) == (130, "p/a-cat-0.png\n")
    assert pictures(home) == ["a-cat-0.png"]


def test_what_comes_up_while_drawing_is_said_once(home: Path, capsys) -> None:
    status, _, err = run(
        capsys, "generate", "a neon rocket", "-n", "2", "--text-encoders", "--size", "70"
    )
    assert status == 0
    assert err.count("note: None of the adapters has a part for the text encoders.") == 1
    assert err.count("note: The size 70x70 was rounded up to 80x80.") == 1


@pytest.mark.parametrize("batch", ["0", "17"])
def test_impossible_batches_are_refused(home: Path, capsys, batch: str) -> None:
    status, out, err = run(capsys, "generate", "a cat", "--batch", batch)
    assert (status, out) == (2, "") and "Batch must be between 1 and 16" in err


def test_a_picture_is_repeated_to_the_byte(home: Path, capsys) -> None:
    first = "a neon, , rocket <lora:elephant:0.3>"
    assert (
        run(capsys, "generate", first, "--seed", "5", "--negative", "dogs", "-o", "a.png")[0] == 0
    )
    status, out, err = run(capsys, "generate", "--from-png", "a.png", "-o", "b.png")
    assert (status, out) == (0, "b.png\n"), err
    assert (home / "a.png").read_bytes() == (home / "b.png").read_bytes()
    assert run(capsys, "generate", "--from-png", "a.png")[1] == "a-neon-rocket-5.png\n"


def test_a_repetition_may_change_what_it_names(home: Path, capsys) -> None:
    run(capsys, "generate", "a neon rocket", "-o", "a.png")
    names = [used["name"] for used in read_report(home / "a.png")["adapters"]]
    arguments = ("--from-png", "a.png", "-s", "3", "--steps", "4", "--lora", "neon:0.2", "--json")
    status, out, _ = run(capsys, "generate", "a teapot", *arguments)
    (facts,) = json.loads(out)["pictures"]
    assert status == 0 and (facts["seed"], facts["steps"]) == (3, 4)
    strengths = {used["name"]: used["strength"] for used in facts["adapters"]}
    assert sorted(strengths) == sorted(names) and strengths["neon"] == 0.2
    assert facts["prompt"] == "a teapot"


def test_what_cannot_be_repeated_is_said(home: Path, capsys) -> None:
    run(capsys, "generate", "a neon rocket", "-o", "a.png")
    shutil.copy(home / "pool" / "elephant.safetensors", home / "pool" / "neon.safetensors")
    status, out, err = run(capsys, "generate", "--from-png", "a.png", "-o", "b.png")
    assert status == 2 and out == "" and "LoRA neon is another file" in err
    status, _, err = run(capsys, "generate", "--from-png", "a.png", "-o", "b.png", "--force")
    assert status == 0 and "note: Not as in the repeated picture: LoRA neon" in err
    assert "LoRA neon is another file" in " ".join(read_report(home / "b.png")["notes"])
    for file in (home / "pool").glob("neon.*"):
        file.unlink()
    status, _, err = run(capsys, "generate", "--from-png", "a.png", "--force")
    assert status == 2 and "has no LoRA neon" in err
    assert pictures(home) == ["a.png", "b.png"]


def test_the_picture_names_its_model(home: Path, capsys, monkeypatch) -> None:
    run(capsys, "generate", "a cat", "--no-retrieval", "-o", "a.png")
    config = str(home / "random.yaml")
    monkeypatch.delenv("AUTOLORA_MODEL")
    status, _, err = run(capsys, "generate", "--from-png", "a.png")
    assert status == 2 and "'random'" in err and "--model" in err
    assert run(capsys, "generate", "--from-png", "a.png", "-m", config, "-o", "b.png")[0] == 0
    assert (home / "a.png").read_bytes() == (home / "b.png").read_bytes()


def test_show_prints_what_a_picture_says(home: Path, capsys) -> None:
    run(capsys, "generate", "a neon cat", "--negative", "dogs", "-o", "a.png")
    status, out, _ = run(capsys, "show", "a.png")
    assert status == 0
    for words in ("a neon cat", "dogs", "gated", "64x64", "neon", "0.70"):
        assert words in out
    assert json.loads(run(capsys, "show", "a.png", "--json")[1]) == read_report(home / "a.png")


def test_pictures_of_comfyui_are_shown_and_not_repeated(home: Path, capsys) -> None:
    from PIL import Image

    from autolora.generate.png import write_png

    workflow = {"3": {"class_type": "KSampler", "inputs": {"seed": 5, "model": ["1", 0]}}}
    write_png(Image.new("RGB", (8, 8)), {"prompt": json.dumps(workflow)}, home / "a.png")
    status, out, err = run(capsys, "show", "a.png")
    assert status == 0 and "another program" in err
    assert [line.split() for line in out.splitlines() if line.strip()] == [
        ["made", "by", "ComfyUI"],
        ["seed", "5"],
        ["KSampler", "seed:", "5"],
    ]
    nodes = json.loads(run(capsys, "show", "a.png", "--json")[1])["nodes"]
    assert nodes == [{"kind": "KSampler", "values": {"seed": 5}}]
    status, _, err = run(capsys, "generate", "--from-image", "a.png")
    assert status == 2 and "The prompt is empty" in err


def test_show_reads_pictures_of_a1111(home: Path, capsys) -> None:
    from PIL import Image

    from autolora.generate.png import write_png

    image = Image.new("RGB", (8, 8))
    text = "a cat [bold]\nNegative prompt: dogs\nSteps: 20, Sampler: Euler a, Seed: 5, Size: 8x8"
    write_png(image, {"parameters": text}, home / "a.png")
    status, out, err = run(capsys, "show", "a.png")
    assert status == 0 and "a cat [bold]" in out and "Euler a" in out and "another program" in err
    shown = json.loads(run(capsys, "show", "a.png", "--json")[1])
    assert (shown["seed"], shown["width"], shown["settings"]["Sampler"]) == (5, 8, "Euler a")
    write_png(image, {}, home / "b.png")
    assert run(capsys, "show", "b.png")[0] == 2


def test_settings_of_another_program_are_drawn(home: Path, capsys) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x9286] = (
        "a [bold] cat <lora:Neon:0.6> <lora:nobody:1>\nNegative prompt: dogs\n"
        "Steps: 2, Sampler: Euler, CFG scale: 2.5, Seed: 77, Size: 96x64, Version: f2.0"
    )
    Image.new("RGB", (8, 8)).save(home / "a.webp", exif=exif)
    status, out, err = run(capsys, "show", "a.webp")
    assert status == 0 and "Forge" in out and "Not in" not in out
    (neon, nobody) = json.loads(run(capsys, "show", "a.webp", "--json")[1])["loras"]
    assert (neon["found"], neon["strength"], nobody["found"]) == ("neon", 0.6, None)
    status, _, err = run(capsys, "generate", "--from-image", "a.webp")
    assert status == 2 and "lacks nobody" in err and "--force" in err
    status, out, err = run(capsys, "generate", "--from-image", "a.webp", "--force", "-o", "b.png")
    assert (status, out) == (0, "b.png\n"), err
    assert "Not in the pool: nobody" in err and "Weights of words" in err
    report = read_report(home / "b.png")
    assert (report["used_prompt"], report["negative_prompt"]) == ("a bold cat", "dogs")
    assert (report["seed"], report["steps"], report["guidance"]) == (77, 2, 2.5)
    assert (report["width"], report["height"]) == (96, 64)
    assert [(used["name"], used["strength"]) for used in report["adapters"]] == [("neon", 0.6)]
    arguments = ("--from-image", "a.webp", "--force", "-s", "3", "--steps", "1", "-o", "c.png")
    assert run(capsys, "generate", *arguments)[0] == 0
    report = read_report(home / "c.png")
    assert (report["seed"], report["steps"]) == (3, 1)


BATCH = """a neon cat

{"prompt": "a rocket", "seed": "3-4", "steps": 1, "size": "96x64", "out": "sub/r.png", "batch": 2}
{"prompt": "a cat", "loras": ["neon:0.5"], "retrieve": false, "strategy": "sum", "negative": "x"}
{"prompt": "a cat", "stepps": 3}
{"prompt": "a cat", "steps": "many"}
{"prompt": "a cat", "loras": ["neom"]}
{"prompt": "a cat", "loras": [1]}
{"steps": 3}
{"prompt": ""}
{not json
{"prompt": "a cat", "guidance": true}
{"prompt": "a cat", "seed": 3.5}
{"prompt": "a cat", "batch": 0}
a cat <lora:rokcet:1>
the last one
"""


def test_a_bad_line_does_not_end_the_others(home: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(BATCH))
    status, out, err = run(capsys, "generate", "--stdin", "--out", "pics/", "-s", "2")
    answers = [json.loads(line) for line in out.splitlines()]
    assert status == 1 and "Traceback" not in err
    good = [(a["line"], a["path"], a["seed"]) for a in answers if "path" in a]
    assert good == [
        (1, "pics/a-neon-cat-2.png", 2),
        (3, "sub/r-3.png", 3),
        (3, "sub/r-4.png", 4),
        (4, "pics/a-cat-2.png", 2),
        (16, "pics/the-last-one-2.png", 2),
    ]
    assert (answers[1]["steps"], answers[1]["width"]) == (1, 96)
    assert answers[1]["batch"] == answers[2]["batch"] == [3, 4]
    assert [used["name"] for used in answers[3]["adapters"]] == ["neon"]
    assert (answers[3]["strategy"], answers[3]["negative_prompt"]) == ("sum", "x")
    problems = {a["line"]: a["error"] for a in answers if "error" in a}
    for line, words in (
        (5, "did you mean steps?"),
        (6, "steps must be a whole number"),
        (7, "did you mean neon?"),
        (8, "such as neon:0.8"),
        (9, "no prompt"),
        (10, "prompt is empty"),
        (11, "not valid JSON"),
        (12, "guidance must be a number"),
        (13, "seed must be a whole number or text"),
        (14, "Batch must be between"),
        (15, "did you mean rocket?"),
    ):
        assert words in problems.pop(line)
    assert not problems
    assert len(pictures(home)) == 5


def test_a_byte_order_mark_is_no_part_of_a_line(home: Path, capsys, monkeypatch) -> None:
    raw = io.TextIOWrapper(io.BytesIO('\ufeff{"prompt": "a cat"}\r\n'.encode()), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", raw)
    status, out, _ = run(capsys, "generate", "--stdin", "--no-retrieval")
    assert status == 0 and json.loads(out)["prompt"] == "a cat"


def test_bytes_that_are_no_text_fail_alone(home: Path, capsys, monkeypatch) -> None:
    raw = io.TextIOWrapper(io.BytesIO(b"a \xff cat\na cat\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", raw)
    status, out, _ = run(capsys, "generate", "--stdin", "--no-retrieval")
    first, second = map(json.loads, out.splitlines())
    assert status == 1 and "UTF-8" in first["error"] and second["path"] == "a-cat-0.png"


def test_stdin_takes_no_prompt_beside_it(home: Path, capsys) -> None:
    for arguments in (("a cat",), ("--from-png", "a.png")):
        status, _, err = run(capsys, "generate", "--stdin", *arguments)
        assert status == 2 and "prompts come from stdin" in err
