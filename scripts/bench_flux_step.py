"""Times one denoising step of FLUX.1 with gated LoRAs beside its rivals, in one process.

    python scripts/bench_flux_step.py                    # GPU: FLUX.1 at 1024 x 1024
    python scripts/bench_flux_step.py --device cpu       # one full-size block, and the tiny model
    python scripts/bench_flux_step.py --device cpu --blocks 1 --repeats 1     # smoke test

Weights and adapters are random: only time and memory are looked at. Everything takes turns within
a round, and a ratio is the median over the rounds of the ratio to the bare step in that round.
Needs torch and this repository; Triton on a GPU. PEFT is used where it is installed, otherwise what
its layers compute; DiffSynth's merger is said again, and the table's names say so. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from autolora.fusion.kernels.dispatch import kernel_name
from scripts.flux_step import measure, variants
from scripts.flux_step.model import BLOCK, FLUX, TINY, FluxTransformer, Sizes, build, inputs

GATED = "AutoLoRA, gated"


def step_calls(
    model: FluxTransformer,
    example: tuple[Tensor, ...],
    layers: dict[str, nn.Linear],
    count: int,
    rank: int,
    args: argparse.Namespace,
) -> dict[str, Callable[[], Callable[[], object]]]:
    """Return the bare step and every way to run the adapters."""
    dtype = example[0].dtype
    factors = variants.random_adapters(layers, count, rank, dtype)
    gates = variants.random_gates(layers)
    chosen: dict[str, variants.Variant] = {
        "bare": layers,
        GATED: variants.gated(layers, factors, gates),
        "AutoLoRA, plain sum": variants.summed(layers, factors),
    }
    if not args.ours_only:
        chosen["stacked merger (as DiffSynth)"] = variants.stacked(layers, factors, gates, dtype)
        peft, name = variants.separate(model, layers, factors)
        chosen[name] = peft

    def install(name: str) -> Callable[[], object]:
        variants.install(model, layers)
        variants.install(model, chosen[name])
        return lambda: model(*example)

    return {name: (lambda name=name: install(name)) for name in chosen}


def table(
    title: str, results: dict[str, measure.Result], floor: float, extra: float
) -> dict[str, Any]:
    """Print one comparison; return it as plain data."""
    print(f"\n{title}")
    for name, result in results.items():
        memory = f"{result.temporary / 2**30:8.2f} GiB temporary" if result.temporary else ""
        print(f"  {name:32s} {result.seconds * 1e3:10.2f} ms {result.ratio:7.3f} x bare {memory}")
    bare, ours = results["bare"].seconds, results[GATED].seconds
    print(
        f"  limits: the bare step could take {floor * 1e3:.2f} ms and takes {bare / floor:.2f} x "
        f"that; the adapters could add {extra * 1e3:.2f} ms and add {(ours - bare) * 1e3:.2f} ms"
    )
    numbers = {name: asdict(result) for name, result in results.items()}
    return {"title": title, "floor": floor, "extra_floor": extra, "results": numbers}


def compare(
    label: str,
    sizes: Sizes,
    dtype: torch.dtype,
    float8: bool,
    configurations: list[tuple[int, int]],
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Build one model and time every configuration of adapters on it."""
    device = torch.device(args.device)
    model, example = build(sizes, dtype, device, float8), inputs(sizes, dtype, device)
    layers = variants.linears(model)
    bandwidth, rate = measure.limits(dtype, device)
    print(f"\n{label}: copies {bandwidth / 1e9:.0f} GB/s, products {rate / 1e12:.2f} TFLOP/s")
    found = []
    for count, rank in configurations:
        calls = step_calls(model, example, layers, count, rank, args)
        results = measure.interleaved(calls, args.repeats, device)
        need = measure.needs(layers, sizes, count, rank, dtype.itemsize)
        extra = max(need.extra_bytes / bandwidth, need.extra_flops / rate)
        title = f"{label}, N={count}, rank {rank}"
        found.append(table(title, results, need.flops / rate, extra))
        variants.install(model, layers)
    return found


def picture(sizes: Sizes, args: argparse.Namespace) -> dict[str, Any]:
    """Draw 20 steps in float8 storage with three adapters; return memory and times."""
    device, dtype = torch.device(args.device), torch.bfloat16
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    model, example = build(sizes, dtype, device, True), inputs(sizes, dtype, device)
    layers = variants.linears(model)
    factors = variants.random_adapters(layers, 3, 16, dtype)
    variants.install(model, variants.gated(layers, factors, variants.random_gates(layers)))
    torch.cuda.synchronize()
    built = time.perf_counter() - started
    latents, *rest = example
    started = time.perf_counter()
    for _ in range(20):
        latents = latents - model(latents, *rest) / 20
    torch.cuda.synchronize()
    result = {
        "build_s": round(built, 2),
        "picture_s": round(time.perf_counter() - started, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }
    print(f"\n20 steps, float8 storage, 3 adapters of rank 16, transformer alone: {result}")
    return result


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--blocks", type=int, help="fewer blocks of each kind, for a quick look")
    parser.add_argument("--counts", type=int, nargs="+", help="numbers of adapters")
    parser.add_argument("--ranks", type=int, nargs="+", help="ranks of adapters")
    parser.add_argument("--ours-only", action="store_true", help="leave the rivals out")
    return parser.parse_args()


def main() -> None:
    """Measures what the command line asks for."""
    args = parse()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    device = torch.device(args.device)
    found: list[dict[str, Any]] = []
    extra: dict[str, Any] = {}
    if device.type == "cuda":
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {kernel_name(device)}")
        sizes = FLUX
        if args.blocks:
            sizes = replace(sizes, double_blocks=args.blocks, single_blocks=args.blocks)
        configurations = [(n, r) for r in args.ranks or (16, 64) for n in args.counts or (1, 3, 8)]
        for label, float8 in (("FLUX.1, bfloat16", False), ("FLUX.1, float8 storage", True)):
            found += compare(label, sizes, torch.bfloat16, float8, configurations, args)
            torch.cuda.empty_cache()
        extra["picture"] = picture(sizes, args)
    else:
        print(
            f"No GPU is used: {args.threads} CPU threads, torch {torch.__version__}, kernel "
            f"{kernel_name(device)}. Absolute times say nothing about a GPU."
        )
        tiny, block = TINY, BLOCK
        if args.blocks:
            tiny = replace(tiny, double_blocks=args.blocks, single_blocks=args.blocks)
            block = replace(block, image_tokens=24, text_tokens=8)
        configurations = [(n, r) for r in args.ranks or (16,) for n in args.counts or (1, 3, 8)]
        few = [pair for pair in configurations if pair[0] <= 3]
        found += compare("tiny, float32", tiny, torch.float32, False, configurations, args)
        found += compare("tiny, float8 storage", tiny, torch.float32, True, few, args)
        found += compare("tiny, bfloat16", tiny, torch.bfloat16, False, few, args)
        found += compare("one full-size block, float32", block, torch.float32, False, few, args)
    summary = {"device": args.device, "threads": args.threads, "repeats": args.repeats, **extra}
    print(json.dumps({**summary, "kernel": kernel_name(device), "tables": found}))


if __name__ == "__main__":
    main()
