"""One linear layer with adapters around it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from autolora.errors import FusionError
from autolora.fusion import arithmetic
from autolora.fusion.arithmetic import Factors, GatedPlan, Recorder, SumPlan
from autolora.fusion.gate import Gate, tensor_version

Plan = TypeVar("Plan", SumPlan, GatedPlan)


class FusedLinear(nn.Module):
    """A base layer plus low-rank adapters, summed or gated.

    The base may be any module with ``in_features`` and ``out_features``: it is only ever called,
    so quantized and offloaded layers work, and its weight is neither read nor written. The gate
    and the factors belong to their owners (`GateBank`, the adapters) and are not registered as
    children: moving, casting or freezing the model leaves them alone. They follow the device of
    the base's output; copies for it are cached until a strength, a factor or the gate changes.

    Args:
        base: The layer that the adapters are added to.
        factors: ``(A [r, in], B [out, r])`` per adapter; ranks may differ.
        gate: The layer's gate; None is the plain sum.
        strengths: One factor per adapter on its output, 1 where None. An adapter of strength 0
            costs nothing.
        names: The adapters' names; numbered where None.

    Raises:
        FusionError: A shape, a name or a strength does not fit.
    """

    def __init__(
        self,
        base: nn.Module,
        factors: Sequence[Factors] = (),
        gate: Gate | None = None,
        strengths: Sequence[float] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        shape = linear_shape(base)
        if shape is None or isinstance(base, FusedLinear):
            raise FusionError(f"can't put adapters around a {type(base).__name__}: not a linear")
        self.base = base
        self.train(base.training)
        self.names = tuple(names) if names is not None else tuple(map(str, range(len(factors))))
        if len(self.names) != len(factors) or len(set(self.names)) != len(factors):
            raise FusionError(f"{len(factors)} adapters need as many different names: {self.names}")
        for name, (a, b) in zip(self.names, factors, strict=True):
            _check_factors(name, a, b, shape)
        if gate is not None and gate.out_features != shape[0]:
            raise FusionError(f"a gate for {gate.out_features} channels can't serve {shape[0]}")
        self._factors = tuple(factors)
        self.__dict__["_gate"] = gate  # past nn.Module's registration
        self._recorder: Recorder | None = None
        self.set_strengths([1.0] * len(factors) if strengths is None else strengths)

    @property
    def in_features(self) -> int:
        """Input channels of the base."""
        return self.base.in_features  # type: ignore[return-value]

    @property
    def out_features(self) -> int:
        """Output channels of the base."""
        return self.base.out_features  # type: ignore[return-value]

    @property
    def weight(self) -> Tensor:
        """The base's own weight, for code that looks at a layer's device or dtype."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base's own bias."""
        return self.base.bias  # type: ignore[return-value]

    @property
    def gate(self) -> Gate | None:
        """The layer's gate; None is the plain sum."""
        return self.__dict__["_gate"]

    @property
    def strengths(self) -> tuple[float, ...]:
        """The factor on each adapter's output, in the order of ``names``."""
        return self._strengths

    def set_strengths(self, strengths: Sequence[float]) -> None:
        """Change how strongly each adapter acts, in the order of ``names``.

        Raises:
            FusionError: Their number is wrong, or one is not finite.
        """
        values = tuple(float(s) for s in strengths)
        if len(values) != len(self.names):
            raise FusionError(f"{len(self.names)} adapters need as many strengths, not {values}")
        for name, value in zip(self.names, values, strict=True):
            if not math.isfinite(value):
                raise FusionError(f"strength {value} of adapter {name} is not a finite number")
        self._strengths = values
        live = [i for i, value in enumerate(values) if value != 0]
        self._live = tuple(live)
        self._live_factors = tuple(self._factors[i] for i in live)
        self._live_strengths = tuple(values[i] for i in live)
        self._cache: tuple[tuple[object, ...], Any] | None = None

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Return the base's output with the adapters', ``[..., in] -> [..., out]``, its dtype."""
        y: Tensor = self.base(x, *args, **kwargs)
        if not self._live:
            return y
        # The dtypes are chosen here; autocast would choose them per operation.
        if torch.is_autocast_enabled(y.device.type):
            with torch.autocast(y.device.type, enabled=False):
                return self._add_adapters(x, y)
        return self._add_adapters(x, y)

    def _add_adapters(self, x: Tensor, y: Tensor) -> Tensor:
        dtype = arithmetic.working_dtype(y)
        rows = x.reshape(-1, x.shape[-1]).to(device=y.device, dtype=dtype)
        base = y.reshape(-1, y.shape[-1])
        gate = self.gate
        terms = None if gate is None else gate.terms(dtype, y.device)
        if gate is None or terms is None:
            fused = arithmetic.fuse_sum(base, rows, self._sum_plan(dtype, y.device))
            if self._recorder is not None:
                self._record(torch.ones(len(self._live)))
        else:
            plan = self._gated_plan(dtype, y.device)
            differentiable = torch.is_grad_enabled() and (
                y.requires_grad or x.requires_grad or gate.trains or self._factors_train()
            )
            record = None if self._recorder is None else self._record
            fused = arithmetic.fuse_gated(base, rows, plan, terms, differentiable, record)
        return fused.view(y.shape)

    def _sum_plan(self, dtype: torch.dtype, device: torch.device) -> SumPlan:
        return self._cached(arithmetic.make_sum_plan, dtype, device)

    def _gated_plan(self, dtype: torch.dtype, device: torch.device) -> GatedPlan:
        return self._cached(arithmetic.make_gated_plan, dtype, device)

    def _cached(self, make: Callable[..., Plan], dtype: torch.dtype, device: torch.device) -> Plan:
        if torch.is_grad_enabled() and self._factors_train():
            return make(self._live_factors, self._live_strengths, dtype, device)
        stamps = tuple(tensor_version(t) for pair in self._live_factors for t in pair)
        key = (make, dtype, device, stamps)
        if self._cache is None or self._cache[0] != key:
            # A plan made under inference_mode must still serve a later training step.
            with torch.inference_mode(False), torch.no_grad():
                plan = make(self._live_factors, self._live_strengths, dtype, device)
            self._cache = (key, plan)
        return self._cache[1]

    def _factors_train(self) -> bool:
        return any(a.requires_grad or b.requires_grad for a, b in self._live_factors)

    def _record(self, means: Tensor) -> None:
        """Pass on the live adapters' gates; an adapter of strength 0 says nothing."""
        assert self._recorder is not None
        all_means = torch.zeros(len(self.names), device=means.device)
        all_means[list(self._live)] = means
        self._recorder(all_means)

    def extra_repr(self) -> str:
        """Describe the adapters for ``print(model)``."""
        kind = "sum" if self.gate is None else "gated"
        parts = zip(self.names, self._strengths, self._factors, strict=True)
        return f"{kind}, " + ", ".join(f"{n}:{s:g} (rank {a.shape[0]})" for n, s, (a, _) in parts)


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return ``(out, in)`` of a linear layer of any make, None for another module."""
    shape = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    if all(isinstance(n, int) for n in shape):
        return shape  # type: ignore[return-value]
    return None


def _check_factors(name: str, a: Tensor, b: Tensor, shape: tuple[int, int]) -> None:
    fits = a.dim() == 2 and b.dim() == 2 and a.shape[0] == b.shape[1] >= 1
    if not fits or (b.shape[0], a.shape[1]) != shape:
        raise FusionError(
            f"factors A {list(a.shape)} and B {list(b.shape)} of adapter {name} do not make a "
            f"{list(shape)} weight; it was made for another model"
        )
