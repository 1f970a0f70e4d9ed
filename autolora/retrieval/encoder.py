"""The trained LoRA encoder: a small transformer over weight tokens and portrait tokens.

Each layer is a token, as in the paper; so is each setting's portrait. Either kind may be absent.
Missing layers are masked, not zeroed, and strength enters apart from direction. The text side is
a frozen encoder with a small trained head.

Shape legend: n LoRAs, L layers, S portrait settings, W width, D text dimensions, E output.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autolora.errors import RetrievalError
from autolora.retrieval.features import LoRAInputs
from autolora.retrieval.portraits import PortraitSpec, PortraitTokens
from autolora.retrieval.tokens import WeightTokens
from autolora.retrieval.whitening import TextWhitening


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of a `LoRAEncoder`.

    Attributes:
        layers: L, layers in the weight tokens; 0 for an encoder of portraits only.
        token_size: Features of a weight token.
        settings: S, portrait settings; 0 for an encoder of weights only.
        portrait_size: Numbers in one setting's portrait.
        text_dim: D, length of the text encoder's vectors.
        dim: E, length of the shared vectors.
        width: W, channels inside.
        depth: Transformer blocks.
        heads: Attention heads.
        dropout: Dropout on token inputs and inside the blocks.
    """

    layers: int
    token_size: int
    settings: int
    portrait_size: int
    text_dim: int
    dim: int = 256
    width: int = 128
    depth: int = 2
    heads: int = 4
    dropout: float = 0.2

    def __post_init__(self) -> None:
        """Check the sizes.

        Raises:
            RetrievalError: Nothing to encode, or a width that the heads do not divide.
        """
        if self.layers < 1 and self.settings < 1:
            raise RetrievalError("An encoder needs weight tokens or portraits; set one of them.")
        if self.width % self.heads:
            raise RetrievalError(
                f"The encoder's width {self.width} must be a multiple of its {self.heads} heads."
            )


