"""The workflow that ComfyUI writes into pictures, read as far as it says how one was made.

It stands in the chunk ``prompt``: a JSON object of nodes by id, each with its ``class_type`` and
its ``inputs``, which are values or links ``[node, output]``. What a picture depends on is followed
from the sampler backwards, so that nodes that lie beside it do not count. Nothing here needs torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from autolora.lora.fields import finite_number
from autolora.prompt_syntax import LORA_TAGS

WORKFLOW_CHUNK = "prompt"
_TEXTS = ("text", "t5xxl", "clip_l", "text_g", "text_l", "prompt", "string", "value", "positive")
_MAX_TEXTS = 16
_NUMBERED = re.compile(r"lora(?:_name)?_(\d+)(?:_name)?", re.IGNORECASE)
_STRENGTHS = ("strength_model", "strength", "model_strength", "lora_strength", "weight")
_NUMBERED_STRENGTHS = (
    "strength_{}",
    "model_weight_{}",
    "model_str_{}",
    "lora_wt_{}",
    "lora_{}_strength",
    "lora_{}_model_strength",
    "weight_{}",
)
_SWITCHES = ("switch_{}", "enabled_{}", "lora_{}_on", "enable_{}")
_OFF = (False, "off", "false", "disable", "disabled", "no")
_TAG = re.compile(rf"<(?:{'|'.join(sorted(LORA_TAGS))}):[^<>]*>", re.IGNORECASE)


@dataclass(frozen=True)
class Node:
    """A node of a workflow.

    Attributes:
        kind: Its class, such as ``KSampler`` or ``LoraLoader``.
        values: Its plain inputs by name; links to other nodes are left out.
        inputs: All its inputs.
    """

    kind: str
    values: dict[str, str | int | float | bool]
    inputs: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class Made:
    """How a workflow makes its picture.

    Attributes:
        prompt: What its encoder reads.
        negative_prompt: What the other one reads.
        values: ``seed``, ``steps``, ``guidance``, ``width``, ``height``, as they stand there.
        loras: Name and strength of each active LoRA, in order.
    """

    prompt: str
    negative_prompt: str
    values: dict[str, Any]
    loras: tuple[tuple[str, float | None], ...]


def read_workflow(text: str) -> dict[str, Node]:
    """Read the nodes of a workflow.

    Args:
        text: A picture's chunk ``prompt``.

    Returns:
        The nodes by id; empty where the text is no workflow.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    nodes = {}
    for name, entry in found.items() if isinstance(found, dict) else ():
        if not isinstance(entry, dict) or not isinstance(entry.get("class_type"), str):
            return {}
        inputs = entry.get("inputs")
        inputs = inputs if isinstance(inputs, dict) else {}
        values = {k: v for k, v in inputs.items() if isinstance(v, str | int | float)}
        nodes[name] = Node(entry["class_type"], values, inputs)
    return nodes


def how_made(nodes: Mapping[str, Node]) -> Made:
    """Follow a workflow back from its sampler.

    Args:
        nodes: Of `read_workflow`.

    Returns:
        What was found; all nodes count where no sampler is known.
    """
    graph = _Graph(nodes)
    samplers = [name for name, node in nodes.items() if _is_sampler(node)]
    # The last of several refines what the first one made, whose settings tell more.
    start = samplers[:1]
    before = graph.before(start) if start else list(nodes)
    values = {}
    for name, keys in (
        ("seed", ("seed", "noise_seed")),
        ("steps", ("steps",)),
        ("guidance", ("guidance",)),
        ("cfg", ("cfg", "cfg_scale")),
        ("width", ("width", "empty_latent_width")),
        ("height", ("height", "empty_latent_height")),
    ):
        value = next((v for v in graph.numbers(before, keys)), None)
        if value is not None:
            values[name] = value
    cfg = values.pop("cfg", None)
    values.setdefault("guidance", cfg)
    prompt, negative = graph.prompts(start, before)
    loras = [lora for name in reversed(before) for lora in _loras(nodes[name])]
    return Made(prompt, negative, values, tuple(dict.fromkeys(loras)))


def _is_sampler(node: Node) -> bool:
    kind = node.kind.lower()
    links = node.inputs
    return "sampler" in kind and (
        "latent_image" in links or "positive" in links or "noise" in links
    )


