"""``autolora pool``: check, show and add as people type them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from autolora.cli import main
from autolora.lora import LoRA, save_lora
from tests.lora.lora_files import make_file

KEY = "lora_unet_double_blocks_0_img_attn_proj"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)


def write(path: Path, seed: int = 0, **extra: torch.Tensor) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    keep = make_file(
        "kohya", seed=seed, alphas=(2.0,), keep=lambda name: name.startswith("double_blocks.0")
    )
    keep.tensors |= extra
    return keep.save(path, metadata={"modelspec.trigger_phrase": "hdr word"})


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pool of two that the environment names; no base model is needed."""
    folder = tmp_path / "pool"
    write(folder / "cat.safetensors", 1)
    write(folder / "neon.safetensors", 2)
    (folder / "neon.json").write_text('{"activation text": "n30n", "preferred weight": 0.7}')
    (folder / "neon.png").write_bytes(PNG)
    monkeypatch.setenv("AUTOLORA_POOL", str(folder))
    return folder


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_check_tells_what_is_in_a_file(pool, capsys, tmp_path) -> None:
    extra = {"lora_unet_nowhere.alpha": torch.tensor(1.0), "what": torch.ones(1)}
    file = write(tmp_path / "in" / "glow.safetensors", 3, **extra)
    status, out, _ = run(capsys, "pool", "check", file)
    assert status == 0
    lines = {line.split("  ")[0]: line for line in out.splitlines()}
    assert "kohya" in lines["format"]
    assert "10 of " in lines["layers"]
    assert "0.5" in lines["alpha / rank"] and "4" in lines["rank"]
    assert float(lines["norm of the change"].split()[-1]) > 0
    assert "30 used, 2 not used" in lines["keys"]
    assert "2 x unknown name" in lines["not used"]
    assert "hdr word  [header]" in lines["trigger words"]


def test_check_as_json_names_every_key(pool, capsys, tmp_path) -> None:
    file = write(tmp_path / "glow.safetensors", 3, what=torch.ones(1))
    status, out, _ = run(capsys, "pool", "check", file, pool / "cat.safetensors", "--json")
    facts = json.loads(out)
    assert (status, facts["files"]) == (0, 2)
    glow, cat = facts["checks"]
    assert list(glow["report"]["dropped"]) == ["what"]
    assert len(glow["report"]["matched"]) == 30
    assert glow["metadata"]["trigger_words"] == ["hdr word"]
    assert cat["usable"] and cat["problem"] == ""


def test_names_that_a_terminal_would_obey_are_escaped(pool, capsys) -> None:
    odd = pool / "two\nlines\x1b[31m.safetensors"
    shutil.copy(pool / "cat.safetensors", odd)
    odd.with_suffix(".png").write_bytes(PNG)
    status, out, _ = run(capsys, "pool", "check", odd)
    assert status == 0 and "two\\nlines\\x1b[31m.safetensors" in out
    assert out.count("two\\nlines") == 2 and "twolines[31m  [file name]" in out
    assert "\x1b" not in out


def test_nothing_matched_is_a_problem(pool, capsys, tmp_path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"what": torch.ones(1)}, file)
    status, out, err = run(capsys, "pool", "check", file, pool / "cat.safetensors")
    assert status == 1 and "Traceback" not in err
    assert "x.safetensors changes no layer of any known base model" in " ".join(out.split())
    assert "kohya" in out
    status, out, _ = run(capsys, "pool", "check", tmp_path / "gone.safetensors", "--json")
    assert status == 1
    (check,) = json.loads(out)["checks"]
    assert not check["usable"] and "does not exist" in check["problem"] and check["report"] is None


