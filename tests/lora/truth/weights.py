"""What a program trains in one linear layer, and the weight change that it stands for.

All changes are computed in float64 with numpy, from the values as they are stored. Formulas: LoRA
https://arxiv.org/abs/2106.09685; LoHa https://arxiv.org/abs/2108.06098 (FedPara) and LoKr as in
LyCORIS https://arxiv.org/abs/2309.14859; DoRA https://arxiv.org/abs/2402.09353.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Weights:
    """Tensors of one module of a training program.

    Attributes:
        tensors: What is stored, by role: ``A``, ``B``, ``alpha``, ``magnitude``, ``B.bias``, or the
            suffix itself where every program spells it alike.
        product: The change before any normalization, float64 ``[out, in]``.
        bias: Change of the bias, float64 ``[out]``.
        axis: Axis over which a DoRA's norm is taken: 1 gives one magnitude for every output row
            (PEFT, ai-toolkit, LyCORIS with ``wd_on_output``), 0 one for every input column (kohya,
            OneTrainer, LyCORIS without); None without magnitudes.
        low_rank: Whether two factors hold the whole change.
    """

    tensors: dict[str, Tensor]
    product: Callable[[], Array] | None
    bias: Array | None = None
    axis: int | None = None
    low_rank: bool = True

    def change(self, base: Tensor | None = None) -> Array:
        """The change of the weight, with the base weight ``[out, in]`` where the norm needs it."""
        assert self.product is not None
        if self.axis is None:
            return self.product()
        assert base is not None
        weight = base.to(torch.float64).numpy()
        direction = weight + self.product()
        norm = np.sqrt((direction * direction).sum(axis=self.axis, keepdims=True))
        magnitude = array(self.tensors["magnitude"]).reshape(norm.shape)
        return direction * (magnitude / norm) - weight


def array(tensor: Tensor) -> Array:
    return tensor.to(torch.float64).numpy()


def _draw(random: Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=random).to(dtype)


def _with_alpha(tensors: dict[str, Tensor], alpha: float | None) -> dict[str, Tensor]:
    return tensors if alpha is None else tensors | {"alpha": torch.tensor(float(alpha))}


def lora(
    random: Generator,
    out: int,
    inner: int,
    *,
    rank: int = 4,
    alpha: float | None = None,
    scale: float | None = None,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
) -> Weights:
    """Two factors; the change is ``alpha / rank * B @ A``, and 1 stands for a missing alpha.

    `scale` replaces that quotient where alpha is not in the tensors. A bias of the up projection
    is scaled like its weight, as PEFT does it.
    """
    A = _draw(random, rank, inner, dtype=dtype)
    B = _draw(random, out, rank, dtype=dtype)
    factor = scale if scale is not None else 1.0 if alpha is None else alpha / rank
    tensors = _with_alpha({"A": A, "B": B}, alpha)
    moved = None
    if bias:
        tensors["B.bias"] = _draw(random, out, dtype=dtype)
        moved = factor * array(tensors["B.bias"])
    return Weights(tensors, lambda: factor * (array(B) @ array(A)), moved)


def block_diagonal(
    random: Generator, parts: tuple[int, ...], inner: int, *, rank: int, alpha: float
) -> Weights:
    """A fused layer trained in parts, as sd-scripts stores it with ``split_qkv``."""
    A = _draw(random, rank * len(parts), inner)
    B = torch.zeros(sum(parts), rank * len(parts))
    start = 0
    for n, part in enumerate(parts):
        B[start : start + part, n * rank : (n + 1) * rank] = _draw(random, part, rank)
        start += part
    factor = alpha / (rank * len(parts))
    tensors = _with_alpha({"A": A, "B": B}, alpha)
    return Weights(tensors, lambda: factor * (array(B) @ array(A)))


def _divided(features: int, most: int = 8) -> tuple[int, int]:
    """The largest divisor up to `most`, and the rest."""
    small = max(n for n in range(1, most + 1) if features % n == 0)
    return small, features // small


def _most_square(features: int) -> tuple[int, int]:
    """The two divisors that are closest to each other, the smaller first."""
    return _divided(features, int(features**0.5))


LoKrKind = Literal["full", "w1", "w2", "both", "tucker"]


def lokr(
    random: Generator,
    out: int,
    inner: int,
    *,
    kind: LoKrKind = "w2",
    rank: int = 2,
    alpha: float | None = 1.0,
    dtype: torch.dtype = torch.float32,
    square: bool = False,
) -> Weights:
    """``kron(w1, w2)`` with either side in factors; `kind` names those that are.

    The change is scaled by ``alpha / rank`` once, however many sides are in factors, and not at
    all where none is: LyCORIS stores an alpha there too, which does not count. `square` divides the
    layer as PEFT does by default.
    """
    divided = _most_square if square else _divided
    (out1, out2), (in1, in2) = divided(out), divided(inner)
    tensors: dict[str, Tensor] = {}
    if kind in ("w1", "both"):
        tensors["lokr_w1_a"] = _draw(random, out1, rank, dtype=dtype)
        tensors["lokr_w1_b"] = _draw(random, rank, in1, dtype=dtype)
    else:
        tensors["lokr_w1"] = _draw(random, out1, in1, dtype=dtype)
    if kind in ("w2", "both"):
        tensors["lokr_w2_a"] = _draw(random, out2, rank, dtype=dtype)
        tensors["lokr_w2_b"] = _draw(random, rank, in2, dtype=dtype)
    elif kind == "tucker":
        # The core stands between factors that are stored the other way around.
        tensors["lokr_t2"] = _draw(random, rank, rank, 1, 1, dtype=dtype)
        tensors["lokr_w2_a"] = _draw(random, rank, out2, dtype=dtype)
        tensors["lokr_w2_b"] = _draw(random, rank, in2, dtype=dtype)
    else:
        tensors["lokr_w2"] = _draw(random, out2, in2, dtype=dtype)
    factor = 1.0 if kind == "full" or alpha is None else alpha / rank

    def product() -> Array:
        parts = {name: array(tensor) for name, tensor in tensors.items()}
        w1 = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
        if "lokr_t2" in parts:
            core = parts["lokr_t2"].reshape(rank, rank)
            w2 = parts["lokr_w2_a"].T @ core @ parts["lokr_w2_b"]
        elif "lokr_w2" in parts:
            w2 = parts["lokr_w2"]
        else:
            w2 = parts["lokr_w2_a"] @ parts["lokr_w2_b"]
        return factor * np.kron(w1, w2)

    return Weights(_with_alpha(tensors, alpha), product, low_rank=False)


def loha(
    random: Generator,
    out: int,
    inner: int,
    *,
    rank: int = 3,
    alpha: float | None = 1.0,
    tucker: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Weights:
    """The elementwise product of two low-rank matrices, times ``alpha / rank``."""
    tensors: dict[str, Tensor] = {}
    for side in ("1", "2"):
        first = (rank, out) if tucker else (out, rank)
        tensors[f"hada_w{side}_a"] = _draw(random, *first, dtype=dtype)
        tensors[f"hada_w{side}_b"] = _draw(random, rank, inner, dtype=dtype)
        if tucker:
            tensors[f"hada_t{side}"] = _draw(random, rank, rank, 1, 1, dtype=dtype)
    factor = 1.0 if alpha is None else alpha / rank

    def side(number: str) -> Array:
        left, right = array(tensors[f"hada_w{number}_a"]), array(tensors[f"hada_w{number}_b"])
        if tucker:
            left = left.T @ array(tensors[f"hada_t{number}"]).reshape(rank, rank)
        return left @ right

    stored = _with_alpha(dict(tensors), alpha)
    return Weights(stored, lambda: factor * side("1") * side("2"), low_rank=False)


def full(random: Generator, out: int, inner: int, *, bias: bool = False) -> Weights:
    """A whole weight change, and one of the bias, as LyCORIS' full module stores them."""
    tensors = {"diff": _draw(random, out, inner)}
    moved = None
    if bias:
        tensors["diff_b"] = _draw(random, out)
        moved = array(tensors["diff_b"])
    return Weights(tensors, lambda: array(tensors["diff"]), moved, low_rank=False)


def only_bias(random: Generator, out: int) -> Weights:
    """A change of the bias alone."""
    stored = _draw(random, out)
    return Weights({"diff_b": stored}, None, array(stored))


def dora(random: Generator, weights: Weights, base: Tensor, axis: int, flat: bool) -> Weights:
    """Add magnitudes to weights: the norms of the changed weight, each moved a little.

    Args:
        random: Source of the movement.
        weights: The direction's change.
        base: Base weight of the module, ``[out, in]``.
        axis: See `Weights.axis`.
        flat: Whether the vector is stored as ``[n]`` (PEFT, ai-toolkit) or as the row or column
            that it multiplies (LyCORIS, OneTrainer).
    """
    assert weights.product is not None
    norm = np.sqrt(((base.double().numpy() + weights.product()) ** 2).sum(axis, keepdims=True))
    moved = torch.from_numpy(norm) * (1 + 0.1 * torch.randn(norm.shape, generator=random))
    magnitude = moved.to(torch.float32)
    stored = weights.tensors | {"magnitude": magnitude.flatten() if flat else magnitude}
    return replace(weights, tensors=stored, axis=axis, low_rank=False)
