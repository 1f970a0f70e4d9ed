"""Clocks, limits of the machine, and what a step needs at least."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from scripts.flux_step.model import Sizes


@dataclass(frozen=True)
class Result:
    """What was seen of one call.

    Attributes:
        seconds: Median over the rounds.
        ratio: Median over the rounds of the ratio to the first call's seconds.
        temporary: Bytes of device memory at the peak beyond what stays allocated.
    """

    seconds: float
    ratio: float
    temporary: int


def interleaved(
    calls: Mapping[str, Callable[[], Callable[[], object]]], repeats: int, device: torch.device
) -> dict[str, Result]:
    """Time calls in turns, so that noise falls on all alike.

    Args:
        calls: Functions that install something and return what is to be timed. The first is the
            reference; ratios are medians over the rounds of the ratio within a round.
        repeats: Rounds after a first one that warms up.
        device: Where they compute.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    temporary: dict[str, int] = {}
    for turn in range(repeats + 1):
        for name, install in calls.items():
            call = install()
            if not turn:
                call()  # compiles kernels, fills caches
            seconds, temporary[name] = timed(call, device)
            if turn:
                times[name].append(seconds)
    reference = next(iter(times.values()))
    return {
        name: Result(
            statistics.median(values),
            statistics.median(v / r for v, r in zip(values, reference, strict=True)),
            temporary[name],
        )
        for name, values in times.items()
    }


def timed(call: Callable[[], object], device: torch.device) -> tuple[float, int]:
    """Return seconds and temporary device memory of one call."""
    if device.type != "cuda":
        # Of one thread the CPU time, which others on the machine disturb less.
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        started = clock()
        call()
        return clock() - started, 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    resident = torch.cuda.memory_allocated()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3, torch.cuda.max_memory_allocated() - resident


def limits(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Measure copy bandwidth (bytes read and written per second) and matmul rate (FLOP/s)."""
    large = device.type == "cuda"
    source = torch.empty(2**30 if large else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    size = 8192 if large else 1024
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    copies, products = [], []
    for turn in range(8):
        seconds, _ = timed(lambda: target.copy_(source), device)
        other, _ = timed(lambda: F.linear(a, b), device)  # as layers do, b transposed
        if turn > 1:
            copies.append(seconds)
            products.append(other)
    bandwidth = 2 * source.numel() / statistics.median(copies)
    return bandwidth, 2 * size**3 / statistics.median(products)


@dataclass(frozen=True)
class Needs:
    """The least that a step must compute and move."""

    flops: float
    extra_flops: float
    extra_bytes: float


def needs(layers: Mapping[str, nn.Linear], sizes: Sizes, count: int, rank: int, item: int) -> Needs:
    """Count the base step's products, and what gated adapters add.

    Of memory, adapters must read each base output twice (its statistics come first) and write it
    once, and read the inputs once more; their factors are small beside that but counted.

    Args:
        layers: The linear layers with adapters.
        sizes: Of the model.
        count: Number of adapters.
        rank: Of each.
        item: Bytes of an element.
    """
    flops = extra_flops = extra_bytes = 0.0
    for name, layer in layers.items():
        if ".linear" in name:
            tokens = sizes.batch
        elif name.startswith("single"):
            tokens = sizes.batch * (sizes.image_tokens + sizes.text_tokens)
        else:
            text = ".b_" in name or "_b." in name
            tokens = sizes.batch * (sizes.text_tokens if text else sizes.image_tokens)
        inner, outer = layer.in_features, layer.out_features
        flops += 2.0 * tokens * inner * outer
        extra_flops += 2.0 * tokens * (inner + outer) * rank * count
        extra_bytes += item * (tokens * (3 * outer + inner) + (inner + outer) * rank * count)
    tokens = sizes.image_tokens + sizes.text_tokens
    blocks = sizes.double_blocks + sizes.single_blocks
    flops += 4.0 * sizes.batch * blocks * tokens**2 * sizes.width
    return Needs(flops, extra_flops, extra_bytes)
