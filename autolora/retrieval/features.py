"""Features of a LoRA for the encoders: weight tokens, portraits, and both as one flat vector.

Weight tokens depend on the product ``B @ A`` of a layer alone, so that replacing ``B, A`` by
``B M, M^-1 A``, or padding the rank with zeros, gives the same token. Following the paper, queries
go through the delta, ``R = Q A^T B^T``; two descriptions are taken of these responses, both of unit
norm:

- *write*: ``R`` sketched on the output side, ``R S / sqrt(d)``: what the delta adds;
- *read*: the Gram matrix ``R R^T``: which inputs the delta listens to. It does not depend on the
  basis of the output. In text-side layers the row space of a trained delta holds the directions of
  its training captions, which is why this part carries over to concepts never seen in training.

Strength is a feature of its own, the logarithm of the exact Frobenius norm of ``B A``. Layers that
a LoRA does not change are masked.

A portrait is what a LoRA changes in the base model's first guess of the picture,
``delta_x0 = -sigma * (v_lora - v_base)`` for a few fixed noises and settings (noise level, neutral
prompt); `autolora.generate.portraits` makes it. It does not depend on anything about the file. Its
mean over noises is the direction; its strength, and how much the noises agree, are features apart.

Shape legend: n LoRAs, F features, L layers, P probes, d sketch size, r rank, S settings, K noises,
C latent channels, h x w latent, g grid.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from autolora.errors import RetrievalError

if TYPE_CHECKING:
    from autolora.lora.lora import LoRA

_TINY = 1e-12


@dataclass(frozen=True)
class TokenSpec:
    """How weight tokens are made.

    Attributes:
        layers: Canonical layers in token order.
        probes: P, queries that go through each delta.
        sketch: d, size that the responses are sketched to on the output side.
        seed: Names the fixed random signs; part of what makes tokens comparable.
    """

    layers: tuple[str, ...]
    probes: int = 16
    sketch: int = 16
    seed: str = "autolora-tokens-1"

    def __post_init__(self) -> None:
        """Check the sizes.

        Raises:
            RetrievalError: A size that is not positive, or no layer.
        """
        if not self.layers or self.probes < 1 or self.sketch < 1:
            raise RetrievalError(
                "Weight tokens need at least one layer, one probe and a sketch size of one."
            )

    @property
    def write_size(self) -> int:
        """Numbers that describe what a layer writes."""
        return self.probes * self.sketch

    @property
    def read_size(self) -> int:
        """Numbers that describe what a layer reads."""
        return self.probes * (self.probes + 1) // 2

    @property
    def size(self) -> int:
        """Numbers per token besides the strength."""
        return self.write_size + self.read_size


@dataclass
class WeightTokens:
    """Weight tokens of n LoRAs.

    Attributes:
        features: ``[n, L, write + read]``, each part of unit norm; zero where masked.
        strength: ``[n, L]``, natural logarithm of the delta's Frobenius norm; zero where masked.
        mask: ``[n, L]``, true where the LoRA changes the layer.
    """

    features: Tensor
    strength: Tensor
    mask: Tensor

    def __len__(self) -> int:
        """Count the LoRAs."""
        return len(self.features)

    def __getitem__(self, rows: Tensor | slice) -> WeightTokens:
        """Select some of the LoRAs."""
        return WeightTokens(self.features[rows], self.strength[rows], self.mask[rows])

    @staticmethod
    def cat(parts: Sequence[WeightTokens]) -> WeightTokens:
        """Join the tokens of several groups of LoRAs."""
        return WeightTokens(
            torch.cat([part.features for part in parts]),
            torch.cat([part.strength for part in parts]),
            torch.cat([part.mask for part in parts]),
        )


@lru_cache(maxsize=256)
def random_signs(seed: str, rows: int, columns: int) -> Tensor:
    """Fixed random signs, the same on every machine and with every library version.

    They are the bits of SHAKE-256, since the streams of numeric libraries may change.

    Args:
        seed: Any text.
        rows: Rows of the result.
        columns: Columns of the result.

    Returns:
        ``[rows, columns]`` of -1 and 1, float32. Do not write to it.
    """
    count = rows * columns
    raw = hashlib.shake_256(f"{seed}/{rows}x{columns}".encode()).digest((count + 7) // 8)
    bits = np.unpackbits(np.frombuffer(raw, np.uint8), count=count)
    return torch.from_numpy(bits.astype(np.float32) * 2 - 1).view(rows, columns)


def delta_norm(A: Tensor, B: Tensor) -> Tensor:
    """Frobenius norm of ``B @ A`` from the factors.

    ``|BA|^2 = sum((B^T B) * (A A^T))``, which never forms the dense delta.

    Args:
        A: ``[r, in]``.
        B: ``[out, r]``.

    Returns:
        A scalar.
    """
    return ((B.T @ B) * (A @ A.T)).sum().clamp_min(0).sqrt()


def weight_tokens(
    lora: LoRA, spec: TokenSpec, probes: Mapping[str, Tensor] | None = None
) -> WeightTokens:
    """Make the weight tokens of one LoRA.

    Args:
        lora: The adapter. Layers that are not in `spec` are not looked at.
        spec: Layers and sizes.
        probes: Queries ``[P, in]`` by layer, as `fit_probes` makes them; fixed random signs,
            shared by all layers that read the same width, for layers that have none.

    Returns:
        Tokens of one LoRA (n = 1).

    Raises:
        RetrievalError: A layer's input size is not that of its probes, which means that the
            probes were made for another base model.
    """
    features = torch.zeros(1, len(spec.layers), spec.size)
    strength = torch.zeros(1, len(spec.layers))
    mask = torch.zeros(1, len(spec.layers), dtype=torch.bool)
    for position, layer in enumerate(spec.layers):
        if layer not in lora:
            continue
        A, B = lora.leading_factors(layer)
        norm = delta_norm(A, B)
        if norm <= _TINY:
            # A delta of zero says nothing; it is the same as a missing layer.
            continue
        query = _probe(spec, layer, A.shape[1], probes)
        features[0, position] = _describe(spec, query, A, B)
        strength[0, position] = norm.log()
        mask[0, position] = True
    return WeightTokens(features, strength, mask)


def _probe(
    spec: TokenSpec, layer: str, in_features: int, probes: Mapping[str, Tensor] | None
) -> Tensor:
    fitted = None if probes is None else probes.get(layer)
    if fitted is None:
        return random_signs(f"{spec.seed}/in", spec.probes, in_features)
    if fitted.shape != (spec.probes, in_features):
        raise RetrievalError(
            f"The retriever's probes of layer {layer} have {fitted.shape[1]} inputs, but the LoRA "
            f"has {in_features}; the retriever was trained for another base model."
        )
    return fitted


def _describe(spec: TokenSpec, query: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Write and read parts of one layer, ``[write + read]``."""
    narrow = query @ A.T  # [P, r]
    sketch = random_signs(f"{spec.seed}/out", B.shape[0], spec.sketch)
    write = narrow @ (B.T @ sketch)  # [P, d]
    gram = narrow @ (B.T @ B) @ narrow.T  # [P, P] = R R^T
    rows, columns = torch.triu_indices(spec.probes, spec.probes)
    # Off-diagonal entries stand for two, so that dot products equal those of the full matrices.
    read = gram[rows, columns] * torch.where(rows == columns, 1.0, 2.0**0.5)
    return torch.cat([_unit(write.flatten()), _unit(read)])


