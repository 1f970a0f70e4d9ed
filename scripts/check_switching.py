"""Checks that switching adapters a thousand times leaves memory and pictures as they were.

    python scripts/check_switching.py [--switches 1000] [--steps 1]

Three of eight adapters with random strengths are chosen over and over on the shipped tiny FLUX,
with a short generation after every switch. Resident memory at the end may be 2 % above that after
the first 50 switches at most, and the first set must draw the same picture again, byte for byte.
AutoLoRA goes through its pipeline (gated, cache of the default size). Beside it, in processes of
their own: DiffSynth's ``load_lora`` and ``clear_lora`` on the same float8 transformer, and PEFT's
``hotswap`` in three slots on the same transformer with plain float32 linears, since PEFT knows no
float8 storage. The exit status is 1 where AutoLoRA fails; the last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.switching.files import AdapterFiles, find_adapter, write_adapters

PROGRAMS = ("autolora", "diffsynth", "peft")
COUNT, AT_ONCE, RANK, SIZE = 8, 3, 8, 64
WARM_UP, MOST_GROWTH = 50, 1.02
PROMPT = "a clock on a blue background"

Wanted = list[tuple[AdapterFiles, float]]
Switch = Callable[[Wanted], None]
Draw = Callable[[], bytes]


def names() -> list[str]:
    """Names of the adapters."""
    return [f"adapter{number}" for number in range(COUNT)]


def autolora(folder: Path, steps: int) -> tuple[Switch, Draw]:
    """The product itself."""
    from autolora import AutoLoRAPipeline
    from autolora.fusion import make_ready

    pipe = AutoLoRAPipeline.from_config("tiny", pool=folder / "plain")

    def switch(wanted: Wanted) -> None:
        pipe.attach([(files.name, strength) for files, strength in wanted], "gated")
        make_ready(pipe.base.dit, pipe.base.torch_dtype)  # or it would hide in the first step

    def draw() -> bytes:
        return pipe(PROMPT, retrieve=False, steps=steps, size=(SIZE, SIZE)).image.tobytes()

    return switch, draw


def rival(name: str, folder: Path, steps: int) -> tuple[Switch, Draw]:
    """DiffSynth or PEFT beside the same model and the same sampler."""
    from autolora.config import load_config
    from autolora.families.load import load_pipeline
    from autolora.generate.sample import denoise
    from autolora.request import make_request
    from scripts.switching.programs import DiffSynth, PeftHotswap

    config = load_config("tiny")
    if name == "peft":
        config = dataclasses.replace(config, storage="float32", compute="auto")
    pipe = load_pipeline(config)
    program: Any
    if name == "peft":
        first = [(find_adapter(folder, entry), 1.0) for entry in names()[:AT_ONCE]]
        program = PeftHotswap(pipe.dit, first, keep=False)
    else:
        program = DiffSynth(pipe, pipe.dit, keep=False)
    request = make_request(config, PROMPT, steps=steps, size=(SIZE, SIZE))

    def draw() -> bytes:
        return denoise(pipe, request, PROMPT)[0].tobytes()

    return program.switch, draw


def resident() -> int:
    """Bytes of resident memory, garbage collected."""
    import psutil

    gc.collect()
    return int(psutil.Process().memory_info().rss)


def check(program: str, folder: Path, switches: int, steps: int) -> dict[str, Any]:
    """Switch and draw; return what memory and pictures did."""
    make = autolora if program == "autolora" else lambda *given: rival(program, *given)
    switch, draw = make(folder, steps)
    files = [find_adapter(folder, name) for name in names()]
    first: Wanted = list(zip(files[:AT_ONCE], (1.0, 0.8, 0.6), strict=True))
    switch(first)
    picture = draw()
    chance = random.Random(0)
    seconds, memory, pictures = [], {}, set()
    for turn in range(1, switches + 1):
        wanted = [(entry, chance.uniform(-1, 1.5)) for entry in chance.sample(files, AT_ONCE)]
        started = time.perf_counter()
        switch(wanted)
        seconds.append(time.perf_counter() - started)
        pictures.add(draw())
        if turn % WARM_UP == 0 or turn == switches:
            memory[turn] = resident()
    switch(first)
    after = memory.get(WARM_UP, next(iter(memory.values())))
    return {
        "program": program,
        "switches": switches,
        "different_pictures": len(pictures),
        "mib_after_50": round(after / 2**20, 1),
        "mib_at_end": round(memory[switches] / 2**20, 1),
        "mib_most": round(max(memory.values()) / 2**20, 1),
        "growth": round(memory[switches] / after, 4),
        "same_picture": draw() == picture,
        "median_switch_ms": round(1e3 * statistics.median(seconds), 3),
    }


def spawn(program: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Check a program in a process of its own."""
    command = [sys.executable, __file__, "--program", program, "--folder", str(folder)]
    command += ["--switches", str(args.switches), "--steps", str(args.steps)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise SystemExit(f"{program} ended with status {done.returncode}.")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Check all programs, or the one that is named; print facts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--switches", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--program", choices=PROGRAMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.program:
        print(json.dumps(check(args.program, args.folder, args.switches, args.steps)))
        return
    import torch

    from autolora.families.tiny.weights import SHIPPED, load_tiny
    from scripts.switching.programs import block_layers

    with tempfile.TemporaryDirectory() as folder:
        shapes = block_layers(load_tiny(SHIPPED)[1]["dit"])
        write_adapters(Path(folder), shapes, COUNT, RANK, torch.bfloat16)
        results = [spawn(program, Path(folder), args) for program in PROGRAMS]
    for result in results:
        print(", ".join(f"{key} {value}" for key, value in result.items()))
    print(json.dumps({"results": results}))
    ours = results[0]
    if not ours["same_picture"] or ours["growth"] > MOST_GROWTH:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
