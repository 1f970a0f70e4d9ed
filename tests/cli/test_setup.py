"""`autolora doctor` and `autolora init`."""

import json
import re
from pathlib import Path

import pytest
import yaml

from autolora.cli import main
from autolora.config import load_config, shipped_configs


@pytest.fixture(autouse=True)
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("DIFFSYNTH_MODEL_BASE_PATH", raising=False)


def test_doctor_of_the_shipped_model_finds_nothing_wrong(capsys) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == [] and found["needs"] == []
    assert found["programs"]["torch"] and found["programs"]["diffsynth"]
    assert found["machine"]["memory"] and found["cards"] == []


@pytest.mark.parametrize("name", ["flux1-dev", "flux1-schnell", "majicflus"])
def test_doctor_names_what_is_missing_and_the_command(name: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / f"{name}.yaml"
    path.write_text(shipped_configs()[name].read_text(encoding="utf-8"), encoding="utf-8")
    assert main(["doctor", "--model", str(path), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [entry["found"] for entry in found["model"]["files"]] == [False] * 6
    assert found["model"]["command"].startswith("modelscope download --model ")
    assert str(tmp_path / "models") in found["model"]["command"]
    assert found["problems"][0].startswith("Files are missing: transformer, text_encoder")
    assert {row["offload"] for row in found["needs"]} == {"none", "parts", "layers"}
    assert all(row["card_gib"] > 4 for row in found["needs"])


def test_doctor_shows_a_table_and_the_command_on_one_line(tmp_path: Path, capsys) -> None:
    assert main(["doctor", "--model", "flux1-dev"]) == 1
    out = capsys.readouterr().out
    for words in ("torch", "float8", "offload", "missing"):
        assert words in out
    (line,) = [line for line in out.splitlines() if line.startswith("modelscope download")]
    assert "--local_dir" in line and "No NVIDIA card" in out


def test_doctor_says_what_is_wrong_with_a_file(tmp_path: Path, capsys) -> None:
    (tmp_path / "half.safetensors").write_bytes(bytes([200, 0, 0, 0, 0, 0, 0, 0]) + b"{")
    values = {"kind": "flux1", "weights": "half.safetensors"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    assert main(["doctor", "--model", str(tmp_path / "mine.yaml"), "--json"]) == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert any("half.safetensors is incomplete" in problem for problem in problems)


def test_init_writes_a_commented_configuration_and_indexes(
    tmp_path: Path, make_pool, tiny_weights: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_pool(tmp_path / "my loras")
    arguments = ["init", "--model", "tiny", "--pool", "my loras", "--weights", str(tiny_weights)]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == "tiny-mine.yaml" and "3 LoRAs of" in captured.err
    text = (tmp_path / "tiny-mine.yaml").read_text(encoding="utf-8")
    shipped = shipped_configs()["tiny"].read_text(encoding="utf-8")
    assert text.count("#") == shipped.count("#"), "comments stay"
    config = load_config("tiny-mine.yaml")
    assert (config.name, config.weights) == ("tiny-mine", tiny_weights)
    assert config.pool == tmp_path / "my loras"
    assert config.index.parent == tmp_path / "index" and config.index.is_dir()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("tmp")]


def test_init_for_flux_says_that_files_are_missing(tmp_path: Path, make_pool, capsys) -> None:
    target = tmp_path / "sub" / "artist.yaml"
    pool = make_pool(tmp_path / "pool")
    assert main(["init", "--pool", str(pool), "--out", str(target)]) == 0
    captured = capsys.readouterr()
    assert re.search(r"not indexed yet: .*get them with `modelscope download", captured.err)
    config = load_config(target)
    assert (config.name, config.kind, config.storage) == ("artist", "flux1", "float8")
    assert config.pool == pool and config.checkpoint.folder == target.parent / "models"


def test_init_refuses_before_it_writes(tmp_path: Path, make_pool, capsys) -> None:
    pool = make_pool(tmp_path / "pool")
    out = tmp_path / "mine.yaml"
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"123")
    for extra, words in (
        (["--pool", str(tmp_path / "none")], "no folder"),
        (["--pool", str(pool), "--weights", str(tmp_path / "none")], "no checkpoint"),
        (["--pool", str(pool), "--weights", str(broken)], "incomplete"),
        (["--pool", str(pool), "--out", str(tmp_path / "mine.txt")], "must end in .yaml"),
        (["--pool", str(pool), "--model", "flux2"], "no base model named 'flux2'"),
    ):
        arguments = ["init", "--model", "tiny", "--out", str(out), *extra]
        assert main(arguments) == 2
        assert words in capsys.readouterr().err
    assert not out.exists()
    out.write_text("mine: true", encoding="utf-8")
    assert main(["init", "--model", "tiny", "--pool", str(pool), "--out", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert out.read_text(encoding="utf-8") == "mine: true"
    assert main(["init", "--model", "tiny", "--pool", str(pool), "-o", str(out), "--force"]) != 2
    assert load_config(out).pool == pool


def test_help_shows_examples(capsys) -> None:
    for command in ("doctor", "init"):
        assert main([command, "--help"]) == 0
        assert f"autolora {command}" in capsys.readouterr().out


def test_without_a_card_doctor_tells_what_a_card_would_need(monkeypatch, capsys) -> None:
    from autolora import doctor
    from autolora.families.flux1.sizes import FLUX1_DEV
    from autolora.runtime import hardware
    from autolora.runtime.memory import GIB, all_needs

    config = load_config("flux1-dev")
    sizes = (config.memory, config.width, config.height)
    card = [round(n.device / GIB, 1) for n in all_needs(FLUX1_DEV, *sizes, compute_bytes=2)]
    on_cpu = next(
        n.device
        for n in all_needs(FLUX1_DEV, *sizes, compute_bytes=4)
        if (n.storage, n.text_storage, n.offload) == ("float8", "float8", "none")
    )
    for free, fitting in ((int(on_cpu) + 1, True), (int(on_cpu) - 1, False)):
        for module in (doctor, hardware):
            monkeypatch.setattr(module, "machine_memory", lambda free=free: (free, free))
            monkeypatch.setattr(module, "bfloat16_instructions", lambda: None)
        found = doctor.examine(config)
        assert [row["card_gib"] for row in found["needs"]] == card
        assert {row["fits"] for row in found["needs"]} == {None}, "there is no card to fit on"
        # Without a card it runs on the CPU: in float32, with nothing offloaded.
        assert (found["here"] is not None) is fitting
        assert any("does not fit" in problem for problem in found["problems"]) is not fitting
        assert main(["doctor", "--model", "flux1-dev"]) == 1
        out = " ".join(capsys.readouterr().out.split())
        assert "What a card would have to have free" in out and " fits " not in out
        assert ("far slower than on a card" in out) is fitting
        assert "On the CPU, compute: auto takes float32" in out
    monkeypatch.setattr(doctor, "bfloat16_instructions", lambda: "AVX512-BF16")
    assert main(["doctor"]) == 0
    assert "compute: auto takes bfloat16, by AVX512-BF16" in capsys.readouterr().out


def test_with_a_card_doctor_tells_how_the_model_would_be_loaded(monkeypatch, capsys) -> None:
    from tests.families.flux1 import pretended

    pretended.answer(monkeypatch, 12 * pretended.GIB)
    assert main(["doctor", "--model", "flux1-dev"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "cuda:0: Pretended card, 11.5 GiB of 12.0 GiB free" in out and "fits" in out
    assert "on Pretended card with storage float8, computing in bfloat16" in out
    assert "offload layers that may fill the card up to 9." in out
    config = load_config("flux1-dev")
    monkeypatch.setattr("autolora.config.load_config", lambda name: config)
    object.__setattr__(config, "device", "cuda:3")
    assert main(["doctor", "--model", "flux1-dev"]) == 1
    assert "Device cuda:3 is not there" in " ".join(capsys.readouterr().out.split())


def test_init_refuses_another_family_at_once(tmp_path: Path, make_pool, capsys) -> None:
    from tests.families.flux1.pretended import write_hollow

    pool, out = make_pool(tmp_path / "pool"), tmp_path / "mine.yaml"
    for name, keys, words in (
        ("sdxl", ["input_blocks.0.0.weight", "label_emb.0.0.weight"], "is SDXL"),
        ("lora", ["double_blocks.0.img_attn.qkv.lora_A.weight"], "is a LoRA, not a base model"),
        ("t5", ["encoder.block.0.layer.0.SelfAttention.q.weight"], "is T5, a text encoder"),
    ):
        path = write_hollow(tmp_path / f"{name}.safetensors", dict.fromkeys(keys, (2, 2)))
        arguments = ["init", "--pool", str(pool), "--weights", str(path), "--out", str(out)]
        assert main(arguments) == 2
        assert words in capsys.readouterr().err and not out.exists()


def test_doctor_tells_unusable_files_from_missing_ones(tmp_path: Path, capsys) -> None:
    from tests.families.flux1.pretended import write_hollow

    folder = tmp_path / "flux"
    scaled = {"shared.weight": (2, 2), "encoder.block.0.layer.0.SelfAttention.q.scale_weight": ()}
    write_hollow(folder / "t5xxl_fp8_scaled.safetensors", scaled)
    write_hollow(folder / "ae.safetensors", {"x": (4, 4)})
    half = folder / "ae.safetensors"
    half.write_bytes(half.read_bytes()[:-8])
    for name in ("flux1-dev", "flux1-schnell"):
        write_hollow(folder / f"{name}.safetensors", {"x": (1,)})
    values = {"kind": "flux1", "weights": "flux", "checkpoint": {"base": "o/n"}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    assert main(["doctor", "--model", str(tmp_path / "mine.yaml"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    parts = {e["part"]: (e["found"], e["broken"]) for e in found["model"]["files"]}
    assert parts["text_encoder_2"] == parts["vae"] == (False, True)
    assert parts["transformer"] == parts["text_encoder"] == (False, False)
    text = " ".join(found["problems"])
    assert "Files are missing: text_encoder, tokenizer, tokenizer_2." in text
    assert "each of flux1-dev.safetensors, flux1-schnell.safetensors" in text
    assert (
        "float8 checkpoint with separate scales" in text and "ae.safetensors is incomplete" in text
    )
    assert "'text_encoder/*' 'tokenizer/*' 'tokenizer_2/*'" in found["model"]["command"]


def test_init_sets_what_the_search_reads_with(tmp_path: Path, make_pool, capsys) -> None:
    pool = make_pool(tmp_path / "pool")
    out = tmp_path / "a.yaml"
    arguments = ["init", "--pool", str(pool), "--out", str(out), "--text"]
    assert main([*arguments, "nonsense"]) == 2 and not out.exists()
    assert "text" in capsys.readouterr().err
    assert main([*arguments, "minilm"]) == 0
    assert load_config(out).text == "minilm"
