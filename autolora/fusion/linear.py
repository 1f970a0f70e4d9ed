"""A linear layer with adapters beside it: the plain sum of their outputs, or the gated one.

Shapes: ``N`` adapters, ``R`` packed ranks, ``in`` and ``out`` channels. All adapters of a layer
share one down-projection (`autolora.fusion.packed`). The gated arithmetic is in
`autolora.fusion.kernels`, once per kind of device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autolora.errors import FusionError
from autolora.fusion.gate import Gate, GateTerms, Stamps, tensor_versions
from autolora.fusion.kernels import dispatch, native
from autolora.fusion.packed import Capacity, Factors, GatedPlan, PackedAdapters, SumPlan

Recorder = Callable[[Tensor], None]
"""Takes the mean of ``w_out * g_i`` over tokens and channels, ``[N]``."""


def working_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of the adapters' products beside a base output of this dtype.

    On a CPU products in float32 are both faster than in half precision and more exact; on a GPU
    half precision is kept.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if half and device.type == "cpu" else dtype


def fuse_sum(y: Tensor, x: Tensor, plan: SumPlan, inplace: bool = False) -> Tensor:
    """Add all adapters to the base output.

    Args:
        y: Base output, ``[..., out]``.
        x: The layer's input, ``[..., in]``.
        plan: The adapters.
        inplace: Whether ``y`` may be overwritten; not together with gradients.

    Returns:
        ``[..., out]`` in the dtype of ``y``.
    """
    hidden = F.linear(_rows(x, y.device, plan.down.dtype), plan.down)
    base = y.reshape(-1, y.shape[-1]).to(hidden.dtype)
    # A copy of ``y`` would cost as much as the product; it is spared where it may be.
    fused = base.addmm_(hidden, plan.up) if inplace else torch.addmm(base, hidden, plan.up)
    return fused.to(y.dtype).view(y.shape)


def fuse_gated(
    y: Tensor,
    x: Tensor,
    plan: GatedPlan,
    terms: GateTerms,
    record: bool = False,
    inplace: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Add all adapters through the gate to the base output.

    Args:
        y: Base output, ``[..., out]``.
        x: The layer's input, ``[..., in]``.
        plan: The adapters.
        terms: The gate, at least float32.
        record: Whether to return the mean gates.
        inplace: Whether ``y`` may be overwritten; ignored where gradients are wanted.

    Returns:
        ``[..., out]`` in the dtype of ``y``, and the mean of ``w_out * g_i`` over tokens and
        channels, ``[N]``, or None.
    """
    hidden = F.linear(_rows(x, y.device, plan.down.dtype), plan.down)
    base = y.reshape(-1, y.shape[-1])
    fused, means = dispatch.fuse(base, hidden, plan.ups, terms, record, inplace)
    return fused.view(y.shape), means


