"""Times a switch from three adapters to three others: AutoLoRA, DiffSynth, PEFT, and a bare read.

    python scripts/bench_switch.py [--repeats 15] [--model tiny|blocks|both] [--device cpu|cuda]

``tiny`` is the shipped transformer. ``blocks`` is one double and two single blocks of FLUX.1's true
width, bfloat16 beside float8 storage, random weights: a switch costs per layer, so that FLUX.1's 19
and 38 blocks take about 19 times as long (the printed factor is by bytes of adapters). Six adapters
of random numbers are on the disk; every switch exchanges all three. Programs take turns. A warm
switch finds files in the program's memory, a cold one in the page cache of the system. AutoLoRA's
times include all that the first step would otherwise compute; on a GPU its adapters stay there
(``adapters.pin``). No program touches a base weight.

Ratios are of medians, over AutoLoRA's gated warm switch; the last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from autolora.fusion import GateBank
from scripts.switching.files import AdapterFiles, write_adapters
from scripts.switching.programs import (
    AutoLoRA,
    DiffSynth,
    PeftHotswap,
    PeftLoaded,
    Wanted,
    block_layers,
)

COUNT, AT_ONCE = 6, 3
REFERENCE = "AutoLoRA, gated, warm"
WIDTH, HEADS = 3072, 24
FLUX1_DOUBLE, FLUX1_SINGLE = 19, 38


def tiny_models(device: str) -> tuple[Any, nn.Module, torch.dtype]:
    """The shipped pipeline in float8, the same transformer with plain linears, and the type."""
    import dataclasses

    from autolora.config import load_config
    from autolora.families.load import load_pipeline

    config = dataclasses.replace(load_config("tiny"), device=device)
    pipe = load_pipeline(config)
    computes = "float32" if pipe.torch_dtype == torch.float32 else "bfloat16"
    plain = dataclasses.replace(config, storage=computes, compute="auto")
    return pipe, load_pipeline(plain).dit, pipe.torch_dtype


def block_models(device: str) -> tuple[Any, nn.Module, torch.dtype]:
    """Blocks of FLUX.1's width in float8 inside a pipeline, and the same with plain linears."""
    from diffsynth.models.flux_dit import FluxJointTransformerBlock, FluxSingleTransformerBlock
    from diffsynth.pipelines.flux_image import FluxImagePipeline

    from autolora.runtime.storage import store_in_float8

    dtype = torch.bfloat16
    with torch.device("meta"):
        dit = nn.Module()
        dit.blocks = nn.ModuleList([FluxJointTransformerBlock(WIDTH, HEADS)])
        dit.single_blocks = nn.ModuleList(
            FluxSingleTransformerBlock(WIDTH, HEADS) for _ in range(2)
        )
    dit = dit.to(dtype).to_empty(device=device).requires_grad_(False)
    for parameter in dit.parameters():
        parameter.fill_(0.01)
    stored = copy.deepcopy(dit)
    store_in_float8(stored, dtype, torch.device(device))
    pipe = FluxImagePipeline(device=device, torch_dtype=dtype)
    pipe.dit = stored
    return pipe, dit, dtype


def twin(model: nn.Module) -> nn.Module:
    """A copy with modules of its own and the same weights in memory."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


def random_gates(shapes: dict[str, tuple[int, int]]) -> GateBank:
    """Gates that are not neutral, so that their own work is done."""
    bank = GateBank.neutral(shapes)
    for weight in bank.parameters():
        nn.init.normal_(weight, std=0.1)
    return bank.requires_grad_(False)


def make_programs(
    pipe: Any, plain: nn.Module, dtype: torch.dtype, files: list[AdapterFiles]
) -> dict[str, Any]:
    """Every program on a transformer of its own; all share the weights."""
    gates = random_gates(dict(block_layers(plain))).to(next(plain.parameters()).device)
    first: Wanted = [(entry, 1.0) for entry in files[:AT_ONCE]]
    loaded = {}
    for keep in (False, True):
        dit = twin(pipe.dit)
        host = copy.copy(pipe)
        host._modules = {**pipe._modules, "dit": dit}
        loaded[keep] = DiffSynth(host, dit, keep)
    return {
        "AutoLoRA, sum, warm": AutoLoRA(twin(pipe.dit), dtype, "sum"),
        REFERENCE: AutoLoRA(twin(pipe.dit), dtype, "gated", gates),
        "AutoLoRA, gated, cold": AutoLoRA(twin(pipe.dit), dtype, "gated", gates),
        "DiffSynth hotload, reads files": loaded[False],
        "DiffSynth hotload, files in memory": loaded[True],
        "PEFT hotswap, reads files": PeftHotswap(twin(plain), first, keep=False),
        "PEFT hotswap, files in memory": PeftHotswap(twin(plain), first, keep=True),
        "PEFT set_adapter, all loaded": PeftLoaded(twin(plain), files),
    }


def check_agreement(programs: dict[str, Any], plain: nn.Module, wanted: Wanted, layer: str) -> None:
    """Stop where two programs add different things to a layer's output."""
    inner = block_layers(plain)[layer][1]
    weight = next(plain.parameters())
    x = torch.randn(4, inner, generator=torch.Generator().manual_seed(0)).to(weight)
    truth = None
    for name, program in programs.items():
        if "gated" in name:
            continue
        program.switch(wanted)
        dit = program.model.model if hasattr(program, "model") else program.dit
        base = plain if hasattr(program, "model") else None
        with torch.no_grad():
            fused = dit.get_submodule(layer)
            bare = base.get_submodule(layer) if base is not None else _bare(fused)
            added = (fused(x) - bare(x)).double()
        truth = added if truth is None else truth
        error = float((added - truth).norm() / truth.norm())
        if error > (0.05 if weight.dtype == torch.bfloat16 else 1e-3):
            raise SystemExit(f"{name} adds something else at {layer}: relative difference {error}")


