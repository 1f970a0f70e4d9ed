"""Measures which adapters are chosen for prompts as people type them.

    python scripts/evaluate_search.py [--model tiny] [--half reporting] [--misses]

A prompt counts as right when the set that is chosen is one of the right ones: all that was asked
for and nothing else. Prompts of `tests/data/prompts_tuning.jsonl` may be tuned on, those of
`tests/data/prompts_reporting.jsonl` never. Prints a table with 95 % intervals (Wilson's) by kind of
prompt, and on the last line the same as JSON. Prompts whose adapters the pool lacks are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

from autolora import AutoLoRAPipeline
from autolora.retrieval import Searcher, choose

DATA = Path(__file__).resolve().parents[1] / "tests" / "data"
HALVES = ("tuning", "reporting")


@dataclass(frozen=True)
class Prompt:
    """A prompt with the sets of adapters that are right for it."""

    kind: str
    text: str
    right: tuple[frozenset[str], ...]
    negative: str = ""


def read_prompts(half: str) -> list[Prompt]:
    """The prompts of one half, in the order of the file."""
    lines = (DATA / f"prompts_{half}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [
        Prompt(r["kind"], r["prompt"], tuple(map(frozenset, r["right"])), r.get("negative", ""))
        for r in rows
    ]


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    if not count:
        return 0.0, 1.0
    share, zz = right / count, z * z
    centre = (share + zz / (2 * count)) / (1 + zz / count)
    half = z / (1 + zz / count) * (share * (1 - share) / count + zz / (4 * count**2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def evaluate(
    searcher: Searcher, prompts: list[Prompt], k: int
) -> list[tuple[Prompt, frozenset[str]]]:
    """What is chosen for each prompt."""
    return [
        (p, frozenset(hit.name for hit in choose(searcher, p.text, k, negative=p.negative)))
        for p in prompts
    ]


def main() -> None:
    """Evaluate and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny", help="configuration or path of a YAML file")
    parser.add_argument("--half", choices=HALVES, default="reporting")
    parser.add_argument("--misses", action="store_true", help="list what went wrong")
    options = parser.parse_args()
    pipe = AutoLoRAPipeline.from_config(options.model)
    searcher = pipe.open_index().searcher
    names = {record.name for record in searcher.index.records}
    every = read_prompts(options.half)
    prompts = [p for p in every if any(right <= names for right in p.right)]
    start = time.process_time()
    found = evaluate(searcher, prompts, pipe.config.top_k)
    seconds = (time.process_time() - start) / max(len(prompts), 1)
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for prompt, chosen in found:
        for kind in (prompt.kind, "all"):
            counts[kind][0] += chosen in prompt.right
            counts[kind][1] += 1
        if options.misses and chosen not in prompt.right:
            wanted = " or ".join("+".join(sorted(right)) or "nothing" for right in prompt.right)
            got = "+".join(sorted(chosen)) or "nothing"
            print(f"{prompt.kind}: {prompt.text[:70]!r}: {got}, not {wanted}")
    counts["all"] = counts.pop("all")
    table = Table("prompts", "right", "of", "share", "95 % interval", title=f"{options.half} half")
    for kind, (right, count) in counts.items():
        low, high = wilson(right, count)
        table.add_row(
            kind, str(right), str(count), f"{right / count:.2f}", f"{low:.2f} to {high:.2f}"
        )
    Console(width=100).print(table)
    print(f"{len(every) - len(prompts)} prompts left out; {1000 * seconds:.1f} ms of CPU a prompt.")
    print(json.dumps({"half": options.half, "right": counts, "cpu_ms": round(1000 * seconds, 1)}))


if __name__ == "__main__":
    main()
