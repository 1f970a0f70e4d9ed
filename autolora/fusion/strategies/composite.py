"""LoRA Composite: the mean of the predictions."""

from __future__ import annotations

import torch
from torch import Tensor

from autolora.fusion.strategies.base import Step, Strategy, register


@register
class Composite(Strategy):
    """LoRA Composite of Multi-LoRA Composition (Zhong et al., 2024, arXiv 2402.16843).

    ``(1 / N) sum_i v_i`` with ``v_i`` the model's prediction with adapter ``i`` alone. The paper
    averages guided predictions; guidance is linear, so that it is the same. N passes per step.
    """

    name = "composite"
    summary = "the mean of the predictions with one adapter each (LoRA Composite)"
    by_step = True

    def predict(self, step: Step) -> Tensor:
        """Make one pass per adapter."""
        names = [name for name in step.names if step.strengths[name] != 0]
        if not names:
            return step.only(None)
        return torch.stack([step.only(name) for name in names]).mean(0)