def _unit(vector: Tensor) -> Tensor:
    return vector / vector.norm().clamp_min(_TINY)


def fit_probes(loras: Iterable[LoRA], spec: TokenSpec) -> dict[str, Tensor]:
    """Find the input directions that a pool's deltas read most, to use as probes.

    Per layer these are the leading eigenvectors of the mean of ``(BA)^T (BA) / |BA|^2``, the best
    P directions in the sense of explained energy, with no training.

    Args:
        loras: Adapters to fit to; only those for training.
        spec: Layers and number of probes.

    Returns:
        Orthonormal queries ``[P, in]`` by layer, for layers that some LoRA changes and that are
        wide enough; the others keep random ones.
    """
    moments: dict[str, Tensor] = {}
    for lora in loras:
        for layer in spec.layers:
            if layer not in lora:
                continue
            A, B = lora.leading_factors(layer)
            norm = delta_norm(A, B)
            if norm > _TINY:
                moment = A.T @ (B.T @ B) @ A / norm.square()
                moments[layer] = moments[layer] + moment if layer in moments else moment
    return {
        layer: torch.linalg.eigh(moment.double()).eigenvectors[:, -spec.probes :].T.flip(0).float()
        for layer, moment in moments.items()
        if moment.shape[0] >= spec.probes
    }


