"""One convolution with adapters beside it."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autolora.fusion.kernels import native
from autolora.fusion.linear import (
    FusedLinear,
    fuse_gated,
    fuse_sum,
    linear_shape,
    working_dtype,
)
from autolora.fusion.packed import SumPlan


class FusedConv2d(FusedLinear):
    """A 2-D convolution plus low-rank adapters, summed or gated.

    An adapter's ``A [r, in * height * width]`` is a convolution of the base's own stride, padding
    and dilation, and ``B [out, r]`` a linear map of its ``r`` channels at every place. The gate
    sees the channels of every place as it sees those of a token. Everything else is as for
    `FusedLinear`.
    """

    @staticmethod
    def _shape_of(base: nn.Module) -> tuple[int, int] | None:
        shape = conv_shape(base)
        return None if shape is None else (shape[0], shape[1] * shape[2] * shape[3])

    @property
    def in_features(self) -> int:
        """Input channels of the base, times the size of its kernel."""
        return int(self.base.weight[0].numel())  # type: ignore[union-attr,index]

    @property
    def out_features(self) -> int:
        """Output channels of the base."""
        return self.base.out_channels  # type: ignore[return-value]

    def _native_layer(self) -> native.PreparedLayer | None:
        return None

    def _add_adapters(self, x: Tensor, y: Tensor, inplace: bool) -> Tensor:
        if torch.is_autocast_enabled(y.device.type):
            with torch.autocast(y.device.type, enabled=False):
                return self._add_adapters(x, y, inplace)
        terms = self._terms(y.dtype, y.device)
        dtype = working_dtype(y.dtype, y.device)
        record = self._recorder is not None
        last = y.movedim(-3, -1).contiguous()
        if terms is None:
            summed = self._packed.sum(dtype, y.device)
            h, unit = self._down(x, summed.down)
            fused, means = fuse_sum(last, h, SumPlan(unit, summed.up), False), None
        else:
            plan = self._packed.gated(dtype, y.device)
            h, unit = self._down(x, plan.down)
            fused, means = fuse_gated(last, h, replace(plan, down=unit), terms, record, False)
        if record:
            self._record(means)
        return fused.movedim(-1, -3).contiguous()

    def _down(self, x: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        """The down projections' outputs with channels last, and the identity to read them by."""
        base = self.base
        assert isinstance(base, nn.Conv2d)
        weight = down.unflatten(1, (base.in_channels, *base.kernel_size))
        h = F.conv2d(x.to(down.dtype), weight, None, base.stride, base.padding, base.dilation)
        return h.movedim(-3, -1), torch.eye(len(down), dtype=down.dtype, device=down.device)


def conv_shape(module: nn.Module) -> tuple[int, int, int, int] | None:
    """Return ``(out, in, height, width)`` of a plain 2-D convolution, None for another module."""
    if not isinstance(module, nn.Conv2d) or module.groups != 1 or module.padding_mode != "zeros":
        return None
    height, width = module.kernel_size
    return module.out_channels, module.in_channels, height, width


def weight_shape(module: nn.Module) -> tuple[int, ...] | None:
    """Return the weight's shape of a layer that adapters can act in, None for another module."""
    return linear_shape(module) or conv_shape(module)


def fused_type(base: nn.Module) -> type[FusedLinear]:
    """Return the class that puts adapters around a layer."""
    return FusedConv2d if conv_shape(base) is not None else FusedLinear
