"""Workflows of ComfyUI are listed as far as they are plain values."""

import json

import pytest

from autolora.generate.png import Node, read_workflow


def test_nodes_are_read_with_their_plain_inputs() -> None:
    workflow = {
        "6": {
            "class_type": "CLIPTextEncode",
            "inputs": {"text": "a cat", "clip": ["4", 1]},
            "_meta": {"title": "Prompt"},
        },
        "3": {"class_type": "KSampler", "inputs": {"seed": 7, "cfg": 3.5, "model": ["4", 0]}},
        "9": {"class_type": "Empty"},
    }
    assert read_workflow(json.dumps(workflow)) == [
        Node("CLIPTextEncode", {"text": "a cat"}),
        Node("KSampler", {"seed": 7, "cfg": 3.5}),
        Node("Empty", {}),
    ]


@pytest.mark.parametrize(
    "text",
    ["", "a cat", "[]", "3", '{"a": 1}', '{"a": {"class_type": 1}}', "[" * 100_000, '{"1": null}'],
)
def test_what_is_no_workflow_has_no_nodes(text: str) -> None:
    assert read_workflow(text) == []
