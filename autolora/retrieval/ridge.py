"""A LoRA encoder in closed form: ridge regression from fixed features to whitened text vectors.

On a few hundred LoRAs a deep encoder memorises its pool. Regressing the mean caption vector from
principal components has one number to choose, the ridge, and carries over better.

Shape legend: n LoRAs, F features, k components, E text dimensions after the head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autolora.retrieval.features import FlatSpec, LoRAInputs, block_sizes, flat_blocks, flatten
from autolora.retrieval.tokens import TokenSpec
from autolora.retrieval.whitening import TextWhitening


class RidgeEncoder(nn.Module):
    """Linear map from flat features to the whitened text space.

    Args:
        spec: Which features are taken.
        tokens: How the weight tokens are made.
        features: F.
        components: k.
        text_dim: D, length of the text encoder's vectors.
        dim: E.
    """

    kind = "ridge"
    uses_responses = False
    mean: Tensor
    scale: Tensor
    components: Tensor
    weight: Tensor
    text_mean: Tensor
    text_matrix: Tensor

    def __init__(
        self,
        spec: FlatSpec,
        tokens: TokenSpec,
        features: int,
        components: int,
        text_dim: int,
        dim: int,
    ) -> None:
        super().__init__()
        self.spec, self.tokens, self.dim, self.text_dim = spec, tokens, dim, text_dim
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.register_buffer("components", torch.zeros(features, components))
        self.register_buffer("weight", torch.zeros(components, dim))
        self.register_buffer("text_mean", torch.zeros(text_dim))
        self.register_buffer("text_matrix", torch.zeros(text_dim, dim))

    @property
    def uses_weights(self) -> bool:
        """Whether weight tokens are needed."""
        return self.spec.uses_weights

    @property
    def uses_portraits(self) -> bool:
        """Whether portraits are needed."""
        return self.spec.uses_portraits

    @property
    def config(self) -> dict[str, Any]:
        """What the constructor needs besides the token spec, as plain data."""
        return {
            "groups": list(self.spec.groups),
            "layers": list(self.spec.layers),
            "features": self.components.shape[0],
            "components": self.components.shape[1],
            "text_dim": self.text_dim,
            "dim": self.dim,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], tokens: TokenSpec) -> RidgeEncoder:
        """Make an encoder without weights from `config`."""
        rest = dict(config)
        spec = FlatSpec(tuple(rest.pop("groups")), tuple(rest.pop("layers")))
        return cls(spec, tokens, **rest)

    def encode_loras(self, inputs: LoRAInputs) -> Tensor:
        """Encode LoRAs.

        Args:
            inputs: n LoRAs.

        Returns:
            Unit vectors ``[n, E]``.
        """
        flat = flatten(flat_blocks(inputs, self.spec, self.tokens))
        centred = ((flat - self.mean) * self.scale).nan_to_num(0.0)
        return F.normalize(centred @ self.components @ self.weight, dim=-1)

    def encode_text(self, text: Tensor) -> Tensor:
        """Map text vectors ``[n, D]`` to unit vectors ``[n, E]``."""
        return TextWhitening(self.text_mean, self.text_matrix)(text)

    @classmethod
    def fit(
        cls,
        inputs: LoRAInputs,
        targets: Tensor,
        whitening: TextWhitening,
        spec: FlatSpec,
        tokens: TokenSpec,
        ridge: float = 1.0,
        components: int = 128,
    ) -> RidgeEncoder:
        """Fit in closed form.

        Args:
            inputs: n LoRAs.
            targets: Their mean whitened caption vectors ``[n, E]``.
            whitening: The text head.
            spec: Which features to take.
            tokens: How the weight tokens were made.
            ridge: Penalty, in units of the mean variance of the kept components.
            components: k at most.

        Returns:
            The encoder.
        """
        blocks = flat_blocks(inputs, spec, tokens)
        flat = flatten(blocks).double()
        mean = flat.nanmean(0).nan_to_num(0.0)
        centred = (flat - mean).nan_to_num(0.0)
        scale = _block_scale(centred, block_sizes(blocks))
        left, values, right = torch.linalg.svd(centred * scale, full_matrices=False)
        kept = min(components, int((values > values.max() * 1e-6).sum()))
        left, values, right = left[:, :kept], values[:kept], right[:kept]
        penalty = ridge * values.square().mean()
        shrunk = values / (values.square() + penalty)
        encoder = cls(spec, tokens, flat.shape[1], kept, len(whitening.mean), whitening.dim)
        encoder.load_state_dict(
            {
                "mean": mean.float(),
                "scale": scale.float(),
                "components": right.T.contiguous().float(),
                "weight": (shrunk[:, None] * (left.T @ targets.double())).float(),
                "text_mean": whitening.mean,
                "text_matrix": whitening.matrix,
            }
        )
        return encoder.eval()


def _block_scale(centred: Tensor, sizes: list[tuple[str, int]]) -> Tensor:
    """Factors that give every group the same variance, shared equally by its blocks.

    Weight features outnumber portrait features, and some layers vary more than others for no
    reason of meaning.
    """
    per_group = {group: sum(other == group for other, _ in sizes) for group, _ in sizes}
    scale = torch.ones(centred.shape[1], dtype=centred.dtype)
    start = 0
    for group, width in sizes:
        part = slice(start, start + width)
        variance = centred[:, part].square().sum(1).mean()
        scale[part] = (variance.clamp_min(1e-12) * per_group[group]).rsqrt()
        start += width
    return scale