class TextHead(nn.Module):
    """Trained head on frozen text vectors: an affine map and normalization.

    Args:
        text_dim: D.
        dim: E.
        dropout: Dropout on the text vectors.
    """

    def __init__(self, text_dim: int, dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(text_dim, dim)

    @torch.no_grad()
    def start_from(self, whitening: TextWhitening) -> None:
        """Start at the closed-form head, so that training only has to refine it."""
        self.linear.weight.copy_(whitening.matrix.T)
        self.linear.bias.copy_(-whitening.mean @ whitening.matrix)

    def forward(self, text: Tensor) -> Tensor:
        """Map text vectors ``[n, D]`` to unit vectors ``[n, E]``."""
        return F.normalize(self.linear(self.dropout(text)), dim=-1)


class LoRAEncoder(nn.Module):
    """Weight tokens and portrait tokens to one unit vector.

    Args:
        config: Sizes.
    """

    kind = "transformer"
    uses_responses = False

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.sizes = config
        width = config.width
        self.drop = nn.Dropout(config.dropout)
        if config.layers:
            self.weight_in = nn.Linear(config.token_size, width)
            self.strength_in = nn.Linear(2, width)
            self.layer_embedding = nn.Parameter(torch.randn(config.layers, width) * 0.02)
        if config.settings:
            self.portrait_in = nn.Sequential(
                nn.Linear(config.portrait_size, width), nn.GELU(), nn.Linear(width, width)
            )
            self.scalar_in = nn.Linear(2, width)
            self.setting_embedding = nn.Parameter(torch.randn(config.settings, width) * 0.02)
        block = nn.TransformerEncoderLayer(
            width,
            config.heads,
            dim_feedforward=2 * width,
            dropout=config.dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.blocks = nn.TransformerEncoder(block, config.depth, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, config.dim)
        self.text_head = TextHead(config.text_dim, config.dim, config.dropout)

    @property
    def uses_weights(self) -> bool:
        """Whether weight tokens are used."""
        return self.sizes.layers > 0

    @property
    def uses_portraits(self) -> bool:
        """Whether portraits are used."""
        return self.sizes.settings > 0

    @property
    def dim(self) -> int:
        """Length E of the vectors."""
        return self.sizes.dim

    @property
    def config(self) -> dict[str, Any]:
        """Sizes as plain data."""
        return asdict(self.sizes)

    def forward(self, inputs: LoRAInputs) -> Tensor:
        """Encode LoRAs.

        Args:
            inputs: n LoRAs; a part that this encoder does not use is not looked at, and one of
                two parts that it uses may be absent.

        Returns:
            Unit vectors ``[n, E]``.

        Raises:
            RetrievalError: Nothing that this encoder uses is there.
        """
        tokens: list[Tensor] = []
        masks: list[Tensor] = []
        if self.uses_weights and inputs.weights is not None:
            tokens.append(self._embed_weights(inputs.weights))
            masks.append(inputs.weights.mask)
        if self.uses_portraits and inputs.portraits is not None:
            tokens.append(self._embed_portraits(inputs.portraits))
            masks.append(tokens[-1].new_ones(tokens[-1].shape[:2], dtype=torch.bool))
        if not tokens:
            raise RetrievalError("This encoder was given neither weight tokens nor a portrait.")
        mask = torch.cat(masks, 1)
        if not bool(mask.any(1).all()):
            raise RetrievalError(
                "A LoRA changes none of the layers that the retriever was trained on; it was made "
                "for another base model."
            )
        x = self.blocks(torch.cat(tokens, 1), src_key_padding_mask=~mask)
        pooled = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return F.normalize(self.out(self.norm(pooled)), dim=-1)

    def _embed_weights(self, weights: WeightTokens) -> Tensor:
        mask = weights.mask[..., None].float()
        strength = weights.strength[..., None]
        overall = (strength * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)
        # The profile over the layers and the overall level are told apart: the level follows from
        # the alpha that a trainer happened to use.
        levels = torch.cat([strength - overall, overall.expand_as(strength)], -1) * mask
        x = self.weight_in(self.drop(weights.features)) + self.strength_in(levels)
        return x + self.layer_embedding

    def _embed_portraits(self, portraits: PortraitTokens) -> Tensor:
        # Unit vectors have entries that shrink with their size; back to unit variance.
        pictures = portraits.pictures.flatten(2) * self.sizes.portrait_size**0.5
        x = self.portrait_in(self.drop(pictures)) + self.scalar_in(portraits.scalars)
        return x + self.setting_embedding

    def encode_loras(self, inputs: LoRAInputs) -> Tensor:
        """The same as calling it: unit vectors ``[n, E]``."""
        vectors: Tensor = self(inputs)
        return vectors

    def encode_text(self, text: Tensor) -> Tensor:
        """Map text vectors ``[n, D]`` to unit vectors ``[n, E]``."""
        vectors: Tensor = self.text_head(text)
        return vectors

    @classmethod
    def for_inputs(
        cls,
        inputs: LoRAInputs,
        portrait: PortraitSpec | None,
        text_dim: int,
        **sizes: Any,
    ) -> LoRAEncoder:
        """Make an untrained encoder with the sizes of its inputs.

        Args:
            inputs: Some LoRAs with the parts that it shall use.
            portrait: Shape of the portraits, None without them.
            text_dim: D.
            sizes: Further fields of `EncoderConfig`.

        Returns:
            The encoder.
        """
        weights = inputs.weights
        with_portraits = inputs.portraits is not None and portrait is not None
        return cls(
            EncoderConfig(
                layers=0 if weights is None else weights.features.shape[1],
                token_size=0 if weights is None else weights.features.shape[2],
                settings=portrait.settings if with_portraits and portrait else 0,
                portrait_size=portrait.size if with_portraits and portrait else 0,
                text_dim=text_dim,
                **sizes,
            )
        )
