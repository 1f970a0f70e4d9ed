"""LoRA Switch: one adapter at a time."""

from __future__ import annotations

from torch import Tensor

from autolora.fusion.strategies.base import Step, Strategy, register

TURN = 5
"""Steps in a row that belong to one adapter, as in the paper; fewer where there are few steps."""


@register
class Switch(Strategy):
    """LoRA Switch of Multi-LoRA Composition (Zhong et al., 2024, arXiv 2402.16843).

    In step ``t`` (from 0) only adapter ``floor((t mod (N tau)) / tau)`` acts.
    """

    name = "switch"
    summary = "one adapter at a time, in turns (LoRA Switch)"
    by_step = True

    def predict(self, step: Step) -> Tensor:
        """Make a pass with the adapter whose turn it is."""
        names = [name for name in step.names if step.strengths[name] != 0]
        if not names:
            return step.only(None)
        turn = max(1, min(TURN, step.steps // len(names)))
        return step.only(names[(step.number // turn) % len(names)])
