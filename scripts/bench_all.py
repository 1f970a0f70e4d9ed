"""Runs every benchmark small, and tells what moved against the last committed run.

    python scripts/bench_all.py [--only step switch ...] [--moved 0.1] [--write]

Ratios only: they are what survives another machine, roughly. With ``--write`` the file
``scripts/bench_all.json`` is replaced, to be committed with the change that moved something. One
thread each; run it on a quiet machine, or twice. Needs what the benchmarks need.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "scripts" / "bench_all.json"
BENCHMARKS = {
    "float8": ("bench_float8.py", "--repeats", "7"),
    "step": (
        "bench_flux_step.py", "--device", "cpu", "--threads", "1", "--repeats", "5",
        "--counts", "3", "8",
    ),
    "switch": ("bench_switch.py", "--model", "tiny", "--repeats", "9", "--threads", "1"),
    "pipeline": ("bench_pipeline.py", "--repeats", "3", "--threads", "1"),
    "many": (
        "bench_many.py", "--pictures", "2", "--steps", "4", "--batches", "2",
        "--repeats", "3",
    ),
    "console": ("bench_console.py", "--adapters", "200", "--repeats", "5", "--starts", "1"),
}  # fmt: skip


def ratios(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Yield every number that stands under a key ``ratio``, with the path to it."""
    if isinstance(value, dict):
        label = value.get("title") or value.get("way")
        for key, inner in value.items():
            if key in ("ratio", "ratios"):
                yield from numbers(inner, f"{name}/{label}" if label else name)
            else:
                part = "" if key in ("tables", "rows", "results") else f"/{key}"
                yield from ratios(inner, f"{name}/{label}{part}" if label else f"{name}{part}")
    elif isinstance(value, list):
        for inner in value:
            yield from ratios(inner, name)


def numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    """Yield the numbers of a ratio, or of a table of ratios."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner, f"{name}/{key}")
    elif isinstance(value, (int, float)):
        yield name.lstrip("/"), round(float(value), 3)


def run(name: str) -> dict[str, float]:
    """Run one benchmark; an empty result where it fails, with its last words on stderr."""
    script, *arguments = BENCHMARKS[name]
    command = [sys.executable, str(ROOT / "scripts" / script), *arguments]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    try:
        return dict(ratios(json.loads(lines[-1]), name))
    except (IndexError, json.JSONDecodeError):
        words = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        print(f"{name} gave no result (exit {done.returncode}): {words}", file=sys.stderr)
        return {}


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch

    from autolora.runtime.hardware import bfloat16_instructions

    return {
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": bfloat16_instructions(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
    }


def commit() -> str:
    """The commit that is checked out, with a plus where files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")


def moved(
    before: dict[str, float], after: dict[str, float], least: float
) -> list[tuple[str, float, float]]:
    """Ratios that changed by more than a share, the largest change first."""
    pairs = [(name, before[name], after[name]) for name in after if before.get(name)]
    found = [pair for pair in pairs if abs(pair[2] / pair[1] - 1) > least]
    return sorted(found, key=lambda pair: -abs(pair[2] / pair[1] - 1))


def main() -> None:
    """Parse the command line, run, compare, perhaps write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    parser.add_argument("--moved", type=float, default=0.1, help="least change that is told")
    parser.add_argument("--write", action="store_true", help="replace the committed numbers")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.is_file() else {"ratios": {}}
    found: dict[str, float] = {}
    for name in args.only:
        print(f"{name} ...", flush=True)
        found |= run(name)
    facts = {"commit": commit(), "date": time.strftime("%Y-%m-%d"), "machine": machine()}
    changes = moved(kept["ratios"], found, args.moved)
    for name, before, after in changes:
        print(f"{name}: {before:.2f} -> {after:.2f}")
    print(f"{len(found)} ratios, {len(changes)} moved against {kept.get('commit', 'nothing')}")
    result = {**facts, "ratios": found}
    if args.write:
        text = json.dumps({**facts, "ratios": {**kept["ratios"], **found}}, indent=1)
        KEPT.write_text(text + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