_SMALLEST_CHANGE = 1e-8


@dataclass(frozen=True)
class PortraitSpec:
    """What portraits an encoder takes.

    Attributes:
        settings: S, number of settings.
        channels: C, latent channels.
        grid: g, portraits are averaged down to ``g x g``; larger ones than that are blurred.
    """

    settings: int
    channels: int
    grid: int = 8

    @property
    def size(self) -> int:
        """Numbers of one setting's picture."""
        return self.channels * self.grid * self.grid

    def check(self, portraits: Tensor) -> None:
        """Make sure that portraits have this shape.

        Args:
            portraits: ``[n, S, K, C, h, w]``.

        Raises:
            RetrievalError: They have not.
        """
        good = portraits.ndim == 6 and portraits.shape[1] == self.settings
        if not good or portraits.shape[3] != self.channels or portraits.shape[2] < 1:
            raise RetrievalError(
                f"Portraits of shape {list(portraits.shape)} do not fit the retriever, which was "
                f"trained on [n, {self.settings}, noises, {self.channels}, h, w]; make them with "
                "the same settings."
            )


@dataclass
class PortraitTokens:
    """Portrait tokens of n LoRAs.

    Attributes:
        pictures: ``[n, S, C, g, g]``, mean over noises, each of unit norm.
        scalars: ``[n, S, 2]``: natural logarithm of the norm, and agreement of the noises (norm of
            the mean over mean of the norms, in [0, 1]).
    """

    pictures: Tensor
    scalars: Tensor

    def __len__(self) -> int:
        """Count the LoRAs."""
        return len(self.pictures)

    def __getitem__(self, rows: Tensor | slice) -> PortraitTokens:
        """Select some of the LoRAs."""
        return PortraitTokens(self.pictures[rows], self.scalars[rows])


def portrait_tokens(
    portraits: Tensor, spec: PortraitSpec, noises: Tensor | None = None
) -> PortraitTokens:
    """Make portrait tokens.

    Args:
        portraits: ``[n, S, K, C, h, w]``, or ``[S, K, C, h, w]`` of one LoRA.
        spec: Shape of the tokens.
        noises: Indices of the noises to use; all when None. Random subsets augment training.

    Returns:
        The tokens.

    Raises:
        RetrievalError: The portraits do not fit `spec`.
    """
    if portraits.ndim == 5:
        portraits = portraits[None]
    spec.check(portraits)
    if noises is not None:
        portraits = portraits[:, :, noises]
    portraits = portraits.float()
    mean = portraits.mean(2)  # [n, S, C, h, w]
    each = portraits.flatten(3).norm(dim=-1).mean(2)  # [n, S]
    norm = mean.flatten(2).norm(dim=-1)
    pictures = F.adaptive_avg_pool2d(mean.flatten(0, 1), spec.grid)
    pictures = F.normalize(pictures.flatten(1), dim=-1, eps=_SMALLEST_CHANGE)
    pictures = pictures.view(*mean.shape[:3], spec.grid, spec.grid)
    scalars = torch.stack(
        [norm.clamp_min(_SMALLEST_CHANGE).log(), norm / each.clamp_min(_SMALLEST_CHANGE)], -1
    )
    return PortraitTokens(pictures, scalars)


GROUPS = ("portrait", "read", "write")


