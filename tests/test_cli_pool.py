"""``autolora pool``: check, show and add as people type them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from autolora.cli import main
from tests.adapters.lora_files import make_file

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


def test_nothing_matched_is_a_problem(pool, capsys, tmp_path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"what": torch.ones(1)}, file)
    status, out, err = run(capsys, "pool", "check", file, pool / "cat.safetensors")
    assert status == 1 and "Traceback" not in err
    assert "x.safetensors changes no layer of FLUX.1" in out
    assert "kohya" in out
    status, out, _ = run(capsys, "pool", "check", tmp_path / "gone.safetensors", "--json")
    assert status == 1
    (check,) = json.loads(out)["checks"]
    assert not check["usable"] and "does not exist" in check["problem"] and check["report"] is None


def test_check_of_the_pool(pool, capsys) -> None:
    assert run(capsys, "pool", "check")[:2] == (0, "2 LoRA files, 0 problems.\n")
    (pool / "bad.safetensors").write_bytes(b"x")
    (pool / "old.ckpt").write_bytes(b"\x80\x02")
    write(pool / "odd.safetensors", 4, what=torch.ones(1))
    status, out, err = run(capsys, "pool", "check")
    assert status == 1 and err == ""
    problems = out.splitlines()
    assert "bad.safetensors" in problems[0] and "old.ckpt" in problems[1]
    assert "1 keys not used: unknown name" in problems[2]
    assert problems[3] == "4 LoRA files, 2 problems."
    status, out, _ = run(capsys, "pool", "check", "--json")
    facts = json.loads(out)
    assert status == 1
    assert [Path(row["path"]).name for row in facts["problems"]] == ["bad.safetensors", "old.ckpt"]
    assert [row["name"] for row in facts["checks"]] == ["bad", "cat", "neon", "odd"]
    assert facts["formats"] == {"kohya": 3}


def test_deep_check_finds_twins_empty_ones_and_broken_pictures(pool, capsys) -> None:
    shutil.copy(pool / "cat.safetensors", pool / "copy.safetensors")
    zero = {f"{KEY}.lora_down.weight": torch.ones(1, 4), f"{KEY}.lora_up.weight": torch.zeros(4, 1)}
    save_file(zero, pool / "zero.safetensors")
    (pool / "cat.png").write_bytes(b"<html>")
    assert "same" not in run(capsys, "pool", "check")[1]
    status, out, err = run(capsys, "pool", "check", "--deep")
    assert status == 0 and "The same weights: cat, copy." in out
    assert "cat: cat.png is no PNG, JPEG or WebP picture." in err
    assert "zero: It changes nothing" in err
    facts = json.loads(run(capsys, "pool", "check", "--deep", "--json")[1])
    assert facts["same_weights"] == [["cat", "copy"]]


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
    assert status == 2 and "as 'glow'; add it with --force" in err
    status, out, err = run(capsys, "pool", "add", file, "--name", "shine", "--force")
    assert status == 0 and "'glow' in the pool has the same bytes" in err
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