def test_check_of_the_pool(pool, capsys) -> None:
    assert run(capsys, "pool", "check")[:2] == (
        0,
        "Formats: 2 kohya.\n2 LoRA files, 0 problems.\n",
    )
    (pool / "bad.safetensors").write_bytes(b"x")
    (pool / "old.ckpt").write_bytes(b"\x80\x02")
    write(pool / "odd.safetensors", 4, what=torch.ones(1))
    status, out, err = run(capsys, "pool", "check")
    assert status == 1 and err == ""
    problems = out.splitlines()
    assert "bad.safetensors" in problems[0] and "old.ckpt" in problems[1]
    assert problems[2:] == [
        "1 key not used: unknown name: no FLUX.1 layer is called so (odd).",
        "Formats: 3 kohya.",
        "4 LoRA files, 2 problems.",
    ]
    status, out, _ = run(capsys, "pool", "check", "--json")
    facts = json.loads(out)
    assert status == 1
    assert [Path(row["path"]).name for row in facts["problems"]] == ["bad.safetensors", "old.ckpt"]
    assert [row["name"] for row in facts["checks"]] == ["bad", "cat", "neon", "odd"]
    assert facts["formats"] == {"kohya": 3} and facts["same_weights"] is None
    odd = facts["checks"][-1]["report"]
    assert list(odd["dropped"]) == ["what"] and odd["matched_count"] == 30
    assert "matched" not in odd, "a pool's keys that are used would be millions of lines"


def test_unused_keys_of_many_files_are_counted_together(pool, capsys) -> None:
    for n in range(5):
        extra = {f"what{i}": torch.ones(1) for i in range(6 - n)}
        write(pool / f"odd{n}.safetensors", 4 + n, **extra)
    (line,) = [x for x in run(capsys, "pool", "check")[1].splitlines() if "not used" in x]
    assert line == (
        "20 keys not used: unknown name: no FLUX.1 layer is called so "
        "(odd0, odd1, odd2 and 2 more)."
    )


def test_deep_check_finds_empty_ones_and_broken_pictures(pool, capsys) -> None:
    zero = {f"{KEY}.lora_down.weight": torch.ones(1, 4), f"{KEY}.lora_up.weight": torch.zeros(4, 1)}
    save_file(zero, pool / "zero.safetensors")
    save_file({f"{KEY}.diff_b": torch.ones(4)}, pool / "only-bias.safetensors")
    (pool / "cat.png").write_bytes(b"<html>")
    status, _, err = run(capsys, "pool", "check", "--deep")
    assert status == 0
    assert "cat: cat.png is no PNG, JPEG, WebP or GIF picture." in err
    assert "zero: It changes nothing" in err and err.count("changes nothing") == 1


def test_deep_check_finds_twins_in_any_format_and_precision(pool, capsys) -> None:
    shutil.copy(pool / "cat.safetensors", pool / "copy.safetensors")
    lora = LoRA.load(pool / "neon.safetensors")
    pairs = {layer: lora.factors(layer) for layer in lora.layers}
    save_lora(pool / "neon-2.safetensors", pairs, "diffusers")
    save_lora(pool / "neon-3.safetensors", pairs, "fal", dtype="bf16")
    assert "same" not in run(capsys, "pool", "check")[1]
    status, out, _ = run(capsys, "pool", "check", "--deep")
    assert status == 0
    assert "The same weights: cat, copy.\nThe same weights: neon, neon-2.\n" in out
    assert "neon-3: It is nearly the same as 'neon" in out and out.count("same") == 3
    facts = json.loads(run(capsys, "pool", "check", "--deep", "--json")[1])
    assert facts["same_weights"] == [["cat", "copy"], ["neon", "neon-2"]]
    twins = {row["name"]: row["twin"] for row in facts["checks"]}
    assert twins["cat"] is None and twins["neon-2"]["name"] == "neon"
    assert twins["neon-2"]["same"] and not twins["neon-3"]["same"]
    assert 1e-4 < twins["neon-3"]["difference"] < 0.01