@dataclass
class LoRAInputs:
    """What is known about n LoRAs; any part may be absent.

    Attributes:
        weights: Weight tokens.
        portraits: Portrait tokens.
        reads: Read factors of text-side layers ``[n, layers, r, in]``.
    """

    weights: WeightTokens | None = None
    portraits: PortraitTokens | None = None
    reads: Tensor | None = None

    def __len__(self) -> int:
        """Count the LoRAs.

        Raises:
            RetrievalError: All parts are absent, or they are of different LoRAs.
        """
        parts = (self.weights, self.portraits, self.reads)
        sizes = {len(part) for part in parts if part is not None}
        if len(sizes) != 1:
            raise RetrievalError(
                "A LoRA can only be encoded from its weights, its portrait, or both."
            )
        return sizes.pop()

    def __getitem__(self, rows: Tensor | slice) -> LoRAInputs:
        """Select some of the LoRAs."""
        return LoRAInputs(
            None if self.weights is None else self.weights[rows],
            None if self.portraits is None else self.portraits[rows],
            None if self.reads is None else self.reads[rows],
        )

    def only(self, *, weights: bool, portraits: bool) -> LoRAInputs:
        """The same LoRAs with a part left out.

        Args:
            weights: Keep the weight tokens.
            portraits: Keep the portraits.

        Returns:
            A view.
        """
        return LoRAInputs(self.weights if weights else None, self.portraits if portraits else None)


@dataclass(frozen=True)
class FlatSpec:
    """Which features a linear encoder takes, in which order.

    Attributes:
        groups: Some of ``portrait``, ``read``, ``write``.
        layers: Positions of the layers in the weight tokens.
    """

    groups: tuple[str, ...]
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check the names.

        Raises:
            RetrievalError: An unknown group, or weight groups without layers.
        """
        unknown = [group for group in self.groups if group not in GROUPS]
        if unknown or not self.groups:
            raise RetrievalError(
                f"Unknown feature groups {unknown}; known ones are {', '.join(GROUPS)}."
            )
        if self.uses_weights and not self.layers:
            raise RetrievalError("Weight features need at least one layer.")

    @property
    def uses_weights(self) -> bool:
        """Whether weight tokens are needed."""
        return "read" in self.groups or "write" in self.groups

    @property
    def uses_portraits(self) -> bool:
        """Whether portraits are needed."""
        return "portrait" in self.groups


def flat_blocks(inputs: LoRAInputs, spec: FlatSpec, tokens: TokenSpec) -> list[tuple[str, Tensor]]:
    """Take the inputs apart into blocks of unit norm.

    Args:
        inputs: n LoRAs.
        spec: What is wanted.
        tokens: How the weight tokens were made.

    Returns:
        Group and features ``[n, f]`` of each block (a setting's picture, or a layer's part); rows
        of absent blocks are NaN.

    Raises:
        RetrievalError: A part that is wanted is absent.
    """
    blocks: list[tuple[str, Tensor]] = []
    for group in spec.groups:
        if group == "portrait":
            if inputs.portraits is None:
                raise RetrievalError("This encoder needs portraits, and there are none.")
            pictures = inputs.portraits.pictures.flatten(2)
            blocks += [(group, pictures[:, setting]) for setting in range(pictures.shape[1])]
            continue
        if inputs.weights is None:
            raise RetrievalError("This encoder needs weight tokens, and there are none.")
        parts = inputs.weights.features.split([tokens.write_size, tokens.read_size], dim=-1)
        part = parts[0] if group == "write" else parts[1]
        part = part.masked_fill(~inputs.weights.mask[..., None], torch.nan)
        blocks += [(group, part[:, layer]) for layer in spec.layers]
    return blocks


def flatten(blocks: Sequence[tuple[str, Tensor]]) -> Tensor:
    """Join blocks to ``[n, F]``."""
    return torch.cat([block for _, block in blocks], dim=1)


def block_sizes(blocks: Sequence[tuple[str, Tensor]]) -> list[tuple[str, int]]:
    """Group and width of each block."""
    return [(group, block.shape[1]) for group, block in blocks]
