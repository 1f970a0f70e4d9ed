"""Fusion: how several adapters act in one linear layer."""

from autolora.fusion.adapter import Adapter, DenseAdapter
from autolora.fusion.attach import (
    AttachReport,
    add,
    attach,
    attached,
    attached_names,
    detach,
    layer_shapes,
    linear_shapes,
    make_ready,
    remove,
    reserve,
    set_strengths,
    switch,
)
from autolora.fusion.exchange import WeightExchange
from autolora.fusion.gate import Gate, GateBank, load_gates, save_gates
from autolora.fusion.linear import FusedLinear
from autolora.fusion.match import AttachedAdapter, attached_layers
from autolora.fusion.merge import MergeReport, base_weight, merge_, merged, restore
from autolora.fusion.packed import Capacity
from autolora.fusion.record import GateRecords, record_gates
from autolora.fusion.stepping import stepping
from autolora.fusion.strategies import Response, Strategy, get_strategy, strategy_names

__all__ = [
    "Adapter",
    "AttachReport",
    "AttachedAdapter",
    "Capacity",
    "DenseAdapter",
    "FusedLinear",
    "Gate",
    "GateBank",
    "GateRecords",
    "MergeReport",
    "Response",
    "Strategy",
    "WeightExchange",
    "add",
    "attach",
    "attached",
    "attached_layers",
    "attached_names",
    "base_weight",
    "detach",
    "get_strategy",
    "layer_shapes",
    "linear_shapes",
    "load_gates",
    "make_ready",
    "merge_",
    "merged",
    "record_gates",
    "remove",
    "reserve",
    "restore",
    "save_gates",
    "set_strengths",
    "stepping",
    "strategy_names",
    "switch",
]
