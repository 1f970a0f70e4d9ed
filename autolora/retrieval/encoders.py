"""Encoders that turn a LoRA's features into vectors that can be compared with texts.

`LoRAEncoder` is a small transformer with a token for each layer, as in the paper, and one for each
portrait setting. Either kind may be absent; missing layers are masked, not zeroed, and strength
enters apart from direction. The text side is a frozen encoder with a small trained head.

`RidgeEncoder` is the same in closed form: on a few hundred LoRAs a deep encoder memorizes its pool,
and regressing the mean caption vector on principal components, with one number to choose, carries
over better. `TextHead` whitens text vectors by the covariance within LoRAs (linear discriminant
analysis): captions of one LoRA differ in background colours and phrasing, which say nothing about
it.

`ResponseEncoder` needs no training on LoRAs. By the chain rule, every step of training adds to a
delta products whose input side is the activations of the captions, so the row space of a delta that
reads the text stream holds the directions of its training captions. The response of a delta ``BA``
to the activation ``x`` of a text has the energy ``|B A x|^2 = <x x^T, A^T B^T B A>``: an inner
product of something of the text and something of the LoRA, which an index can search. Activations
are taken relative to their mean over texts and along their principal directions, half whitened,
with the mean's own direction added (its cross terms carry the sign); these are the queries that go
through the delta. A ridge regression predicts them from the text encoder's sentence vector, so that
the base model is needed only for fitting. From there queries and text map are trained by the
contrastive loss.

Shape legend: n LoRAs, T texts, L layers, S portrait settings, r rank, m queries,
v = m (m + 1) / 2, F features, k components, W width, D text dimensions, E output dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autolora.errors import RetrievalError
from autolora.retrieval.features import (
    FlatSpec,
    LoRAInputs,
    PortraitSpec,
    PortraitTokens,
    TokenSpec,
    WeightTokens,
    block_sizes,
    flat_blocks,
    flatten,
)

if TYPE_CHECKING:
    from autolora.lora.lora import LoRA

_TINY = 1e-12
_MEAN_SHARE = 0.5
"""Size of the mean's coordinate beside the others; from 0.3 to 1 makes little difference."""


def half_vector(matrix: Tensor) -> Tensor:
    """Upper triangles of symmetric matrices, such that dot products equal those of the matrices.

    Args:
        matrix: ``[..., m, m]``.

    Returns:
        ``[..., v]``.
    """
    rows, columns = torch.triu_indices(matrix.shape[-1], matrix.shape[-1])
    return matrix[..., rows, columns] * torch.where(rows == columns, 1.0, 2.0**0.5).to(matrix)


def fit_queries(activations: Tensor, directions: int, whitening: float = 0.5) -> Tensor:
    """Directions along which activations of texts vary, and that of their mean.

    Args:
        activations: ``[T, in]`` of one layer, the mean over a text's tokens.
        directions: Principal directions at most; the mean's is added to them.
        whitening: 0 keeps the variances of the directions, 1 makes them equal.

    Returns:
        Queries ``[m, in]``, the last one along the mean.
    """
    x = activations.double()
    mean = x.mean(0)
    centred = x - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
    kept = min(directions, int((values > values.max() * 1e-6).sum()))
    values, vectors = values[-kept:].flip(0), vectors[:, -kept:].flip(1)
    rows = (vectors * values.pow(-whitening / 2)).T
    along = mean / mean.norm().clamp_min(_TINY) * rows.norm(dim=1).mean()
    return torch.cat([rows, along[None]]).float()


def read_factors(lora: LoRA, layers: Sequence[str]) -> Tensor:
    """The side of a LoRA's deltas that reads, without regard to what they write.

    ``F`` with ``F^T F = (BA)^T (BA) / |(BA)^T (BA)|``; any split of the factors and any strength
    gives the same ``F`` up to a rotation of its rows.

    Args:
        lora: The adapter.
        layers: L layers that read inputs of the same size.

    Returns:
        ``[L, r, in]`` with the largest rank as r, zero in layers that the LoRA does not change;
        ``[L, 0, 0]`` when it changes none.
    """
    found: dict[str, Tensor] = {}
    for layer in layers:
        if layer not in lora:
            continue
        A, B = lora.leading_factors(layer)
        values, vectors = torch.linalg.eigh((B.T @ B).double())
        factor = values.clamp_min(0).sqrt()[:, None] * (vectors.T @ A.double())
        norm = torch.linalg.matrix_norm(factor @ factor.T)
        if norm > _TINY:
            found[layer] = (factor / norm.sqrt()).float()
    rank = max((len(factor) for factor in found.values()), default=0)
    width = next((factor.shape[1] for factor in found.values()), 0)
    result = torch.zeros(len(layers), rank, width)
    for position, layer in enumerate(layers):
        if layer in found:
            result[position, : len(found[layer])] = found[layer]
    return result


