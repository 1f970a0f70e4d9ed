"""Times float8 storage on a CPU: widening alone, a full-size layer, and a step of the tiny model.

    python scripts/bench_float8.py [--repeats 15]

One thread, its CPU time, everything in turns; ratios are medians over the rounds of the ratio
within a round. Widening is told beside a copy in the wider type, which is what memory allows. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

from autolora.config import load_config
from autolora.families.load import load_pipeline
from autolora.runtime.float8 import KERNEL, convert, multiply

NUMBERS = 2**24
STORAGES = {
    "bfloat16": ("bfloat16", "auto"),
    "float8, bfloat16": ("float8", "bfloat16"),
    "float32": ("float32", "auto"),
    "float8, float32": ("float8", "float32"),
}


def rounds(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every call, round by round, after a first round that warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            started = time.process_time()
            call()
            if turn:
                times[name].append(time.process_time() - started)
    return times


def ratio(times: dict[str, list[float]], one: str, other: str) -> float:
    """Median over the rounds of one call's time over another's."""
    pairs = zip(times[one], times[other], strict=True)
    return round(statistics.median(a / b for a, b in pairs), 3)


def widening(repeats: int) -> dict[str, Any]:
    """G numbers a second by the kernel and by PyTorch, and the kernel's time over a copy's."""
    library = KERNEL.get()
    if library is None:
        return {}
    result = {}
    for stored in (torch.float8_e4m3fn, torch.float8_e5m2):
        numbers = torch.randint(0, 120, (NUMBERS,), dtype=torch.uint8).view(stored)
        for dtype in (torch.bfloat16, torch.float32):
            source, target = torch.zeros(NUMBERS, dtype=dtype), torch.zeros(NUMBERS, dtype=dtype)
            calls = {
                "kernel": lambda n=numbers, t=target: convert(library, n, t, 1),
                "PyTorch": lambda n=numbers, t=target: t[: NUMBERS // 16].copy_(n[: NUMBERS // 16]),
                "copy": lambda s=source, t=target: t.copy_(s),
            }
            times = rounds(calls, repeats)
            name = f"{stored} to {dtype}".replace("torch.", "")
            result[name] = {
                "kernel_g": round(NUMBERS / statistics.median(times["kernel"]) / 1e9, 2),
                "pytorch_g": round(NUMBERS / 16 / statistics.median(times["PyTorch"]) / 1e9, 2),
                "ratio": {"to a copy": ratio(times, "kernel", "copy")},
            }
            print(name, result[name])
    return result


def layer(repeats: int) -> dict[str, Any]:
    """A layer of FLUX.1's width and 256 tokens, over the same in the type that is computed in."""
    library = KERNEL.get()
    result = {}
    for dtype in (torch.bfloat16, torch.float32):
        x, weight = torch.randn(256, 3072).to(dtype), torch.randn(9216, 3072) / 55
        narrow, wide = weight.to(torch.float8_e4m3fn), weight.to(dtype)
        calls: dict[str, Callable[[], Any]] = {"wide": lambda x=x, w=wide: F.linear(x, w)}
        if library is not None:
            calls["float8"] = lambda x=x, n=narrow: multiply(library, x, n, None)
            result[str(dtype).removeprefix("torch.")] = ratio(
                rounds(calls, max(repeats // 3, 3)), "float8", "wide"
            )
    print("layer 3072 to 9216, 256 tokens, float8 over wide:", result)
    return {"ratio": result}


def step_call(storage: str, compute: str) -> Callable[[], Any]:
    """One guided step of the tiny model."""
    config = dataclasses.replace(load_config("tiny"), storage=storage, compute=compute)
    pipe = load_pipeline(config)
    seen: list[tuple[Any, Any]] = []
    inner = pipe.model_fn

    def record(*args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        return inner(*args, **kwargs)

    pipe.model_fn = record
    length = pipe.dit.config.text_length
    pipe(
        "a neon elephant", cfg_scale=3.0, height=128, width=128, num_inference_steps=1, seed=0,
        t5_sequence_length=length, progress_bar_cmd=lambda items: items,
    )  # fmt: skip
    args, kwargs = seen[0]
    return lambda: inner(*args, **kwargs)


def steps(repeats: int) -> dict[str, Any]:
    """A step of the tiny model in every storage."""
    calls = {name: step_call(*types) for name, types in STORAGES.items()}
    times = rounds(calls, repeats)
    result = {
        f"{name} over {wide}": ratio(times, name, wide)
        for name, wide in (("float8, bfloat16", "bfloat16"), ("float8, float32", "float32"))
    }
    result["float8, bfloat16 over float32"] = ratio(times, "float8, bfloat16", "float32")
    milliseconds = {name: round(1e3 * statistics.median(t), 2) for name, t in times.items()}
    print("step of the tiny model, ms:", milliseconds, "ratios:", result)
    return {"ratio": result, "milliseconds": milliseconds}


def main() -> None:
    """Parse the command line, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    parts = {"widening": widening, "layer": layer, "step": steps}
    print(json.dumps({name: part(args.repeats) for name, part in parts.items()}))


if __name__ == "__main__":
    main()
