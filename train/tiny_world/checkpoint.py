"""Checkpoints and progress bars for the builder's trainings."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm import tqdm

T = TypeVar("T")


def save_checkpoint(path: Path, model: nn.Module, optimizer: Any, step: int, **extra: Any) -> None:
    """Writes model, optimizer and step to a temporary file, then replaces ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    torch.save({**state, **extra}, part)
    os.replace(part, path)


def load_checkpoint(path: Path, model: nn.Module, optimizer: Any, **extra: Any) -> int:
    """Restores what ``save_checkpoint`` wrote; returns the step, 0 where there is none.

    Args:
        path: The checkpoint.
        model: Receives the weights, strictly.
        optimizer: Receives its state.
        extra: Further objects with ``load_state_dict``, by the name they were saved under.
    """
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for name, target in extra.items():
        target.load_state_dict(state[name])
    return int(state["step"])


class _Progress:
    """A tqdm bar that the innermost training may annotate."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __call__(self, items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        start = total - len(items) if total is not None and hasattr(items, "__len__") else 0  # type: ignore[arg-type]
        self._bar = tqdm(items, desc=what, total=total, initial=start, mininterval=5)
        yield from self._bar

    def note(self, text: str) -> None:
        """Shows ``text`` at the end of the bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(text)


progress = _Progress()
