"""`torch.compile` around a model with adapters: no graph breaks, no recompilation, same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from autolora.errors import FusionError
from autolora.fusion import Capacity, FusedLinear, GateBank, attach, detach, reserve, switch
from tests.fusion.reference import (
    TinyModel,
    model_shapes,
    random_adapter,
    random_factors,
    random_gate,
)

IN, OUT = 12, 20


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Model(nn.Module):
    """Two fused layers, one gated and one summed, with something around them."""

    def __init__(self, capacity: Capacity | None = None, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        gate = random_gate(OUT, generator).requires_grad_(False)
        self.first = FusedLinear(nn.Linear(IN, OUT), (), gate, capacity=capacity)
        self.second = FusedLinear(nn.Linear(OUT, IN), (), None, capacity=capacity)
        self.requires_grad_(False)

    def exchange(self, ranks, strengths, seed) -> None:
        generator = torch.Generator().manual_seed(seed)
        names = [f"adapter{i}" for i in range(len(ranks))]
        self.first.set_adapters(names, random_factors(ranks, IN, OUT, generator), strengths)
        self.second.set_adapters(names, random_factors(ranks, OUT, IN, generator), strengths)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


# Adapters come and go, of other ranks, strengths and number, down to none and back.
SWITCHES = [
    ([4], [1.0]),
    ([4], [0.3]),
    ([4, 2], [1.0, -0.5]),
    ([4, 2], [1.0, 0.0]),
    ([16, 1, 7], [1.0, 0.5, 2.0]),
    ([], []),
    ([8, 8, 8], [0.5, 0.5, 0.5]),
    ([1], [-1.0]),
    ([0 + 16, 16], [1.0, 1.0]),
    ([3, 3], [0.0, 0.0]),
    ([5], [1.0]),
]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@torch.no_grad()
def test_exchanging_adapters_compiles_nothing_anew(backend):
    model = Model(Capacity(adapters=3, rank=16))
    model.exchange(*SWITCHES[0], seed=0)
    model(torch.randn(1, IN))  # makes the buffers
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    x = torch.randn(2, 5, IN)
    for seed, (ranks, strengths) in enumerate(SWITCHES):
        model.exchange(ranks, strengths, seed)
        plain = Model()
        plain.load_state_dict(model.state_dict())
        plain.exchange(ranks, strengths, seed)
        torch.testing.assert_close(compiled(x), plain(x), rtol=1e-5, atol=1e-5)
        assert counter.frame_count == 1, f"switch {seed} compiled again"


@torch.no_grad()
def test_strengths_compile_nothing_anew_without_a_capacity():
    model = Model()
    x = torch.randn(2, 5, IN)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    for seed, strength in enumerate([1.0, 0.2, -3.0]):
        model.exchange([4, 2], [1.0, strength], seed)
        for layer in (model.first, model.second):
            layer.prepare(torch.float32, torch.device("cpu"))
        expected = model(x)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


@torch.no_grad()
def test_prepare_stands_in_for_a_first_call():
    model = Model(Capacity(adapters=2, rank=8))
    model.exchange([4], [1.0], 0)
    for layer in (model.first, model.second):
        layer.prepare(torch.float32, torch.device("cpu"))
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(3, IN)
    before = compiled(x)
    model.exchange([8, 2], [1.0, 1.0], 1)
    assert not torch.allclose(compiled(x), before)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


@torch.no_grad()
def test_compiled_without_preparation_is_right_too():
    model = Model()
    model.exchange([4, 2], [1.0, 0.5], 0)
    x = torch.randn(3, IN)
    compiled = torch.compile(model, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, model(x), rtol=1e-5, atol=1e-5)


def test_a_compiled_gate_trains():
    model = Model()
    model.exchange([4, 2], [1.0, 0.5], 0)
    gate = model.first.gate
    assert gate is not None
    x = torch.randn(2, 5, IN)
    gradients = []
    for call in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        gate.requires_grad_(True).zero_grad(set_to_none=True)
        call(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in gate.parameters()])
    for ours, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, ours, rtol=1e-4, atol=1e-5)


def test_the_operators_pass_torchs_own_checks():
    from tests.fusion.test_native import layer

    y, h, ups, terms = layer([3, 5], 6, 11)
    vectors = [t.requires_grad_() for t in (terms.base_weight, terms.base_bias, terms.out)]
    arguments = (
        y.requires_grad_(), h.requires_grad_(), ups.centred.requires_grad_(),
        ups.mean.requires_grad_(), ups.covariance.requires_grad_(), ups.offsets, ups.strengths,
        vectors[0], vectors[1], terms.coef_weight, terms.coef_bias, vectors[2],
        ups.block, terms.eps_base, terms.eps_lora,
    )  # fmt: skip
    from autolora.fusion.kernels.dispatch import _fuse_op

    for record in (False, True):
        torch.library.opcheck(
            _fuse_op, (*arguments, record), test_utils=("test_schema", "test_faketensor")
        )
    torch.library.opcheck(_fuse_op, (*arguments, False), test_utils=("test_autograd_registration",))


@torch.no_grad()
def test_switching_in_a_compiled_model_with_room():
    torch.manual_seed(0)
    model = TinyModel()
    shapes = model_shapes(model)
    generator = torch.Generator().manual_seed(1)
    gates = GateBank({layer: random_gate(out, generator) for layer, (out, _) in shapes.items()})
    gates.requires_grad_(False)
    x, emb = torch.randn(2, 7, 16), torch.randn(2, 16)
    bare = model(x, emb)
    capacity = Capacity(adapters=3, rank=32)
    layers = reserve(model, capacity, torch.float32, torch.device("cpu"), "gated", gates)
    assert set(layers) == set(shapes)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(x, emb), bare)
    some = {layer: shape for layer, shape in shapes.items() if "norm" not in layer}
    adapters = [
        random_adapter("a", shapes, 4, 0),
        random_adapter("b", some, 32, 1),
        random_adapter("c", some, 2, 2),
    ]
    # The last exchanges move an adapter within the buffers, over the rows that it comes from.
    choices = [[0], [1], [0, 2], [2, 1, 0], [], [1, 2], [0, 1], [1], [2, 0, 1], [0, 1]]
    for chosen in choices:
        pairs = [(adapters[i], 0.5 + i) for i in chosen]
        switch(model, pairs, "gated", gates)
        torch.manual_seed(0)
        other = TinyModel()
        if pairs:
            attach(other, pairs, "gated", gates)
        torch.testing.assert_close(compiled(x, emb), other(x, emb), rtol=1e-4, atol=1e-5)
        assert counter.frame_count == 1
    assert detach(model) == len(shapes)
    assert torch.equal(model(x, emb), bare)


def test_room_is_only_made_in_a_bare_model():
    model = TinyModel()
    arguments = (Capacity(), torch.float32, torch.device("cpu"))
    with pytest.raises(FusionError, match="no linear layer"):
        reserve(model, *arguments, layers=lambda name: False)
    assert reserve(model, *arguments, layers=lambda name: "proj_out" in name) == (
        "single_blocks.0.proj_out",
        "single_blocks.1.proj_out",
    )
    with pytest.raises(FusionError, match="bare model"):
        reserve(model, *arguments)
    with pytest.raises(FusionError, match="bare model"):
        reserve(TinyModel(), *arguments, strategy="merged")


def test_adapters_beyond_the_capacity_are_refused_and_change_nothing():
    model = Model(Capacity(adapters=2, rank=16))
    model.exchange([4], [1.0], 0)
    x = torch.randn(3, IN)
    with torch.no_grad():
        before = model.first(x)
        for ranks in ([17], [2, 2, 2]):
            with pytest.raises(FusionError, match="do not fit into Capacity"):
                model.exchange(ranks, [1.0] * len(ranks), 1)
        assert model.first.names == ("adapter0",)
        assert torch.equal(model.first(x), before)
        model.exchange([16, 16], [1.0, 1.0], 1)
        model.exchange([2, 2], [1.0, 0.0], 1)


@pytest.mark.parametrize(
    "numbers", [{"adapters": 0}, {"rank": 0}, {"rank_sum": 0}, {"adapters": -1}]
)
def test_a_capacity_is_positive(numbers):
    with pytest.raises(ValueError, match="positive"):
        Capacity(**numbers)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_a_captured_graph_follows_an_exchange():
    from autolora.fusion.attach import capture

    model = Model(Capacity(adapters=3, rank=16)).cuda().to(torch.bfloat16)
    model.exchange([4], [1.0], 0)
    x = torch.randn(2, 5, IN, device="cuda", dtype=torch.bfloat16)
    captured = capture(model, x)
    for seed, (ranks, strengths) in enumerate(SWITCHES):
        model.exchange(ranks, strengths, seed)
        torch.testing.assert_close(captured(x), model(x))
