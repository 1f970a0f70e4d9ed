"""Fusion: how several adapters act in one linear layer."""

from autolora.fusion.adapter import Adapter
from autolora.fusion.attach import (
    AttachedAdapter,
    AttachReport,
    attach,
    attached,
    attached_layers,
    detach,
    linear_shapes,
    set_strengths,
)
from autolora.fusion.bank import GateBank, load_gates, save_gates
from autolora.fusion.gate import Gate
from autolora.fusion.linear import FusedLinear
from autolora.fusion.record import GateRecords, record_gates
from autolora.fusion.strategies import Strategy, get_strategy, strategy_names

__all__ = [
    "Adapter",
    "AttachReport",
    "AttachedAdapter",
    "FusedLinear",
    "Gate",
    "GateBank",
    "GateRecords",
    "Strategy",
    "attach",
    "attached",
    "attached_layers",
    "detach",
    "get_strategy",
    "linear_shapes",
    "load_gates",
    "record_gates",
    "save_gates",
    "set_strengths",
    "strategy_names",
]
