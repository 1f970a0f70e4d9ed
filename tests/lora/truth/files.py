"""Files under construction: what they hold, and what reading them must give."""

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Generator, Tensor

from tests.lora.truth.layers import SMALL, Module, Size, canonical_shapes
from tests.lora.truth.weights import Array, Weights

Draw = Callable[[Generator, Module, int], Weights | None]
"""Weights of the n-th module, or None to leave it out."""


@dataclass(frozen=True)
class Spelling:
    """How a program spells a key: prefix, path parts, and the suffix of each role."""

    prefix: str = ""
    joint: str = "."
    A: str = "lora_A.weight"
    B: str = "lora_B.weight"
    magnitude: str = "dora_scale"

    def key(self, path: str, role: str) -> str:
        suffix = {"A": self.A, "B": self.B, "magnitude": self.magnitude}.get(role, role)
        if role == "B.bias":
            suffix = self.B.replace(".weight", ".bias")
        return f"{self.prefix}{path.replace('.', self.joint)}.{suffix}"


KOHYA = Spelling("lora_unet_", "_", "lora_down.weight", "lora_up.weight")
DOWN_UP = Spelling(A="lora_down.weight", B="lora_up.weight")


def base_weight(layer: str, shape: tuple[int, int]) -> Tensor:
    """The base model's weight of a layer: the same for every file and every loader."""
    random = Generator().manual_seed(zlib.crc32(layer.encode()))
    return torch.randn(*shape, generator=random) / shape[1] ** 0.5


def _taken(whole: Tensor, module: Module) -> Tensor:
    """Rows of a canonical layer that a module stands for, in its order."""
    return torch.cat([whole[start:stop] for start, stop in module.rows])


def _add(whole: Tensor, module: Module, change: Array) -> None:
    """Add a module's change to the canonical rows that it stands for."""
    first = 0
    for start, stop in module.rows:
        whole[start:stop] += torch.from_numpy(change[first : first + stop - start])
        first += stop - start


@dataclass
class TruthFile:
    """Tensors of a file, and what they stand for.

    Attributes:
        size: Widths of the model it is for.
        random: Source of all its values.
        tensors: By key.
        metadata: Header entries.
        beside: Text of files that belong beside it, by name.
        stem: Name of the file.
        norms: Changes of normalization weights by DiffSynth's module path.
        text: Modules of text encoders by ``clip`` or ``t5``, then by DiffSynth's module path.
    """

    size: Size = SMALL
    random: Generator = field(default_factory=lambda: Generator().manual_seed(0))
    tensors: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    beside: dict[str, str] = field(default_factory=dict)
    stem: str = "lora"
    norms: dict[str, Tensor] = field(default_factory=dict)
    text: dict[str, dict[str, Weights]] = field(default_factory=dict)
    _parts: dict[str, list[tuple[Module, Weights]]] = field(default_factory=dict)
    _keys: dict[str, list[str]] = field(default_factory=dict)

    @property
    def layers(self) -> list[str]:
        """Canonical layers whose weights change."""
        changed = (
            layer
            for layer, parts in self._parts.items()
            if any(weights.product for _, weights in parts)
        )
        return sorted(changed)

    @property
    def biases(self) -> list[str]:
        """Canonical layers whose biases change."""
        return sorted(
            layer
            for layer, parts in self._parts.items()
            if any(weights.bias is not None for _, weights in parts)
        )

    @property
    def needs_base(self) -> list[str]:
        """Layers with magnitudes."""
        return [
            layer
            for layer in self.layers
            if any(weights.axis is not None for _, weights in self._parts[layer])
        ]

    def low_rank(self, layer: str) -> bool:
        """Whether two factors hold the layer's whole change."""
        return all(weights.low_rank for _, weights in self._parts[layer])

    def shape(self, layer: str) -> tuple[int, int]:
        return canonical_shapes(self.size)[layer]

    def base(self, layer: str) -> Tensor:
        return base_weight(layer, self.shape(layer))

    def dense(self, layer: str) -> Tensor:
        """The layer's weight change at strength 1, float64 ``[out, in]``."""
        dense = torch.zeros(*self.shape(layer), dtype=torch.float64)
        base = self.base(layer) if layer in self.needs_base else None
        for module, weights in self._parts[layer]:
            if weights.product is None:
                continue
            own = None if base is None else _taken(base, module)
            _add(dense, module, weights.change(own))
        return dense

    def bias(self, layer: str) -> Tensor:
        """The change of the layer's bias, float64 ``[out]``."""
        moved = torch.zeros(self.shape(layer)[0], dtype=torch.float64)
        for module, weights in self._parts[layer]:
            if weights.bias is not None:
                _add(moved, module, weights.bias)
        return moved

    def module_base(self, module: Module) -> Tensor:
        """Base weight of a training program's module, in its own row order."""
        return _taken(self.base(module.layer), module)

    def add(
        self, modules: Iterable[Module], spelling: Spelling, draw: Draw, text: str | None = None
    ) -> "TruthFile":
        """Train every module, store its tensors and remember what they stand for.

        Args:
            modules: Modules of the training program.
            spelling: How it spells their keys.
            draw: Weights of each module.
            text: ``clip`` or ``t5`` for modules of a text encoder.
        """
        for n, module in enumerate(modules):
            weights = draw(self.random, module, n)
            if weights is None:
                continue
            for role, tensor in weights.tensors.items():
                key = spelling.key(module.path, role)
                assert key not in self.tensors, key
                self.tensors[key] = tensor.contiguous()
                self._keys.setdefault(module.layer, []).append(key)
            if text is None:
                self._parts.setdefault(module.layer, []).append((module, weights))
            else:
                self.text.setdefault(text, {})[module.layer] = weights
        return self

    def add_norms(self, paths: dict[str, str], spelling: Spelling, suffix: str) -> "TruthFile":
        """Change the normalization weights of queries and keys.

        Args:
            paths: DiffSynth's module paths by the program's.
            spelling: How the program spells keys.
            suffix: What it calls the change.
        """
        for path, layer in paths.items():
            change = torch.randn(16, generator=self.random)
            self.tensors[spelling.key(path, suffix)] = change
            self.norms[layer] = change
        return self

    def forget(self, layer: str) -> None:
        """Leave a layer out of the file."""
        del self._parts[layer]
        for key in self._keys.pop(layer):
            del self.tensors[key]

    def save(self, folder: Path, tensors: Mapping[str, Tensor] | None = None) -> Path:
        """Write the file, and those beside it, with safetensors' own writer.

        Args:
            folder: Where to.
            tensors: Other tensors to store instead.
        """
        path = folder / f"{self.stem}.safetensors"
        save_file(dict(self.tensors if tensors is None else tensors), path, self.metadata or None)
        for name, content in self.beside.items():
            (folder / name).write_text(content, encoding="utf-8")
        return path
