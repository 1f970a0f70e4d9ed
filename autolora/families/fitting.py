"""Gives DiffSynth's modules the sizes of a checkpoint, where their constructors know one only.

A module made on the meta device holds no numbers, so its layers can be given other sizes before it
is filled; a checkpoint of any width then goes through the code of the published one. Importing this
module imports torch.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from autolora.safetensors_io import Shapes, count_blocks

_Module = TypeVar("_Module", bound=nn.Module)


def fit(model: _Module, shapes: Shapes, width: int | None = None) -> _Module:
    """Shorten lists of blocks and reshape layers on the meta device to what a checkpoint has.

    Args:
        model: The module, on the meta device.
        shapes: Shapes by the module's own names; what is not named stays unchanged.
        width: Channels of normalizations without weights, whose sizes no tensor tells.

    Returns:
        The same module.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.ModuleList) and (count := count_blocks(shapes, name)):
            # What has no weights, such as dropout, is in no file.
            while len(module) > count and next(module[-1].parameters(), None) is not None:
                del module[-1]
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for key in list(module._parameters):
            shape = shapes.get(prefix + key)
            if shape is not None and module._parameters[key] is not None:
                empty = torch.empty(shape, device="meta")
                setattr(module, key, nn.Parameter(empty, requires_grad=False))
        _tell_sizes(module, width)
    return model


def _tell_sizes(module: nn.Module, width: int | None) -> None:
    """Set the attributes in which torch's layers keep their sizes."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, (nn.Conv2d, nn.Conv3d)):
        module.out_channels, module.in_channels = module.weight.shape[:2]
    elif isinstance(module, nn.GroupNorm) and module.weight is not None:
        module.num_channels = len(module.weight)
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, nn.LayerNorm):
        if module.weight is not None:
            module.normalized_shape = tuple(module.weight.shape)
        elif width is not None:
            module.normalized_shape = (width,)
