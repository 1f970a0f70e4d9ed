"""Adapters in the weights themselves."""

from __future__ import annotations

from autolora.fusion.strategies.base import Strategy, register


@register
class Merged(Strategy):
    """``W + sum_i s_i dW_i``, the weights themselves; backed up and restored to the bit.

    No cost per step and every kind of adapter exactly, at the price of a backup of the weights, a
    slower switch, and the rounding of a weight that is stored in few bits.
    """

    name = "merged"
    summary = "adds all adapters to the weights until they are detached"
    merges = True
