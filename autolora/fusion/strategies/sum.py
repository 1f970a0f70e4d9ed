"""The plain sum."""

from __future__ import annotations

from autolora.fusion.strategies.base import Strategy, register


@register
class Sum(Strategy):
    """``y + sum_i s_i B_i A_i x``, what most tools do."""

    name = "sum"
    summary = "adds all adapters at their strengths"
