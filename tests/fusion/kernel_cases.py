"""What the tests of the kernels compute: errors against the equation in float64, as plain numbers.

    TRITON_INTERPRET=1 python -m tests.fusion.kernel_cases

runs the Triton kernels as Python on the CPU, which has to be decided before Triton is imported,
and prints the errors as JSON.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autolora.fusion import Gate
from autolora.fusion.kernels import dispatch, plain
from autolora.fusion.packed import (
    Capacity,
    empty_gated_plan,
    fill_gated_plan,
    make_gated_plan,
    prepare_factors,
)
from tests.fusion.reference import double, double_factors, gated_sum, random_factors
from tests.fusion.reference import random_gate_tensors as random_tensors

CPU = torch.device("cpu")

# tokens, in, out, ranks, strengths
SMALL = [
    (1, 8, 40, [4], [1.0]),
    (5, 12, 70, [4, 20], [1.0, -0.5]),
    (37, 12, 130, [16, 3, 33], [0.7, 1.0, -1.2]),
    (3, 24, 64, [2] * 16, [0.25] * 16),
    (2, 40, 50, [128, 16], [1.0, 1.0]),
]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# What is run through the interpreter, which is slow.
FORWARD = [
    *(("float32", number) for number in range(len(SMALL))),
    *((name, number) for name in ("float16", "bfloat16") for number in (1, 2)),
]
BACKWARD = [("float32", 1), ("float32", 2), ("float32", 4), ("float16", 1)]


class Layer:
    """One layer's tensors on a device, its truth in float64, and the naive form in its dtype."""

    def __init__(self, case: Any, dtype: torch.dtype, device: str = "cpu") -> None:
        tokens, in_features, out_features, ranks, self.strengths = case
        generator = torch.Generator().manual_seed(tokens + out_features)
        self.factors = random_factors(ranks, in_features, out_features, generator)
        self.tensors = random_tensors(out_features, generator)
        self.x = torch.randn(tokens, in_features, generator=generator).to(dtype)
        self.y = torch.randn(tokens, out_features, generator=generator).to(dtype)
        self.grad = torch.randn(tokens, out_features, generator=generator).to(dtype)
        self.dtype, self.device = dtype, torch.device(device)

    def ours(
        self, y: Tensor, x: Tensor, factors: Any, gate: Gate, record: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Fuse through the kernels; differentiable."""
        prepared = [prepare_factors(a, b, self.dtype, self.device) for a, b in factors]
        plan = make_gated_plan(prepared, self.strengths, 16)
        terms = gate.terms(torch.float32, self.device)
        assert terms is not None
        return dispatch.fuse(y, F.linear(x, plan.down), plan.ups, terms, record)

    def on_device(self) -> tuple[Tensor, Tensor]:
        return self.y.to(self.device), self.x.to(self.device)

    def truth(self) -> Tensor:
        args = (double_factors(self.factors), self.strengths, double(self.tensors))
        return gated_sum(self.y.double(), self.x.double(), *args)

    def naive(self) -> Tensor:
        factors = [(a.to(self.dtype), b.to(self.dtype)) for a, b in self.factors]
        tensors = {name: tensor.to(self.dtype) for name, tensor in self.tensors.items()}
        return gated_sum(self.y, self.x, factors, self.strengths, tensors)

    def gradients(self, naive_dtype: torch.dtype | None) -> list[Tensor]:
        """Gradients of y, x, the factors and the gate; ours where ``naive_dtype`` is None."""
        dtype = naive_dtype or self.dtype
        wide = naive_dtype or torch.float32
        device = torch.device("cpu") if naive_dtype else self.device
        y, x = (t.detach().to(device, dtype).requires_grad_() for t in (self.y, self.x))
        factors = [
            tuple(t.detach().to(device, wide).requires_grad_() for t in pair)
            for pair in self.factors
        ]
        if naive_dtype:
            tensors = {n: t.to(dtype).requires_grad_() for n, t in self.tensors.items()}
            parameters = [tensors[name] for name in sorted(tensors)]
            out = gated_sum(y, x, factors, self.strengths, tensors)
        else:
            gate = Gate.from_diffsynth(self.tensors).to(device)
            parameters = [p for _, p in sorted(gate.named_parameters())]
            out, _ = self.ours(y, x, factors, gate)
        inputs = [y, x, *(t for pair in factors for t in pair), *parameters]
        return list(torch.autograd.grad(out, inputs, self.grad.to(device, dtype)))


def relative(actual: Tensor, truth: Tensor) -> float:
    """Size of the difference over the size of the truth."""
    return float((actual.detach().cpu().double() - truth).norm() / truth.norm())


def forward_errors(case: Any, dtype: torch.dtype, device: str = "cpu") -> dict[str, float]:
    """Errors of the fused output, of the naive form, and of the recorded means."""
    layer = Layer(case, dtype, device)
    gate = Gate.from_diffsynth(layer.tensors).to(device).requires_grad_(False)
    y, x = layer.on_device()
    kept = y.clone()
    with torch.no_grad():
        fused, _ = layer.ours(y, x, layer.factors, gate)
        again, means = layer.ours(y, x, layer.factors, gate, record=True)
    assert torch.equal(y, kept) and torch.equal(fused, again) and means is not None
    truth = layer.truth()
    return {
        "ours": relative(fused, truth),
        "naive": relative(layer.naive(), truth),
        "means": float((means.cpu() - mean_gates(layer)).abs().max()),
    }


def mean_gates(layer: Layer) -> Tensor:
    """The mean of ``w_out * g_i`` over tokens and channels, by the gate's own modules."""
    gate = Gate.from_diffsynth(layer.tensors).double().requires_grad_(False)
    base = gate.norm_base(layer.y.double())
    means = []
    for (a, b), strength in zip(double_factors(layer.factors), layer.strengths, strict=True):
        lora = gate.norm_lora(strength * layer.x.double() @ a.T @ b.T)
        argument = base * gate.weight_base + lora * gate.weight_lora + gate.bias
        said = gate.weight_out * torch.sigmoid(argument + base * lora * gate.weight_cross)
        means.append(said.mean())
    return torch.stack(means).float()


def gradient_errors(case: Any, dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
    """Errors of our gradients, and of autograd of the naive form; whether ours repeat exactly."""
    layer = Layer(case, dtype, device)
    truth, ours, again = (layer.gradients(d) for d in (torch.float64, None, None))
    return {
        "ours": [relative(g, t) for g, t in zip(ours, truth, strict=True)],
        "naive": [relative(g, t) for g, t in zip(layer.gradients(dtype), truth, strict=True)],
        "repeats": all(torch.equal(a, b) for a, b in zip(ours, again, strict=True)),
    }


def unused_places() -> float:
    """Largest difference between buffers with unused rows and places, and a plan that is full.

    Everything is compared that the launches return, for a ``h`` whose rows lie apart.
    """
    from autolora.fusion.kernels import triton

    layer = Layer(SMALL[1], torch.float32)
    prepared = [prepare_factors(a, b, torch.float32, layer.device) for a, b in layer.factors]
    full = make_gated_plan(prepared, layer.strengths, 16)
    roomy = empty_gated_plan(Capacity(4, 32), 12, 70, torch.float32, layer.device)
    fill_gated_plan(roomy, full)
    terms = Gate.from_diffsynth(layer.tensors).requires_grad_(False).terms(torch.float32, CPU)
    results = []
    for plan in (full, roomy):
        rows, hidden = plan.down.shape[0], F.linear(layer.x, plan.down)
        apart = torch.full((hidden.shape[0], rows + 5), 1e9)[:, :rows].copy_(hidden)
        fused, means = triton.forward(layer.y, apart, plan.ups, terms, record=True)
        gradients = triton.backward(layer.grad, layer.y, apart, plan.ups, terms, True)
        used = full.down.shape[0]
        results.append([fused, means[:2], gradients.y, gradients.h[:, :used], gradients.terms])
        results[-1] += [gradients.centred[:used], gradients.mean[:used]]
        results[-1] += [gradients.covariance[:used, :32], means[2:].abs().sum()]
        results[-1] += [gradients.h[:, used:].abs().sum(), gradients.centred[used:].abs().sum()]
    # Of a tensor, whose largest is NaN where one is.
    return float(torch.stack([(a - b).abs().max() for a, b in zip(*results, strict=True)]).max())


def equal_channels() -> float:
    """Largest error in half precision where an adapter's output is the same in all channels."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 8, generator=generator), torch.ones(40, 2)
    plan = make_gated_plan([prepare_factors(a, b, torch.float16, CPU)], [1.0], 16)
    gate = Gate.from_diffsynth(random_tensors(40, generator)).requires_grad_(False)
    terms = gate.terms(torch.float32, CPU)
    h = 100 * torch.randn(5, 8, generator=generator) @ plan.down.float().T
    y = torch.randn(5, 40, generator=generator).half()
    fused, _ = dispatch._forward(y, h.half(), plan.ups, terms, False, False)
    return float((fused - plain.forward(y, h.half(), plan.ups, terms)[0]).abs().max())


def interpreted() -> dict[str, Any]:
    """Every small case through the interpreted Triton kernels."""
    from autolora.fusion.kernels import triton

    torch.use_deterministic_algorithms(True)  # which also fills new memory with NaN
    dispatch._forward = triton.forward  # type: ignore[assignment]
    dispatch._backward = triton.backward
    results: dict[str, Any] = {}
    for name, number in FORWARD:
        results[f"forward {name} {number}"] = forward_errors(SMALL[number], DTYPES[name])
    for name, number in BACKWARD:
        results[f"backward {name} {number}"] = gradient_errors(SMALL[number], DTYPES[name])
    results["unused places"] = unused_places()
    results["equal channels"] = equal_channels()
    return results


if __name__ == "__main__":
    print(json.dumps(interpreted()))
