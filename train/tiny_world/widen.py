"""Widens a trained tiny FLUX by whole attention heads, so that it computes what it did before.

New residual channels start at zero and are read by random weights; new hidden units are written by
random weights and read by zeros (as in Net2Net, arXiv 1511.05641). Layer norms then see a smaller
variance, since a share of the channels is zero; their modulation's scale makes up for it. That is
exact where the old channels have mean zero, and close elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from autolora.families.tiny.model import TinyFluxDiT

_SCALES = {6: (1, 4), 3: (1,), 2: (1,)}
"""Which chunks of a modulation multiply a layer norm's output, by how many chunks it has."""


def widen(old: TinyFluxDiT, heads: int, text_length: int, seed: int = 0) -> TinyFluxDiT:
    """A wider model with the old one's function.

    Args:
        old: A trained model.
        heads: Attention heads of the new one; the width of a head stays.
        text_length: Of the new one.
        seed: Of the new random weights.

    Raises:
        ValueError: If ``heads`` is smaller than the old one's.
    """
    config = old.config
    if heads < config.heads:
        raise ValueError(f"{heads} heads are fewer than the {config.heads} there are")
    width = config.width // config.heads * heads
    new = TinyFluxDiT(replace(config, width=width, heads=heads, text_length=text_length))
    torch.manual_seed(seed)
    layers = dict(old.named_modules())
    ratio = math.sqrt(config.width / width)
    for name, module in new.named_modules():
        source = layers.get(name)
        if isinstance(module, nn.Linear) and isinstance(source, nn.Linear):
            _widen_linear(name, source, module, config.width, width, ratio)
        elif source is not None and next(module.parameters(recurse=False), None) is not None:
            module.load_state_dict(source.state_dict())
    return new


@torch.no_grad()
def _widen_linear(
    name: str, old: nn.Linear, new: nn.Linear, before: int, after: int, ratio: float
) -> None:
    """Fills one layer; both sides are chunks of the model's width, as FLUX lays them out."""
    out_chunks, out_map = _chunks(old.out_features, new.out_features, before, after)
    _, in_map = _chunks(old.in_features, new.in_features, before, after)
    weight = torch.empty_like(new.weight)
    nn.init.xavier_uniform_(weight)
    bias = torch.zeros_like(new.bias)
    modulation = name.endswith(".linear")
    kept_out, kept_in = _mask(out_map, new.out_features), _mask(in_map, new.in_features)
    reads_hidden = name.endswith(("ff_a.2", "ff_b.2", "to_out", "proj_out"))
    if modulation or reads_hidden:
        weight[:, ~kept_in] = 0  # new hidden units, or new channels of the condition, say nothing
    if modulation or not _is_hidden(name):
        weight[~kept_out] = 0  # new residual channels start at zero
    if modulation or name.startswith(("time_embedder", "pooled_text")):
        weight[:, ~kept_in] = 0
    rows, columns = torch.tensor(out_map), torch.tensor(in_map)
    weight[rows[:, None], columns[None]] = old.weight
    bias[rows] = old.bias
    if modulation:
        for chunk in _SCALES[out_chunks]:
            part = slice(chunk * after, chunk * after + before)
            weight[part] *= ratio
            bias[part] = ratio * (1 + bias[part]) - 1
    new.weight.copy_(weight)
    new.bias.copy_(bias)


def _is_hidden(name: str) -> bool:
    """Whether a layer writes hidden units (queries, feed-forward), not the residual stream."""
    return name.endswith(("qkv", "ff_a.0", "ff_b.0", "to_qkv_mlp"))


def _chunks(before_size: int, after_size: int, before: int, after: int) -> tuple[int, list[int]]:
    """How many chunks of the width one side has, and where each old row goes."""
    if before_size == after_size:
        return 1, list(range(before_size))
    count = before_size // before
    return count, [c * after + i for c in range(count) for i in range(before)]


def _mask(kept: list[int], size: int) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[kept] = True
    return mask
