"""The workflow that ComfyUI writes into pictures, read as far as people want to see it.

It stands in the chunk ``prompt``: a JSON object of nodes by id, each with its ``class_type`` and
its ``inputs``, which are plain values or links ``[node, output]``. Nothing here needs torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

CHUNK = "prompt"


@dataclass(frozen=True)
class Node:
    """A node of a workflow.

    Attributes:
        kind: Its class, such as ``KSampler`` or ``LoraLoader``.
        values: Its plain inputs by name; links to other nodes are left out.
    """

    kind: str
    values: dict[str, str | int | float | bool]


def read_workflow(text: str) -> list[Node]:
    """Read the nodes of a workflow.

    Args:
        text: A picture's chunk ``prompt``.

    Returns:
        The nodes in their order; empty where the text is no workflow.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return []
    nodes = []
    for entry in found.values() if isinstance(found, dict) else ():
        if not isinstance(entry, dict) or not isinstance(entry.get("class_type"), str):
            return []
        inputs = entry.get("inputs")
        inputs = inputs if isinstance(inputs, dict) else {}
        values = {k: v for k, v in inputs.items() if isinstance(v, str | int | float)}
        nodes.append(Node(entry["class_type"], values))
    return nodes
