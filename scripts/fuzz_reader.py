"""Feeds broken LoRA files to the reader and the loader: each loads or gives one clear sentence.

    python scripts/fuzz_reader.py --count 1000000 [--seed 0] [--processes 1]

Files are small valid ones of every format with mutated keys, shapes, types, headers and bytes, the
same for the same seed (``--only NUMBER`` repeats one of them and writes it to ``--keep``). A file
passes when it loads and all its layers can be computed, or when it raises `LoRAFormatError` with
one printable line that names the file. Anything else is a fault: another exception, a line that is
none, more than 10 seconds of CPU time, memory above the limit, a dead process. The last line is
JSON; the exit status is 1 when there was a fault.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.fuzzing.corpus import real_key_lists
from scripts.fuzzing.mutations import Mutator

ROOT = Path(__file__).resolve().parents[1]
KEY_LISTS = Path(os.environ.get("AUTOLORA_FORMATS", ROOT.parent / "shared" / "formats"))
CPU_SECONDS = 10.0
WALL_SECONDS = 600.0  # only against waiting for ever: a busy machine may be slow
MAX_SENTENCE = 1500
MAX_TEMPLATES = 5000
CHUNK = 2000


class Hang(Exception):
    """A file took too long."""


@dataclass
class Tally:
    """What became of the files.

    Attributes:
        executions: How many were tried.
        loaded: How many loaded.
        sentences: How often each kind of error was said.
        faults: What must not be, by kind, with the number of the first file.
        slowest: Most seconds, by the clock, that one file took.
    """

    executions: int = 0
    loaded: int = 0
    sentences: Counter[str] = field(default_factory=Counter)
    faults: dict[str, list[int]] = field(default_factory=dict)
    slowest: float = 0.0

    def fault(self, kind: str, number: int) -> None:
        """Note something that must not be; the first few numbers are kept."""
        known = self.faults.setdefault(kind, [])
        if len(known) < 5:
            known.append(number)

    def add(self, other: Tally) -> None:
        """Take another tally in."""
        self.executions += other.executions
        self.loaded += other.loaded
        self.sentences.update(other.sentences)
        self.slowest = max(self.slowest, other.slowest)
        for kind, numbers in other.faults.items():
            for number in numbers:
                self.fault(kind, number)


def try_file(path: Path, content: bytes, number: int, tally: Tally) -> None:
    """Write a file, load it, and judge what happens."""
    from autolora.errors import LoRAFormatError
    from autolora.lora import LoRA
    from autolora.lora.covers import embedded_covers
    from autolora.lora.metadata import parse_header
    from autolora.safetensors_io import read_header

    path.write_bytes(content)
    tally.executions += 1
    started = time.perf_counter()
    lora = None
    try:
        lora = LoRA.load(path)
        metadata = read_header(path).metadata
        parse_header(metadata)
        embedded_covers(metadata)
        tally.loaded += 1
        json.dumps(lora.report.to_dict())
        compute(lora, thorough=number % 8 == 0)
    except LoRAFormatError as error:
        if lora is not None:
            tally.fault(f"refused after loading: {template_of(str(error), path)}", number)
        judge(str(error), path, number, tally)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        tally.fault(f"{type(error).__name__} at {place}: {str(error)[:120]}", number)
    tally.slowest = max(tally.slowest, time.perf_counter() - started)


def compute(lora: Any, thorough: bool = False) -> None:
    """Everything that a loaded file promises can be computed and is finite.

    Args:
        lora: The loaded file.
        thorough: Also bring every layer into low-rank form.

    Raises:
        AssertionError: A result has another shape, or is not finite.
        LoRAFormatError: What was loaded is refused afterwards.
    """
    import torch

    from autolora.lora.check import Fingerprint

    def base(layer: str) -> Any:
        out, inner = lora.shape(layer)
        return torch.linspace(0.7, 1.3, out * inner).reshape(out, inner)

    found: list[tuple[Any, tuple[int, ...]]] = []
    needy = set(lora.needs_base)
    for layer in lora.layers:
        shape = tuple(lora.shape(layer))
        found.append((lora.delta(layer, base(layer) if layer in needy else None), shape))
    for low in (lora, lora.low_rank(2, base)) if thorough else (lora,):
        for layer in low.layers:
            if low is not lora or low.exact(layer):
                down, up = low.factors(layer)
                out, inner = low.shape(layer)
                found += [(down, (low.rank(layer), inner)), (up, (out, low.rank(layer)))]
    found += [(lora.bias(layer), tuple(lora.bias(layer).shape)) for layer in lora.bias_layers]
    found += [(change, tuple(change.shape)) for change in lora.norms.values()]
    for which in ("clip", "t5"):
        if (part := lora.text_encoder(which)) is not None:
            found += [(part.delta(layer), tuple(part.shape(layer))) for layer in part.layers]
    found += [(kind, tuple(kind.shape)) for kind in Fingerprint.of(lora).numbers.values()]
    for tensor, expected in found:
        assert tuple(tensor.shape) == expected, f"{tuple(tensor.shape)} is not {expected}"
        assert torch.isfinite(tensor).all(), "not finite"


def judge(sentence: str, path: Path, number: int, tally: Tally) -> None:
    """An error must be one printable line of bounded length that names the file."""
    template = template_of(sentence, path)
    if len(tally.sentences) < MAX_TEMPLATES or template in tally.sentences:
        tally.sentences[template] += 1
    if not sentence.isprintable() or not sentence.endswith(".") or len(sentence) > MAX_SENTENCE:
        tally.fault(f"no clean sentence: {template[:120]}", number)
    if path.name not in sentence:
        tally.fault(f"does not name the file: {template[:120]}", number)


def template_of(sentence: str, path: Path) -> str:
    """A sentence without the names and numbers of this one file."""
    text = sentence.replace(str(path), "FILE")
    text = re.sub(r"'(?:[^'\\]|\\.)*'|\"[^\"]*\"", "'…'", text)
    text = re.sub(r"\b(?:single_)?blocks\.\S+|\b\w+embedder\S*|\bfinal_\S+", "LAYER", text)
    text = re.sub(r"\[[^\]]*\]", "[…]", text)
    text = re.sub(r"\b(?:B?F|[IU])\d+(?:_E\dM\d)?\b|\bBOOL\b", "DTYPE", text)
    text = re.sub(r"\(.{60,}\)", "(…)", text)
    return re.sub(r"\d+", "N", text)[:300]


def run_chunk(mutator: Mutator, numbers: range, path: Path, current: Any = None) -> Tally:
    """Try some files, each with a limit of time."""

    def too_long(*_: object) -> None:
        raise Hang(f"more than {CPU_SECONDS:g} s of CPU time, or {WALL_SECONDS:g} s")

    tally = Tally()
    signals = (signal.SIGPROF, signal.SIGALRM)
    before = [signal.signal(number, too_long) for number in signals]
    try:
        for number in numbers:
            if current is not None:
                current.value = number
            content = mutator.make(number)
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
            signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
            try_file(path, content, number, tally)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
    return tally


def work(args: argparse.Namespace, first: int, current: Any, results: Any) -> None:
    """A process: tries every ``args.processes``-th chunk, and sends a tally for each."""
    import torch

    from autolora.lora import LoRA  # noqa: F401

    torch.set_num_threads(1)
    used = peak_megabytes()
    limit = (args.memory << 20) + int(Path("/proc/self/statm").read_text().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    mutator = Mutator(args.seed, real_key_lists(KEY_LISTS))
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=shared, prefix="fuzz-") as folder:
        path = Path(folder) / "fuzz.safetensors"
        for start in range(first * CHUNK, args.count, args.processes * CHUNK):
            numbers = range(start, min(start + CHUNK, args.count))
            results.put((run_chunk(mutator, numbers, path, current), 0.0))
    results.put((None, peak_megabytes() - used))


def peak_megabytes() -> float:
    """Most resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_all(args: argparse.Namespace) -> tuple[Tally, float]:
    """Start the processes and gather their tallies; a dead one is a fault."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    currents = [context.RawValue("q", -1) for _ in range(args.processes)]
    workers = [
        context.Process(target=work, args=(args, n, current, results), daemon=True)
        for n, current in enumerate(currents)
    ]
    for worker in workers:
        worker.start()
    total, growth, shown = Tally(), 0.0, time.monotonic()
    running = set(range(len(workers)))
    while running:
        try:
            tally, grown = results.get(timeout=2)
        except Exception:
            for n in [n for n in running if not workers[n].is_alive()]:
                running.discard(n)
                if workers[n].exitcode:
                    total.fault(f"process died ({workers[n].exitcode})", currents[n].value)
            continue
        growth = max(growth, grown)
        if tally is not None:
            total.add(tally)
        if time.monotonic() - shown > 30:
            shown = time.monotonic()
            print(f"{total.executions} files, {len(total.faults)} faults", file=sys.stderr)
    return total, growth


def keep_one(args: argparse.Namespace) -> None:
    """Write one file of the sequence and try it with its traceback."""
    content = Mutator(args.seed, real_key_lists(KEY_LISTS)).make(args.only)
    args.keep.write_bytes(content)
    print(f"File {args.only} is in {args.keep}: {content[:400]!r}")
    from autolora.lora import LoRA

    lora = LoRA.load(args.keep)
    json.dumps(lora.report.to_dict())
    compute(lora, thorough=True)
    print(lora)


def main() -> int:
    """Parses the command line, runs, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1_000_000, help="files to try")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--memory", type=int, default=2048, help="MiB that a process may add")
    parser.add_argument("--only", type=int, help="number of one file to repeat")
    parser.add_argument("--keep", type=Path, default=Path("fuzz.safetensors"))
    args = parser.parse_args()
    if args.only is not None:
        keep_one(args)
        return 0
    started = time.monotonic()
    total, growth = run_all(args)
    seconds = time.monotonic() - started
    for template, count in total.sentences.most_common():
        print(f"{count:9d}  {template}")
    for kind, numbers in sorted(total.faults.items()):
        print(f"FAULT {kind} (files {numbers})")
    print(f"{total.executions} files in {seconds:.0f} s, {total.executions / seconds:.0f} a second")
    facts = {
        "executions": total.executions,
        "loaded": total.loaded,
        "refused": sum(total.sentences.values()),
        "kinds_of_sentence": len(total.sentences),
        "faults": total.faults,
        "slowest_seconds": round(total.slowest, 3),
        "memory_growth_mb": round(growth, 1),
        "seed": args.seed,
        "key_lists": sorted(real_key_lists(KEY_LISTS)),
    }
    print(json.dumps(facts))
    return 1 if total.faults or total.executions != args.count else 0


if __name__ == "__main__":
    sys.exit(main())