def test_deep_check_of_a_file_looks_for_it_in_the_pool(pool, capsys, tmp_path, monkeypatch) -> None:
    lora = LoRA.load(pool / "neon.safetensors")
    pairs = {layer: lora.factors(layer) for layer in lora.layers}
    file = save_lora(tmp_path / "found.safetensors", pairs, "peft")
    known = "note: It changes the same as 'neon', a file in kohya format.\n"
    assert run(capsys, "pool", "check", file)[2] == ""
    assert run(capsys, "pool", "check", "--deep", file)[2] == known
    assert run(capsys, "pool", "check", "--deep", pool / "neon.safetensors")[2] == ""
    monkeypatch.setenv("AUTOLORA_POOL", str(tmp_path / "none"))
    status, out, err = run(capsys, "pool", "check", "--deep", file, file)
    assert status == 0 and "changes the same as 'found'" in err
    tables = out.split("\n\n")
    assert len(tables) == 2 and all("peft" in table for table in tables)


def test_show_names_the_source_of_each_value(pool, capsys) -> None:
    (pool / "neon.autolora.yaml").write_text("title: Neon Light\nstrength_min: 0.2\n")
    status, out, err = run(capsys, "pool", "show", "neon")
    assert status == 0
    assert "Neon Light  [neon.autolora.yaml]" in out
    assert "n30n  [neon.json]" in out and "0.7  [neon.json]" in out
    assert "neon.png" in out
    assert "strength_min and strength_max are not two numbers" in err
    facts = json.loads(run(capsys, "pool", "show", "neon", "--json")[1])
    assert facts["metadata"]["sources"]["trigger_words"] == "neon.json"
    assert facts["report"]["norm"] > 0 and len(facts["sha256"]) == 64


def test_add_says_what_it_did(pool, capsys, tmp_path) -> None:
    file = write(tmp_path / "in" / "glow.safetensors", 3)
    file.with_suffix(".json").write_text("{}")
    status, out, _ = run(capsys, "pool", "add", file)
    assert (status, out) == (0, f"{pool / 'glow.safetensors'}\n")
    assert (pool / "glow.json").is_file()
    status, _, err = run(capsys, "pool", "add", file, "--name", "shine")
    assert status == 2 and "as 'glow'; leave it out, or add it with --force" in err
    status, out, err = run(capsys, "pool", "add", file, "--name", "shine", "--force")
    assert status == 0 and "It changes the same as 'glow'" in err
    status, out, _ = run(capsys, "pool", "add", write(tmp_path / "b.safetensors", 7), "--json")
    (row,) = json.loads(out)
    assert row["path"] == str(pool / "b.safetensors") and row["beside"] == []


@pytest.mark.parametrize("name", ["bad.safetensors", "bad.pt", "gone.safetensors", "pipe"])
def test_add_refuses_in_one_sentence(pool, capsys, tmp_path, name) -> None:
    import os

    file = tmp_path / name
    if name == "pipe":
        os.mkfifo(file)
    elif not name.startswith("gone"):
        file.write_bytes(b"junk" if name.endswith("s") else b"\x80\x02junk")
    before = sorted(pool.iterdir())
    status, out, err = run(capsys, "pool", "add", file)
    assert (status, out) == (2, "") and name in err
    assert len(err.strip().splitlines()) == 1
    assert sorted(pool.iterdir()) == before


def test_add_converts_a_pickle_when_allowed(pool, capsys, tmp_path) -> None:
    made = make_file("kohya", keep=lambda name: name.startswith("double_blocks.0"))
    torch.save(made.tensors, tmp_path / "old.pt")
    assert "--allow-pickle" in run(capsys, "pool", "add", tmp_path / "old.pt")[2]
    status, out, _ = run(capsys, "pool", "add", tmp_path / "old.pt", "--allow-pickle")
    assert (status, out) == (0, f"{pool / 'old.safetensors'}\n")


def test_names_that_are_no_text_can_be_printed(pool, capsys) -> None:
    import os

    with open(os.fsencode(pool) + b"/latin\xe9.safetensors", "wb"):
        pass
    for extra in ((), ("--json",)):
        status, out, _ = run(capsys, "pool", "check", *extra)
        assert status == 1 and "latin" in out
        out.encode()