def stack_reads(reads: Sequence[Tensor]) -> Tensor:
    """Join the read factors of several LoRAs.

    Args:
        reads: n tensors ``[L, r, in]`` of any rank.

    Returns:
        ``[n, L, r, in]`` with the largest rank.
    """
    rank = max(factor.shape[1] for factor in reads)
    width = max(factor.shape[2] for factor in reads)
    result = torch.zeros(len(reads), reads[0].shape[0], rank, width)
    for position, factor in enumerate(reads):
        result[position, :, : factor.shape[1], : factor.shape[2]] = factor
    return result


class ResponseEncoder(nn.Module):
    """Energy of responses as a cosine; queries and text map can be trained further.

    Args:
        layers: L.
        directions: m, with the mean's.
        inputs: Input size of the layers.
        text_dim: D.
    """

    kind = "responses"
    uses_weights = False
    uses_portraits = False
    uses_responses = True
    text_mean: Tensor
    text_centre: Tensor
    lora_centre: Tensor

    def __init__(self, layers: int, directions: int, inputs: int, text_dim: int) -> None:
        super().__init__()
        self.layers, self.directions = layers, directions
        self.inputs, self.text_dim = inputs, text_dim
        size = directions * (directions + 1) // 2
        self.queries = nn.Parameter(torch.zeros(layers, directions, inputs))
        self.text_matrix = nn.Parameter(torch.zeros(layers, text_dim, directions))
        self.text_bias = nn.Parameter(torch.zeros(layers, directions))
        self.register_buffer("text_mean", torch.zeros(text_dim))
        self.register_buffer("text_centre", torch.zeros(layers, size))
        self.register_buffer("lora_centre", torch.zeros(layers, size))

    @property
    def dim(self) -> int:
        """Length of the vectors, L v."""
        return int(self.text_centre.numel())

    @property
    def config(self) -> dict[str, Any]:
        """What the constructor needs, as plain data."""
        return {
            "layers": self.layers,
            "directions": self.directions,
            "inputs": self.inputs,
            "text_dim": self.text_dim,
        }

    def encode_loras(self, inputs: LoRAInputs) -> Tensor:
        """Encode LoRAs.

        Args:
            inputs: n LoRAs with read factors.

        Returns:
            Unit vectors ``[n, L v]``; layers that a LoRA lacks are zero.

        Raises:
            RetrievalError: There are no read factors, or they are of another base model.
        """
        reads = inputs.reads
        if reads is None:
            raise RetrievalError("This encoder needs a LoRA's text-side deltas; there are none.")
        if reads.shape[3] != self.inputs:
            raise RetrievalError(
                f"The retriever's queries have {self.inputs} inputs, but the LoRA's deltas have "
                f"{reads.shape[3]}; the retriever was trained for another base model."
            )
        present = reads.flatten(2).any(-1, keepdim=True)
        centred = F.normalize(self._grams(reads) - self.lora_centre, dim=-1) * present
        return F.normalize(centred.flatten(1), dim=-1)

    def _grams(self, reads: Tensor) -> Tensor:
        """Half vectors of the Gram matrices of the responses, of unit norm ``[n, L, v]``."""
        narrow = torch.einsum("lmi,nlri->nlmr", self.queries, reads)
        return F.normalize(half_vector(narrow @ narrow.mT), dim=-1)

    def encode_text(self, text: Tensor) -> Tensor:
        """Map text vectors ``[n, D]`` to unit vectors ``[n, L v]``."""
        products = self._products(text) - self.text_centre
        return F.normalize(F.normalize(products, dim=-1).flatten(1), dim=-1)

    def _products(self, text: Tensor) -> Tensor:
        """Half vectors of ``y y^T`` of the predicted activations ``[n, L, v]``."""
        y = torch.einsum("nd,ldm->nlm", text - self.text_mean, self.text_matrix) + self.text_bias
        return half_vector(y[..., :, None] * y[..., None, :])

    @classmethod
    def fit(
        cls,
        text: Tensor,
        activations: Sequence[Tensor],
        reads: Tensor,
        directions: int = 64,
        ridge: float = 0.01,
    ) -> ResponseEncoder:
        """Fit in closed form, without pairs of LoRAs and texts.

        Args:
            text: Sentence vectors ``[T, D]``.
            activations: Activations of the same texts ``[T, in]`` by layer.
            reads: Read factors ``[n, L, r, in]`` to centre on.
            directions: Principal directions at most.
            ridge: Penalty of the regression, in units of the text vectors' mean variance.

        Returns:
            The encoder.
        """
        queries = [fit_queries(points, directions) for points in activations]
        shortest = min(len(query) for query in queries)
        queries = [torch.cat([query[: shortest - 1], query[-1:]]) for query in queries]
        encoder = cls(len(queries), shortest, queries[0].shape[1], text.shape[1])
        mean = text.double().mean(0)
        centred = text.double() - mean
        gram = centred.T @ centred
        gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        with torch.no_grad():
            for layer, (points, query) in enumerate(zip(activations, queries, strict=True)):
                x = points.double()
                moved = (x - x.mean(0)) @ query[:-1].double().T
                matrix = torch.linalg.solve(gram, centred.T @ moved)
                encoder.queries[layer] = query
                encoder.text_matrix[layer, :, :-1] = matrix.float()
                size = (centred @ matrix).norm(dim=1).mean()
                encoder.text_bias[layer, -1] = float(size) * _MEAN_SHARE
            encoder.text_mean.copy_(mean)
            encoder.text_centre.copy_(encoder._products(text).mean(0))
            encoder.lora_centre.copy_(encoder._grams(reads).mean(0))
        return encoder.eval()


