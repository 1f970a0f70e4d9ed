"""Compiles every Triton kernel for GPUs that need not be here, and says what each would use.

    python scripts/check_kernels.py                           # bfloat16 for sm_80, sm_89 and sm_90
    python scripts/check_kernels.py --cards 89 --types bf16 fp32
    python scripts/check_kernels.py --cards 90 --least        # the smallest and largest of each

All sets of constants that `autolora.fusion.kernels.triton` calls a kernel with. Fails where
a kernel needs more shared memory than the smallest cards (sm_86, sm_89) give a program, or spills
registers in earnest. In float32 the products use no matrix units; that form takes minutes to
compile and is there for exactness. Needs Triton with CUDA's tools, no GPU. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from autolora.fusion.kernels import triton as kernels

HALF = ["y", "h", "scaled", "fused", "centred", "grad", "grad_h", "grad_z", "grad_y"]
SIZES = ["T", "C", "count", "tiles"]
MOST_SHARED = 99 * 1024  # bytes
MOST_SPILLED = {"bf16": 128, "fp16": 128, "fp32": 512}  # bytes of a thread: not a loop's worth

Variant = tuple[Any, dict[str, Any], int]
"""A kernel, its constants, and warps."""


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel uses.

    Attributes:
        kernel: Its name.
        constants: What it was compiled with.
        shared: Bytes of shared memory of a program.
        registers: Of a thread.
        spilled: Bytes of a thread that went to memory.
        fits: Whether that is within the limits.
    """

    kernel: str
    constants: str
    shared: int
    registers: int
    spilled: int
    fits: bool


def variants(dtype: str) -> Iterator[Variant]:
    """Every kernel with every set of constants, smallest first."""
    widths = [*kernels.BLOCKS[::-1], kernels.MAX_RANK]
    fast = {"APPROXIMATE": dtype != "fp32"}
    blocks = kernels.BLOCKS[::-1]
    by_width = [{"W": width, **fast} for width in widths]
    by_block = [{"BK": block, **fast} for block in blocks]
    chosen: dict[Any, tuple[list[kernels.Tile], list[dict[str, Any]]]] = {
        kernels.statistics_kernel: (
            [kernels.STATISTICS_TILE],
            [{"KEEP": keep, "BK": blocks[0]} for keep in (False, True)],
        ),
        kernels.fuse_kernel: (
            [kernels.FUSE_TILE_FEW_TOKENS, kernels.FUSE_TILE],
            [
                {"RECORD": record, "BK": block, **fast}
                for record in (False, True)
                for block in blocks
            ],
        ),
        kernels.adapter_kernel: ([kernels.ADAPTER_TILE], by_width),
        kernels.channel_kernel: ([kernels.CHANNEL_TILE], by_block),
        kernels.base_kernel: ([kernels.BASE_TILE], [{}]),
        kernels.factor_kernel: ([kernels.FACTOR_TILE], by_width),
    }
    for kernel, (tiles, sets) in chosen.items():
        for tile, values in itertools.product(tiles, sets):
            yield kernel, {**values, "BT": tile.tokens, "BC": tile.channels}, tile.warps


def smallest_and_largest(dtype: str) -> Iterator[Variant]:
    """The first and the last variant of each kernel."""
    for _, group in itertools.groupby(variants(dtype), key=lambda variant: variant[0]):
        several = list(group)
        yield from several if len(several) == 1 else (several[0], several[-1])


def usage(variant: Variant, dtype: str, card: int) -> Usage:
    """Compile for a card with what a launch on FLUX.1's sizes knows beforehand."""
    kernel, constants, warps = variant
    signature, known = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("stride") or name in SIZES:
            signature[name] = "i32"
        elif name.startswith("eps"):
            signature[name] = "fp32"
        elif name == "offsets":
            signature[name] = "*i32"
        else:
            signature[name] = f"*{dtype if name in HALF else 'fp32'}"
        if signature[name][0] == "*" or name.endswith("stride") or name == "C":
            known[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, known)
    target = GPUTarget("cuda", card, 32)
    made = triton.compile(source, target=target, options={"num_warps": warps})
    used = resources(made.asm["cubin"])
    shared, spilled = made.metadata.shared, used["STACK"] + used["LOCAL"]
    fits = shared <= MOST_SHARED and spilled <= MOST_SPILLED[dtype]
    said = " ".join(f"{key}={value}" for key, value in constants.items())
    return Usage(kernel.fn.__name__, said, shared, used["REG"], spilled, fits)


def resources(cubin: bytes) -> dict[str, int]:
    """What the assembler made of a kernel: bytes of stack and local memory, and registers."""
    tool = Path(triton.knobs.nvidia.ptxas.path).with_name("cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(STACK|LOCAL|REG):(\d+)", said)}


def main() -> None:
    """Compiles what the command line asks for; exit status 1 where something does not fit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cards", type=int, nargs="+", default=[80, 89, 90])
    parser.add_argument("--types", nargs="+", choices=list(MOST_SPILLED), default=["bf16"])
    parser.add_argument("--least", action="store_true", help="two sets of constants per kernel")
    args = parser.parse_args()
    found = []
    for dtype, card in itertools.product(args.types, args.cards):
        for variant in (smallest_and_largest if args.least else variants)(dtype):
            used = usage(variant, dtype, card)
            print(
                f"{'   ' if used.fits else 'NO '}{dtype} sm_{card} {used.kernel:17s} "
                f"{used.constants:45s} {used.shared:6d} B shared, {used.registers:3d} registers, "
                f"{used.spilled:3d} B spilled",
                flush=True,
            )
            found.append({"type": dtype, "card": card, **asdict(used)})
    print(json.dumps({"triton": triton.__version__, "kernels": found}))
    if not all(entry["fits"] for entry in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
