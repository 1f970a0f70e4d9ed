"""A LoRA: weight changes by canonical layer, with its name, metadata and load report.

A `PreparedLoRA` holds the factors of every layer, computed once and ready to be attached.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from autolora.errors import LoRAFormatError, shown
from autolora.lora.deltas import EXACT, LayerDelta, check_base, check_shapes, layer_from_pair
from autolora.lora.formats import DENOISER, Part
from autolora.lora.load_report import LoadReport, layer_facts
from autolora.lora.low_rank import low_rank_delta
from autolora.lora.metadata import Metadata
from autolora.lora.parse import load_file
from autolora.safetensors_io import file_sha256

if TYPE_CHECKING:
    import torch


class LoRA:
    """An adapter for a base model's denoiser, read from a file or made from factors.

    Tensors stay in the dtype of their file until a layer is asked for. A layer is low-rank, LoKr,
    LoHa or a full difference, or one of these with DoRA magnitudes: `delta` is exact for all,
    `factors` only exists for low-rank ones, and `low_rank` approximates the others.

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
        *,
        biases: Mapping[str, Tensor] | None = None,
        norms: Mapping[str, Tensor] | None = None,
        text_encoders: Mapping[Part, LoRA] | None = None,
    ) -> None:
        """Hold parsed layers; use `load` or `from_factors` instead.

        Args:
            name: Name of the adapter.
            layers: Weight changes by layer name.
            report: What was read.
            path: The file they came from.
            metadata: Known metadata; read from `path` on first use when None.
            biases: Changes of biases ``[out]`` by layer name.
            norms: Changes of normalization weights by module path.
            text_encoders: Adapters of text encoders by name, such as ``clip``.
        """
        self.name = name
        self.path = path
        self.report = report
        self._layers = {layer: layers[layer] for layer in sorted(layers)}
        self._metadata = metadata
        self._biases = dict(sorted((biases or {}).items()))
        self._norms = dict(sorted((norms or {}).items()))
        self._text_encoders: dict[Part, LoRA] = dict(text_encoders or {})

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        family: str | None = None,
        *,
        text_encoder_only: bool = False,
    ) -> LoRA:
        """Read a LoRA file of any known format.

        Args:
            path: A ``.safetensors`` file.
            family: The base-model family that it is for, such as ``flux1``; None finds it from
                the file's names and shapes.
            text_encoder_only: Also accept a file that changes no layer of the denoiser; it
                gives an adapter without layers, whose parts `text_encoder` returns.

        Returns:
            The adapter, with every key matched or dropped with a reason in `report`.

        Raises:
            FamilyError: The file is for another base model, or may be for several.
            LoRAFormatError: The file is damaged, or holds nothing that can be used.
        """
        file = Path(path)
        loaded = load_file(file, text_encoder_only, family)
        parts: dict[Part, LoRA] = {
            part: cls(
                file.stem,
                contents.layers,
                loaded.reports[part],
                file,
                biases=contents.biases,
                norms=contents.norms,
            )
            for part, contents in loaded.parts.items()
        }
        lora = parts.pop(DENOISER)
        lora._text_encoders = parts
        return lora

    @classmethod
    def from_factors(
        cls,
        name: str,
        factors: Mapping[str, tuple[Tensor, Tensor]],
        metadata: Metadata | None = None,
    ) -> LoRA:
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
        layers = {layer: layer_from_pair(name, layer, *pair) for layer, pair in factors.items()}
        report = LoadReport("factors", total=len(layers), **layer_facts(layers))
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

    @property
    def needs_base(self) -> tuple[str, ...]:
        """Layers whose change depends on the base weight: those with DoRA magnitudes."""
        return tuple(layer for layer, delta in self._layers.items() if delta.needs_base)

    def exact(self, layer: str) -> bool:
        """Tell whether `factors` gives a layer's change exactly.

        Args:
            layer: Canonical layer name.

        Returns:
            True for low-rank layers as files have them, False for those that have no factors, or
            only approximate ones.

        Raises:
            LoRAFormatError: The adapter does not change this layer.
        """
        delta = self._layer(layer)
        return delta.is_low_rank and delta.error <= EXACT

    def delta(self, layer: str, base: Tensor | None = None) -> Tensor:
        """Exact dense weight change of a layer at strength 1.

        Args:
            layer: Canonical layer name.
            base: The layer's weight in its own shape, of any float dtype; only needed, and only
                looked at, for the layers in `needs_base`.

        Returns:
            Float32 ``[out, in]``, or ``[out, in, height, width]`` for a convolution; computed in
            float64 and rounded once.

        Raises:
            LoRAFormatError: The adapter does not change this layer, or its change depends on a
                base weight that is not given or of another shape.
        """
        found = self._layer(layer)
        if found.needs_base:
            check_base(self.name, layer, found, base)
        return found.dense(base).reshape(found.shape)

    def layer_delta(self, layer: str) -> LayerDelta:
        """The change of a layer as the file holds it; raises `LoRAFormatError` as `delta` does."""
        return self._layer(layer)

    def bias(self, layer: str) -> Tensor | None:
        """Change of a layer's bias at strength 1.

        Args:
            layer: Canonical layer name.

        Returns:
            Float32 ``[out]``, or None when the bias is not changed.
        """
        return self._biases.get(layer)

    @property
    def bias_layers(self) -> tuple[str, ...]:
        """Layers whose bias is changed; a few may be in no other list."""
        return tuple(self._biases)

    @property
    def norms(self) -> Mapping[str, Tensor]:
        """Changes of normalization weights at strength 1, float32, by module path.

        Paths are DiffSynth's, such as ``blocks.0.attn.norm_q_a``. Only merging applies them.
        """
        return dict(self._norms)

    @property
    def family(self) -> str:
        """Name of the base-model family that it is for; empty for one made in memory."""
        return self.report.family

    def text_encoder(self, which: Part) -> LoRA | None:
        """The part of the adapter that is for a text encoder.

        Args:
            which: Its name in the family: ``clip`` and ``t5`` for FLUX.1 (``text_encoder_1`` and
                ``text_encoder_2`` in DiffSynth's pipeline), ``clip`` and ``clip_g`` for SDXL.

        Returns:
            An adapter whose layers are the encoder's module paths, such as
            ``encoders.0.attn.to_q`` or ``encoder.block.0.layer.0.SelfAttention.q``; None when the
            file has no layer for it.
        """
        return self._text_encoders.get(which)

    def only(self, layers: Collection[str]) -> LoRA:
        """Return an adapter of some of the layers, with their biases; the tensors are shared.

        Args:
            layers: Canonical names of layers that the adapter changes.
        """
        part = LoRA(
            self.name,
            {layer: self._layers[layer] for layer in layers},
            self.report,
            self.path,
            self._metadata,
            biases={layer: bias for layer, bias in self._biases.items() if layer in layers},
            text_encoders=self._text_encoders,
        )
        part.__dict__["sha256"] = self.sha256
        return part

    def low_rank(self, rank: int, base: Callable[[str], Tensor] | None = None) -> LoRA:
        """Give every layer low-rank factors.

        Low-rank layers stay as they are, whatever their rank. Every other piece of a layer becomes
        its best approximation of the given rank, and the relative Frobenius error of its layer is
        in ``report.errors``. Biases, normalization weights and text encoders stay.

        Args:
            rank: Rank of each approximated piece (a split q/k/v layer has several).
            base: Gives a layer's weight ``[out, in]`` by name; called for `needs_base` only.

        Returns:
            A new adapter of the same name and file.

        Raises:
            LoRAFormatError: The rank is not positive, or a layer depends on a base weight that is
                not given or of another shape.
        """
        if rank < 1:
            raise LoRAFormatError(f"Rank is {rank}; give a whole number of at least 1.")
        layers: dict[str, LayerDelta] = {}
        for layer, delta in self._layers.items():
            if delta.is_low_rank:
                layers[layer] = delta
                continue
            weight = base(layer) if delta.needs_base and base is not None else None
            if delta.needs_base:
                check_base(self.name, layer, delta, weight)
            layers[layer] = low_rank_delta(delta, rank, weight)
        errors = {
            layer: new.error for layer, new in layers.items() if new is not self._layers[layer]
        }
        return LoRA(
            self.name,
            layers,
            replace(self.report, errors={**self.report.errors, **errors}, **layer_facts(layers)),
            self.path,
            self._metadata,
            biases=self._biases,
            norms=self._norms,
            text_encoders=self._text_encoders,
        )

    def factors(self, layer: str) -> tuple[Tensor, Tensor]:
        """Low-rank factors of a layer with all its pieces joined.

        Args:
            layer: Canonical layer name.

        Returns:
            ``A [R, in]`` and ``B [out, R]`` in float32 with the scale folded into B; rows of B
            that a piece does not cover are zero. For a convolution A is
            ``[R, in * height * width]``.

        Raises:
            LoRAFormatError: The adapter does not change this layer, or not by low-rank factors.
        """
        return self._low_rank_layer(layer).factors()

    def leading_factors(self, layer: str, rank: int = 32) -> tuple[Tensor, Tensor]:
        """Low-rank factors to look at a layer with, as retrieval does; not to draw with.

        Args:
            layer: Canonical layer name.
            rank: Rank of each approximated piece.

        Returns:
            What `factors` gives for a low-rank layer; for any other, the best approximation of its
            change, without regard to DoRA magnitudes, which would need the base weight.

        Raises:
            LoRAFormatError: The adapter does not change this layer.
        """
        delta = self._layer(layer).without_magnitudes()
        return (delta if delta.is_low_rank else low_rank_delta(delta, rank, None)).factors()

    def shape(self, layer: str) -> tuple[int, ...]:
        """Shape of the weight that a layer's delta is added to.

        Args:
            layer: Canonical layer name.

        Returns:
            ``(out, in)``, or ``(out, in, height, width)`` for a convolution.

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
            LoRAFormatError: The adapter does not change this layer, or not by low-rank factors.
        """
        return self._low_rank_layer(layer).rank

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
        for layer, delta in self._layers.items():
            for tensor in delta.factors() if delta.is_low_rank else delta.tensors:
                digest.update(f"{layer}{tuple(tensor.shape)}".encode())
                digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes that the stored tensors occupy, with those for text encoders."""
        tensors = [tensor for delta in self._layers.values() for tensor in delta.tensors]
        tensors += [*self._biases.values(), *self._norms.values()]
        text_encoders = sum(part.nbytes for part in self._text_encoders.values())
        return text_encoders + sum(tensor.nbytes for tensor in tensors)

    def check_fits(self, module_shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Make sure that the adapter is for a model with these layers.

        Args:
            module_shapes: Weight shape of every layer of the model, by name.

        Raises:
            LoRAFormatError: A layer is missing in the model or has another shape.
        """
        shapes = {layer: delta.shape for layer, delta in self._layers.items()}
        for layer, bias in self._biases.items():
            _, *inner = module_shapes.get(layer, (0, 0))
            shapes.setdefault(layer, (int(bias.shape[0]), *inner))
        check_shapes(self.name, shapes, module_shapes)

    def _low_rank_layer(self, layer: str) -> LayerDelta:
        delta = self._layer(layer)
        if not delta.is_low_rank:
            kinds = " and ".join(sorted({piece.algorithm for piece in delta.pieces}))
            raise LoRAFormatError(
                f"Layer {layer} of LoRA {shown(self.name)!r} is {kinds} and has no low-rank "
                "factors; approximate it with low_rank(), or merge the adapter."
            )
        return delta

    def _layer(self, layer: str) -> LayerDelta:
        delta = self._layers.get(layer)
        if delta is None:
            close = get_close_matches(layer, self._layers, n=1)
            hint = f"; did you mean {close[0]}?" if close else "; .layers lists those it has."
            raise LoRAFormatError(
                f"LoRA {shown(self.name)!r} does not change layer {shown(layer)!r}{hint}"
            )
        return delta