class _Graph:
    def __init__(self, nodes: Mapping[str, Node]) -> None:
        self._nodes = nodes

    def target(self, value: object) -> str | None:
        """The node that a link leads to."""
        if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str | int):
            name = str(value[0])
            return name if name in self._nodes else None
        return None

    def before(self, names: Iterable[str]) -> list[str]:
        """Nodes with all that they depend on, nearest first."""
        found = dict.fromkeys(names)
        pending = list(found)
        while pending:
            node = self._nodes[pending.pop(0)]
            for value in node.inputs.values():
                target = self.target(value)
                if target is not None and target not in found:
                    found[target] = None
                    pending.append(target)
        return list(found)

    def numbers(self, names: Iterable[str], keys: Iterable[str]) -> Iterator[Any]:
        """Numbers of these inputs, through links where they are given by other nodes."""
        for name in names:
            for key in keys:
                value = self._nodes[name].inputs.get(key)
                for _ in range(4):
                    target = self.target(value)
                    if target is None:
                        break
                    plain = self._nodes[target].inputs
                    names_of_values = (key, "value", "seed", "int", "number", "Number", "Value")
                    value = next((plain[k] for k in names_of_values if k in plain), None)
                if finite_number(value) is not None:
                    yield value

    def prompts(self, start: list[str], before: list[str]) -> tuple[str, str]:
        """What the encoders read; without links to them, the first texts there are."""
        links = {key: self._link(before, key) for key in ("positive", "conditioning", "negative")}
        first = links["positive"] or links["conditioning"]
        if first is not None and start:
            negative = links["negative"]
            said = "" if negative in (None, first) else self._text(str(negative))
            return self._text(first), said
        encoders = [n for n in before if "textencode" in self._nodes[n].kind.lower()]
        texts = [self._text(name) for name in encoders or before]
        return next((text for text in texts if text), ""), ""

    def _link(self, names: Iterable[str], key: str) -> str | None:
        targets = (self.target(self._nodes[name].inputs.get(key)) for name in names)
        return next((target for target in targets if target is not None), None)

    def _text(self, name: str) -> str:
        """Texts of the nearest node that has some, and of the nodes that feed those inputs."""
        for near in self.before([name]):
            if "zeroout" in self._nodes[near].kind.lower():
                return ""
            if texts := list(dict.fromkeys(self._own_texts(near, 0)))[:_MAX_TEXTS]:
                return "\n".join(texts).strip()
        return ""

    def _own_texts(self, name: str, depth: int) -> Iterator[str]:
        inputs = self._nodes[name].inputs
        keys = [key for key in _TEXTS if key in inputs]
        if depth:
            # What joins texts has inputs of any name.
            keys += [key for key in inputs if key not in keys and _is_text_input(key)]
        for key in keys:
            value = inputs[key]
            target = self.target(value)
            if isinstance(value, str) and value.strip():
                yield value.strip()
            elif target is not None and depth < 8:
                yield from self._own_texts(target, depth + 1)


def _is_text_input(key: str) -> bool:
    return any(word in key.lower() for word in ("text", "string", "prompt"))


def _loras(node: Node) -> Iterator[tuple[str, float | None]]:
    """Active LoRAs of a node, in whichever way it holds them."""
    for value in node.inputs.values():
        yield from _entries(value)
    if "lora" not in node.kind.lower() and "lora_name" not in node.inputs:
        return
    name = node.values.get("lora_name", node.values.get("lora"))
    yield from _named(name, _first(node.values, _STRENGTHS), True)
    count = finite_number(node.values.get("lora_count", node.values.get("num_loras")))
    for key, name in node.values.items():
        found = _NUMBERED.fullmatch(key)
        if found is None or (count is not None and int(found.group(1)) > count):
            continue
        switches = [pattern.format(found.group(1)) for pattern in _SWITCHES]
        on = all(node.values.get(switch) not in _OFF for switch in switches) and all(
            str(node.values.get(switch, "")).lower() not in _OFF for switch in switches
        )
        strengths = [pattern.format(found.group(1)) for pattern in _NUMBERED_STRENGTHS]
        if node.values.get("input_mode") == "simple":
            strengths.insert(0, f"lora_wt_{found.group(1)}")
        yield from _named(name, _first(node.values, strengths), on)
    text = node.values.get("text", node.values.get("lora_syntax"))
    if isinstance(text, str) and not any(True for v in node.inputs.values() for _ in _entries(v)):
        for tag in _TAG.findall(text):
            yield from _tagged(tag)


def _entries(value: object) -> Iterator[tuple[str, float | None]]:
    """LoRAs that an input holds as objects, alone or in a list."""
    if isinstance(value, dict) and isinstance(value.get("__value__"), list):
        value = value["__value__"]
    for entry in value if isinstance(value, list) else (value,):
        if not isinstance(entry, dict):
            continue
        name = entry.get("lora", entry.get("lora_name", entry.get("name")))
        strength = _first(entry, _STRENGTHS)
        if strength is None and "lora" not in entry and "lora_name" not in entry:
            continue
        on = all(entry.get(key, True) not in _OFF for key in ("on", "active", "enabled"))
        yield from _named(name, strength, on)


def _tagged(tag: str) -> Iterator[tuple[str, float | None]]:
    name, _, strength = tag[1:-1].partition(":")[2].partition(":")
    yield from _named(name, finite_number(strength.partition(":")[0]), True)


def _first(values: Mapping[str, Any], names: Iterable[str]) -> float | None:
    numbers = (finite_number(values.get(name)) for name in names)
    return next((number for number in numbers if number is not None), None)


def _named(name: object, strength: float | None, on: bool) -> Iterator[tuple[str, float | None]]:
    if isinstance(name, str) and name.strip() not in ("", "None", "none") and on and strength != 0:
        yield name.strip(), strength