def _rows(x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return x.reshape(-1, x.shape[-1]).to(device=device, dtype=dtype)


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
        capacity: The most that the adapters may ever need. With one, adapters live in buffers of
            fixed size, so that an exchange neither compiles anything anew nor invalidates a
            captured graph; call `prepare` (or the layer) once before compiling. Without one,
            compiled code is only fast after a `prepare` that follows the last change.

    Raises:
        FusionError: A shape, a name or a strength does not fit.
    """

    names: tuple[str, ...]
    """The adapters' names, in order."""
    _factors: tuple[Factors, ...]
    _strengths: tuple[float, ...]
    _live: tuple[int, ...]
    _idle: bool
    _laid_out: tuple[Stamps, native.PreparedLayer | None] | None

    def __init__(
        self,
        base: nn.Module,
        factors: Sequence[Factors] = (),
        gate: Gate | None = None,
        strengths: Sequence[float] | None = None,
        names: Sequence[str] | None = None,
        capacity: Capacity | None = None,
    ) -> None:
        super().__init__()
        shape = self._shape_of(base)
        if shape is None or isinstance(base, FusedLinear):
            raise FusionError(f"can't put adapters around a {type(base).__name__}: not a linear")
        self.base = base
        self.train(base.training)
        if gate is not None and gate.out_features != shape[0]:
            raise FusionError(f"a gate for {gate.out_features} channels can't serve {shape[0]}")
        self.__dict__["_gate"] = gate  # past nn.Module's registration
        self._recorder: Recorder | None = None
        self._packed = PackedAdapters(shape[1], shape[0], capacity)
        self._ready_terms: tuple[torch.dtype, torch.device, GateTerms | None] | None = None
        names = tuple(map(str, range(len(factors)))) if names is None else names
        self.set_adapters(names, factors, strengths)

    @staticmethod
    def _shape_of(base: nn.Module) -> tuple[int, int] | None:
        return linear_shape(base)

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

    @property
    def factors(self) -> tuple[Factors, ...]:
        """``(A [r, in], B [out, r])`` of each adapter, in the order of ``names``."""
        return self._factors

    def set_adapters(
        self,
        names: Sequence[str],
        factors: Sequence[Factors],
        strengths: Sequence[float] | None = None,
    ) -> None:
        """Replace the adapters in place; base and gate stay.

        Args:
            names: One different name per adapter.
            factors: ``(A [r, in], B [out, r])`` per adapter; ranks may differ.
            strengths: One per adapter, 1 where None.

        Raises:
            FusionError: As for the constructor; nothing is changed then.
        """
        names = tuple(names)
        if len(names) != len(factors) or len(set(names)) != len(factors):
            raise FusionError(f"{len(factors)} adapters need as many different names: {names}")
        for name, (a, b) in zip(names, factors, strict=True):
            _check_factors(name, a, b, (self.out_features, self.in_features))
        values = _check_strengths(names, [1.0] * len(names) if strengths is None else strengths)
        self._take(names, tuple((a, b) for a, b in factors), values)

    @property
    def capacity(self) -> Capacity | None:
        """The declared most that the adapters may need, None if not declared."""
        return self._packed.capacity

    def set_strengths(self, strengths: Sequence[float]) -> None:
        """Change how strongly each adapter acts, in the order of ``names``.

        Raises:
            FusionError: Their number is wrong, or one is not finite.
        """
        self._take(self.names, self._factors, _check_strengths(self.names, strengths))

    def _take(
        self, names: tuple[str, ...], factors: tuple[Factors, ...], values: tuple[float, ...]
    ) -> None:
        live = tuple(i for i, value in enumerate(values) if value != 0)
        self._packed.set([factors[i] for i in live], [values[i] for i in live])
        # Past nn.Module's registration, which would be most of the cost of a switch.
        self.__dict__.update(
            names=names,
            _factors=factors,
            _strengths=values,
            _live=live,
            _idle=not live and self._packed.capacity is None,
            _laid_out=None,
        )

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Return the base's output with the adapters', ``[..., in] -> [..., out]``, its dtype."""
        # Past nn.Module's look-ups, here and below: in a small layer they cost as much as the sum.
        base = self._modules["base"]
        y: Tensor = base(x, *args, **kwargs)  # type: ignore[misc]
        if torch.compiler.is_compiling():
            # Compiled code must not depend on which adapters are live.
            return y if self._idle else self._add_adapters(x, y, False)
        if not self._live:
            if self._recorder is not None:
                self._record(None if self.gate is None else y.new_zeros(0, dtype=torch.float32))
            return y
        if torch.is_grad_enabled():
            return self._add_adapters(x, y, False)
        # In place is safe only if no hook can hold the base's output.
        inplace = isinstance(base, nn.Linear) and not base._forward_hooks
        layer = self._native_layer() if native.takes(y, x) else None
        if layer is None:
            return self._add_adapters(x, y, inplace)
        fused, means = layer(y, x, self._recorder is not None, inplace)
        if self._recorder is not None:
            self._record(means)
        return fused

    def prepare(self, dtype: torch.dtype, device: torch.device) -> None:
        """Make ready what the first call would make; call it before compiling or capturing.

        Args:
            dtype: Of the base's output.
            device: Of the base's output.
        """
        if self._idle:
            return
        if self._live and not torch.is_grad_enabled() and native.serves(dtype, device):
            self._native_layer()
        self._pack(dtype, device)

    def _pack(self, dtype: torch.dtype, device: torch.device) -> None:
        terms = self._terms(dtype, device)
        working = working_dtype(dtype, device)
        if terms is None:
            self._packed.sum(working, device)
        else:
            self._packed.gated(working, device)

    def _native_layer(self) -> native.PreparedLayer | None:
        """Return the layer laid out for the C kernel; None where the kernel cannot be used."""
        gate = self.gate
        tensors = self._packed.tensors if gate is None else (*self._packed.tensors, *gate.tensors())
        stamp = tensor_versions(tensors)
        kept = self._laid_out
        if kept is None or kept[0] != stamp:
            kept = self._laid_out = (stamp, self._lay_out())
        return kept[1]

    def _lay_out(self) -> native.PreparedLayer | None:
        with torch.autocast("cpu", enabled=False):
            dtype, device = torch.float32, torch.device("cpu")
            if self._packed.capacity is not None:
                self._pack(dtype, device)  # compiled code looks into the buffers
            terms = self._terms(dtype, device)
            return native.prepare_adapters(self._packed.factors, self._packed.strengths, terms)

    def _add_adapters(self, x: Tensor, y: Tensor, inplace: bool) -> Tensor:
        # The dtypes are chosen here; autocast would choose them per operation.
        if torch.is_autocast_enabled(y.device.type):
            with torch.autocast(y.device.type, enabled=False):
                return self._add_adapters(x, y, inplace)
        terms = self._terms(y.dtype, y.device)
        dtype = working_dtype(y.dtype, y.device)
        record = self._recorder is not None
        if terms is None:
            fused = fuse_sum(y, x, self._packed.sum(dtype, y.device), inplace)
            means = None
        else:
            plan = self._packed.gated(dtype, y.device)
            fused, means = fuse_gated(y, x, plan, terms, record, inplace)
        if record:
            self._record(means)
        return fused

    def _terms(self, dtype: torch.dtype, device: torch.device) -> GateTerms | None:
        """Return the gate's terms for this base output; None is the plain sum."""
        gate = self.gate
        if gate is None:
            return None
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        kept = self._ready_terms
        if not torch.compiler.is_compiling():
            terms = gate.terms(wide, device)
            if gate.trains:
                self._ready_terms = None
            elif kept is None or kept[0] is not wide or kept[1] != device or kept[2] is not terms:
                self._ready_terms = (wide, device, terms)
            return terms
        # Which gate is the plain sum can't be decided in compiled code, only before.
        if gate.trains or kept is None or kept[:2] != (wide, device):
            return gate.make_terms(wide, device)
        return kept[2]

    def _record(self, means: Tensor | None) -> None:
        """Pass on the live adapters' gates, 1 for a sum; an adapter of strength 0 says nothing."""
        assert self._recorder is not None
        live = torch.ones(len(self._live)) if means is None else means[: len(self._live)]
        if len(live) < len(self.names):
            all_means = live.new_zeros(len(self.names))
            all_means[list(self._live)] = live
            live = all_means
        self._recorder(live)

    def __getstate__(self) -> dict[str, object]:
        # Addresses are of no use to a copy.
        return {**self.__dict__, "_laid_out": None}

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


def finite_strength(name: str, strength: object) -> float:
    """Return an adapter's strength as a number that float32 can hold.

    Raises:
        FusionError: It is no such number.
    """
    real = isinstance(strength, Real)
    try:
        value = float(strength) if real else math.nan  # type: ignore[arg-type]
    except OverflowError:  # a whole number beyond the largest float
        value = math.inf
    if not abs(value) <= torch.finfo(torch.float32).max:
        said = value if real else f"{strength!r:.40}"
        raise FusionError(f"strength {said} of adapter {name} is not a finite number")
    return value


def _check_strengths(names: Sequence[str], strengths: Sequence[float]) -> tuple[float, ...]:
    if len(strengths) != len(names):
        raise FusionError(f"{len(names)} adapters need as many strengths, not {len(strengths)}")
    return tuple(finite_strength(n, s) for n, s in zip(names, strengths, strict=True))
