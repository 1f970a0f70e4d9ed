"""Strategies that act by step: a pipeline's model function, wrapped for a ``with`` block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from autolora.fusion.match import attached_layers
from autolora.fusion.strategies import Step, Strategy


@contextmanager
def stepping(pipe: Any, module: nn.Module, strategy: Strategy) -> Iterator[None]:
    """Let a strategy decide what happens in every step of a pipeline.

    Nothing is changed for strategies that do the same in every step.

    Args:
        pipe: Has ``model_fn(..., progress_id=step)`` and ``scheduler.timesteps``, as DiffSynth's
            pipelines have.
        module: The model, with the adapters attached by this strategy.
        strategy: The strategy.
    """
    if not strategy.by_step:
        yield
        return
    inner = pipe.model_fn

    def model_fn(*args: Any, progress_id: int = 0, **inputs: Any) -> Tensor:
        def call() -> Tensor:
            result: Tensor = inner(*args, progress_id=progress_id, **inputs)
            return result

        return _predict(strategy, module, call, progress_id, len(pipe.scheduler.timesteps))

    pipe.model_fn = model_fn
    try:
        yield
    finally:
        pipe.model_fn = inner


def _predict(strategy: Strategy, module: nn.Module, call: Any, number: int, steps: int) -> Tensor:
    layers = attached_layers(module)
    before = {name: fused.strengths for name, fused in layers.items()}
    strengths: dict[str, float] = {}
    for fused in layers.values():
        strengths.update(zip(fused.names, fused.strengths, strict=True))

    def run(wanted: Mapping[str, float]) -> Tensor:
        for fused in layers.values():
            current = zip(fused.names, fused.strengths, strict=True)
            values = tuple(wanted.get(name, value) for name, value in current)
            if values != fused.strengths:
                fused.set_strengths(values)
        return call()

    try:
        return strategy.predict(Step(number, steps, tuple(strengths), strengths, run, layers))
    finally:
        for name, fused in layers.items():
            if fused.strengths != before[name]:
                fused.set_strengths(before[name])
