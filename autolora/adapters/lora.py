"""A LoRA: weight changes by canonical layer, with its name, metadata and load report."""

import hashlib
import os
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path

from torch import Tensor

from autolora.adapters.deltas import LayerDelta, LowRank, check_pair
from autolora.adapters.loader import load_layers
from autolora.adapters.metadata import Metadata
from autolora.adapters.reader import file_sha256
from autolora.adapters.report import LoadReport
from autolora.errors import LoRAFormatError, shown


class LoRA:
    """An adapter for a FLUX.1 transformer, read from a file or made from factors.

    Tensors stay in the dtype of their file until a layer is asked for.

    Attributes:
        name: File stem, or the name given.
        path: The file it came from, None for one made in memory.
        report: What became of every key of the file.
    """

    def __init__(
        self,
        name: str,
        layers: Mapping[str, LayerDelta],
        report: LoadReport,
        path: Path | None = None,
        metadata: Metadata | None = None,
    ) -> None:
        """Hold parsed layers; use `load` or `from_factors` instead.

        Args:
            name: Name of the adapter.
            layers: Weight changes by layer name.
            report: What was read.
            path: The file they came from.
            metadata: Known metadata; read from `path` on first use when None.
        """
        self.name = name
        self.path = path
        self.report = report
        self._layers = {layer: layers[layer] for layer in sorted(layers)}
        self._metadata = metadata

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "LoRA":
        """Read a LoRA file of any known FLUX.1 format.

        Args:
            path: A ``.safetensors`` file.

        Returns:
            The adapter, with every key matched or dropped with a reason in `report`.

        Raises:
            LoRAFormatError: The file is damaged, is for another base model, or holds nothing that
                can be used.
        """
        file = Path(path)
        layers, report = load_layers(file)
        return cls(file.stem, layers, report, path=file)

    @classmethod
    def from_factors(
        cls,
        name: str,
        factors: Mapping[str, tuple[Tensor, Tensor]],
        metadata: Metadata | None = None,
    ) -> "LoRA":
        """Make an adapter from factors in memory.

        Args:
            name: Name of the adapter.
            factors: ``A [r, in]`` and ``B [out, r]`` by layer name, the scale folded in.
            metadata: Metadata to carry; its title becomes `name` when None.

        Returns:
            The adapter. Tensors are used as they are, not copied.

        Raises:
            LoRAFormatError: No layer, or a pair of factors that does not fit together.
        """
        if not factors:
            raise LoRAFormatError(f"LoRA {shown(name)!r} has no factors; give at least one layer.")
        layers = {layer: _layer_from_pair(name, layer, *pair) for layer, pair in factors.items()}
        ranks = [delta.rank for delta in layers.values()]
        report = LoadReport("factors", layers=len(layers), ranks=(min(ranks), max(ranks)))
        return cls(name, layers, report, metadata=metadata or Metadata(title=name))

    def __repr__(self) -> str:
        """Show name, format, number of layers and ranks."""
        low, high = self.report.ranks
        ranks = str(low) if low == high else f"{low}-{high}"
        return (
            f"LoRA({self.name!r}, {self.report.format}, {len(self._layers)} layers, rank {ranks})"
        )

    def __contains__(self, layer: object) -> bool:
        """Tell whether the adapter changes this layer."""
        return layer in self._layers

    @property
    def layers(self) -> list[str]:
        """Names of the layers that the adapter changes, sorted."""
        return list(self._layers)

    def delta(self, layer: str) -> Tensor:
        """Exact dense weight change of a layer at strength 1.

        Args:
            layer: Canonical layer name.

        Returns:
            Float32 ``[out, in]``, the sum over pieces of ``alpha / r * B @ A``.

        Raises:
            LoRAFormatError: The adapter does not change this layer.
        """
        return self._layer(layer).dense()

    def factors(self, layer: str) -> tuple[Tensor, Tensor]:
        """Low-rank factors of a layer with all its pieces joined.

        Args:
            layer: Canonical layer name.

        Returns:
            ``A [R, in]`` and ``B [out, R]`` in float32 with the scale folded into B; rows of B
            that a piece does not cover are zero.

        Raises:
            LoRAFormatError: The adapter does not change this layer.
        """
        return self._layer(layer).factors()

    def shape(self, layer: str) -> tuple[int, int]:
        """Shape ``(out, in)`` of the weight that a layer's delta is added to.

        Args:
            layer: Canonical layer name.

        Returns:
            Output and input channels.

        Raises:
            LoRAFormatError: The adapter does not change this layer.
        """
        return self._layer(layer).shape

    def rank(self, layer: str) -> int:
        """Joined rank ``R`` of a layer's factors.

        Args:
            layer: Canonical layer name.

        Returns:
            Rows of A as `factors` gives it.

        Raises:
            LoRAFormatError: The adapter does not change this layer.
        """
        return self._layer(layer).rank

    @property
    def metadata(self) -> Metadata:
        """Title, trigger words, covers and the like, from the header and the files beside it."""
        if self._metadata is None:
            self._metadata = (
                Metadata(title=self.name) if self.path is None else Metadata.read(self.path)
            )
        return self._metadata

    @cached_property
    def sha256(self) -> str:
        """Hash of the file's bytes, or of the layers where there is no file."""
        if self.path is not None:
            return file_sha256(self.path)
        digest = hashlib.sha256()
        for layer in self._layers:
            for tensor in self.factors(layer):
                digest.update(f"{layer}{tuple(tensor.shape)}".encode())
                digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes that the stored factors occupy."""
        return sum(
            tensor.numel() * tensor.element_size()
            for delta in self._layers.values()
            for tensor in delta.tensors
        )

    def check_fits(self, module_shapes: Mapping[str, tuple[int, int]]) -> None:
        """Make sure that the adapter is for a model with these layers.

        Args:
            module_shapes: Weight shape ``(out, in)`` of every layer of the model, by name.

        Raises:
            LoRAFormatError: A layer is missing in the model or has another shape.
        """
        for layer, delta in self._layers.items():
            shape = module_shapes.get(layer)
            if shape is None:
                problem = f"changes layer {layer}, which the model does not have"
            elif tuple(shape) != delta.shape:
                problem = (
                    f"has shape {list(delta.shape)} at layer {layer}, "
                    f"where the model has {list(shape)}"
                )
            else:
                continue
            raise LoRAFormatError(
                f"LoRA {shown(self.name)!r} {problem}: it was made for another base model or size; "
                "use one made for this model."
            )

    def _layer(self, layer: str) -> LayerDelta:
        delta = self._layers.get(layer)
        if delta is None:
            close = get_close_matches(layer, self._layers, n=1)
            hint = f"; did you mean {close[0]}?" if close else "; .layers lists those it has."
            raise LoRAFormatError(
                f"LoRA {shown(self.name)!r} does not change layer {shown(layer)!r}{hint}"
            )
        return delta


def _layer_from_pair(name: str, layer: str, A: Tensor, B: Tensor) -> LayerDelta:
    check_pair(name, layer, A, B)
    out_features, in_features = int(B.shape[0]), int(A.shape[1])
    piece = LowRank(A.detach(), B.detach(), 1.0, (slice(0, out_features),))
    return LayerDelta(out_features, in_features, (piece,))