def _bare(fused: nn.Module) -> nn.Module:
    """The layer without adapters."""
    if hasattr(fused, "base"):
        return fused.base
    bare = copy.copy(fused)
    bare.lora_A_weights, bare.lora_B_weights = [], []
    return bare


def read_bytes(wanted: Wanted) -> int:
    """Read the files and do nothing with them."""
    return sum(len(files.plain.read_bytes()) for files, _ in wanted)


def small_changes(
    one_strength: AutoLoRA, one_adapter: AutoLoRA, files: list[AdapterFiles]
) -> dict[str, Callable[[int], None]]:
    """Calls that change less than all three adapters, each on a transformer of its own."""

    def strength(turn: int) -> None:
        one_strength.switch([(files[0], 0.1 + turn / 100), (files[1], 1.0), (files[2], 1.0)])

    def adapter(turn: int) -> None:
        third = files[2 + turn % 2]
        one_adapter.switch([(files[0], 1.0), (files[1], 1.0), (third, 1.0)])

    return {"AutoLoRA, gated, one strength": strength, "AutoLoRA, gated, one of three": adapter}


def time_all(
    programs: dict[str, Any],
    changes: dict[str, Callable[[int], None]],
    files: list[AdapterFiles],
    repeats: int,
) -> dict[str, float]:
    """Median seconds of every program's switch; they take turns."""
    times: dict[str, list[float]] = {}
    for turn in range(repeats + 2):
        start = AT_ONCE * (turn % 2)
        wanted = [(entry, 0.5 + turn / 100) for entry in files[start : start + AT_ONCE]]
        calls: dict[str, Callable[[], Any]] = {"reading the bytes": partial(read_bytes, wanted)}
        calls |= {name: partial(program.switch, wanted) for name, program in programs.items()}
        calls |= {name: partial(call, turn) for name, call in changes.items()}
        for name, call in calls.items():
            if name.endswith("cold"):
                programs[name].forget()
            started = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= 2:  # both sets have been seen
                times.setdefault(name, []).append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def run(model: str, rank: int, repeats: int, device: str) -> dict[str, Any]:
    """Time one model; print a table; return the facts."""
    pipe, plain, dtype = (tiny_models if model == "tiny" else block_models)(device)
    shapes = dict(block_layers(plain))
    with tempfile.TemporaryDirectory() as folder:
        files = write_adapters(Path(folder), shapes, COUNT, rank, torch.bfloat16)
        programs = make_programs(pipe, plain, dtype, files)
        wanted = [(entry, 0.7) for entry in files[:AT_ONCE]]
        check_agreement(programs, plain, wanted, "single_blocks.0.proj_out")
        gates = random_gates(shapes).to(next(plain.parameters()).device)
        twins = [AutoLoRA(twin(pipe.dit), dtype, "gated", gates) for _ in range(2)]
        changes = small_changes(twins[0], twins[1], files)
        nbytes = read_bytes(wanted)
        medians = time_all(programs, changes, files, repeats)
    print(
        f"\n{model}: {len(shapes)} layers, 3 adapters of rank {rank}, "
        f"{nbytes / 2**20:.1f} MiB of files in all"
    )
    reference = medians[REFERENCE]
    for name, seconds in medians.items():
        print(f"{name:36s} {1e3 * seconds:9.2f} ms   {seconds / reference:6.2f} x {REFERENCE}")
    facts = {"layers": len(shapes), "rank": rank, "bytes": nbytes, "dtype": str(dtype)}
    if model == "blocks":
        full = nbytes_of_flux1(shapes)
        print(
            f"FLUX.1 has {full:.1f} times these bytes in its {FLUX1_DOUBLE}+{FLUX1_SINGLE} blocks"
        )
        facts["flux1_factor"] = round(full, 2)
    ratios = {name: round(seconds / reference, 3) for name, seconds in medians.items()}
    return {**facts, "median_seconds": medians, "ratio": ratios}


def nbytes_of_flux1(shapes: dict[str, tuple[int, int]]) -> float:
    """Factors of adapters for all of FLUX.1's blocks over those for the blocks that are timed."""
    sizes = {layer: out + inner for layer, (out, inner) in shapes.items()}
    double = sum(size for layer, size in sizes.items() if layer.startswith("blocks.0."))
    single = sum(size for layer, size in sizes.items() if layer.startswith("single_blocks.0."))
    return (FLUX1_DOUBLE * double + FLUX1_SINGLE * single) / sum(sizes.values())


def main() -> None:
    """Parse the command line, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--model", choices=("tiny", "blocks", "both"), default="both")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models = ("tiny", "blocks") if args.model == "both" else (args.model,)
    results = {model: run(model, args.rank, args.repeats, args.device) for model in models}
    print(json.dumps({"threads": args.threads, "repeats": args.repeats, **results}))


if __name__ == "__main__":
    main()
