"""Inputs of the encoders, and their flat form for linear ones.

Shape legend: n LoRAs, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autolora.errors import RetrievalError
from autolora.retrieval.portraits import PortraitTokens
from autolora.retrieval.tokens import TokenSpec, WeightTokens

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