BaseWeight = Callable[[str], "Tensor"]
"""Gives a layer's dense weight ``[out, in]`` by canonical name."""


class PreparedLoRA:
    """A LoRA in the form that un-merged fusion takes; factors are the same tensors at every call.

    Layers that are not low-rank (LoKr, LoHa, DoRA, full differences) are approximated, and their
    relative errors are reported.

    Attributes:
        lora: The adapter itself.
        errors: Relative error (Frobenius) of each layer that had to be approximated.
        nbytes: Bytes that the factors occupy beside the adapter's own tensors, which they mostly
            are; on an accelerator as many again for what fusion derives from them and keeps.
    """

    def __init__(
        self,
        lora: LoRA,
        rank: int,
        base: BaseWeight | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Compute all factors.

        Args:
            lora: The adapter.
            rank: Rank of the layers that are approximated.
            base: Gives base weights; needed for DoRA layers only.
            device: An accelerator to keep the factors on; None or a CPU is the memory.

        Raises:
            LoRAFormatError: A layer depends on base weights, and there is no `base`.
        """
        self.lora = lora
        source, self.errors = low_rank_form(lora, rank, base)
        for layer in source.layers:  # the same changes; the cache then holds them once
            source._layers[layer] = source._layers[layer].folded()
        self._factors = {layer: source._layers[layer].compact_factors() for layer in source.layers}
        if device is not None and device.type != "cpu":
            self._factors = {
                layer: (_to_device(down, device), _to_device(up, device))
                for layer, (down, up) in self._factors.items()
            }
        self._shapes = {layer: source.shape(layer) for layer in source.layers}
        factors = [tensor for pair in self._factors.values() for tensor in pair]
        own = {tensor.data_ptr() for delta in lora._layers.values() for tensor in delta.tensors}
        self.nbytes = sum(
            tensor.nbytes * (2 if tensor.device.type != "cpu" else 1)
            for tensor in factors
            if tensor.data_ptr() not in own
        )

    @property
    def name(self) -> str:
        """The adapter's name."""
        return self.lora.name

    @property
    def layers(self) -> list[str]:
        """Names of the layers that have factors, sorted."""
        return list(self._factors)

    def factors(self, layer: str) -> tuple[Tensor, Tensor]:
        """Return ``A [r, in]`` and ``B [out, r]`` of one layer, scale folded in.

        They are in the type of the file where that holds them exactly, else in float32.
        """
        return self._factors[layer]

    def shape(self, layer: str) -> tuple[int, ...]:
        """Return the shape of the weight that the layer's delta is made for."""
        return self._shapes[layer]

    def __repr__(self) -> str:
        """Show name, layers and how many are approximated."""
        return (
            f"PreparedLoRA({self.name!r}, {len(self._factors)} layers, "
            f"{len(self.errors)} approximated)"
        )


def low_rank_form(
    lora: LoRA, rank: int, base: BaseWeight | None = None
) -> tuple[LoRA, Mapping[str, float]]:
    """Return an adapter with low-rank layers only, and the relative errors of the others.

    Args:
        lora: Any adapter.
        rank: Rank of the layers that are approximated.
        base: Gives base weights; needed for DoRA layers only.

    Raises:
        LoRAFormatError: A layer depends on base weights, and there is no `base`.
    """
    if all(lora.exact(layer) for layer in lora.layers):
        return lora, {}
    approximated = lora.low_rank(rank, base)
    return approximated, dict(approximated.report.errors)


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    # Page-locked memory is copied without the processor, beside what the device computes.
    pinned = tensor.pin_memory() if device.type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)
