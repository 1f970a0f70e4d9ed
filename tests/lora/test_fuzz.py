"""The fuzzer itself: reproducible, varied, and able to see a fault; a small run of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from autolora.errors import LoRAFormatError
from autolora.lora import LoRA
from scripts import fuzz_reader
from scripts.fuzzing.corpus import FILES, lay_out, pack
from scripts.fuzzing.mutations import Mutator

ROOT = Path(__file__).parents[2]


def test_a_few_thousand_broken_files(tmp_path):
    tally = fuzz_reader.run_chunk(Mutator(1), range(2000), tmp_path / "f.safetensors")
    assert tally.faults == {}
    assert tally.executions == 2000 == tally.loaded + sum(tally.sentences.values())
    # The files are neither all good nor all bad in the same way.
    assert tally.loaded > 150
    assert len(tally.sentences) > 40


def test_the_same_number_is_the_same_file():
    assert [Mutator(3).make(n) for n in range(50)] == [Mutator(3).make(n) for n in range(50)]
    assert len({Mutator(seed).make(7) for seed in range(20)}) > 15


@pytest.mark.parametrize("name", FILES)
def test_the_corpus_is_of_valid_files(tmp_path, name):
    """What the mutations begin with is read without a complaint about bytes or header."""
    path = tmp_path / "f.safetensors"
    entries, data = lay_out({key: ("F32", shape) for key, shape in FILES[name].items()})
    path.write_bytes(pack(entries, data))
    try:
        assert LoRA.load(path).layers
    except LoRAFormatError as error:
        assert "not a valid safetensors file" not in str(error)
        assert "of shape" not in str(error)


def break_loader(monkeypatch, fail):
    monkeypatch.setattr("autolora.lora.lora.load_file", fail)


def test_faults_are_seen(tmp_path, monkeypatch):
    def tally_with(fail):
        break_loader(monkeypatch, fail)
        return fuzz_reader.run_chunk(Mutator(1), range(3), tmp_path / "f.safetensors").faults

    def crash(*_, **__):
        raise ZeroDivisionError("a bug")

    def two_lines(path, *_, **__):
        raise LoRAFormatError(f"{path.name} is\nbad.")

    def nameless(*_, **__):
        raise LoRAFormatError("Something is bad.")

    def hang(*_, **__):
        while True:
            pass

    ((kind, numbers),) = tally_with(crash).items()
    assert kind.startswith("ZeroDivisionError at test_fuzz.py") and numbers == [0, 1, 2]
    assert "no clean sentence" in next(iter(tally_with(two_lines)))
    assert "does not name the file" in next(iter(tally_with(nameless)))
    monkeypatch.setattr(fuzz_reader, "CPU_SECONDS", 0.05)
    assert "Hang" in next(iter(tally_with(hang)))


def test_the_command(tmp_path):
    command = [sys.executable, "scripts/fuzz_reader.py", "--count", "200", "--seed", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["executions"] == 200 == facts["loaded"] + facts["refused"]
    assert facts["faults"] == {}