@dataclass
class TextWhitening:
    """An affine map of text vectors followed by normalization.

    Attributes:
        mean: ``[D]``, subtracted first.
        matrix: ``[D, E]``.
    """

    mean: Tensor
    matrix: Tensor

    @property
    def dim(self) -> int:
        """Output dimensions E."""
        return self.matrix.shape[1]

    def __call__(self, text: Tensor) -> Tensor:
        """Map text vectors.

        Args:
            text: ``[n, D]``.

        Returns:
            Unit vectors ``[n, E]``.
        """
        return F.normalize((text - self.mean) @ self.matrix, dim=-1)

    @classmethod
    def fit(
        cls, text: Tensor, owners: Tensor, dim: int | None = None, shrinkage: float = 0.1
    ) -> TextWhitening:
        """Fit to the captions of a training pool.

        Args:
            text: Caption vectors ``[n, D]``.
            owners: ``[n]``, which LoRA or concept each belongs to.
            dim: E; all of D when None. Fewer keep the directions in which LoRAs differ most.
            shrinkage: Share of the within-covariance that is replaced by a multiple of the
                identity; 1 gives plain centring.

        Returns:
            The head.
        """
        points = text.double()
        mean = points.mean(0)
        inverse = torch.unique(owners, return_inverse=True)[1]
        groups = int(inverse.max()) + 1
        sums = points.new_zeros(groups, points.shape[1]).index_add_(0, inverse, points)
        counts = torch.bincount(inverse, minlength=groups)
        centres = sums / counts[:, None]
        inner = points - centres[inverse]
        within = inner.T @ inner / max(len(points) - groups, 1)
        size = within.diagonal().mean().clamp_min(1e-9)
        identity = torch.eye(len(within), dtype=within.dtype) * size
        values, vectors = torch.linalg.eigh((1 - shrinkage) * within + shrinkage * identity)
        matrix = vectors * values.clamp_min(1e-12).rsqrt() @ vectors.T
        if dim is not None and dim < matrix.shape[1]:
            between = (centres - centres.mean(0)) @ matrix
            axes = torch.linalg.eigh(between.T @ between).eigenvectors
            matrix = matrix @ axes[:, -dim:].flip(1)
        return cls(mean.float(), matrix.float())


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
        # The profile over the layers and the overall level are separated: the level follows from
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
            inputs: Some LoRAs with the parts that it should use.
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
