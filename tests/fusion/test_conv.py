"""Adapters beside convolutions, against merged weights and against unfolded linear layers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autolora.errors import FusionError
from autolora.fusion import FusedLinear, attach, detach, switch
from autolora.fusion.conv import FusedConv2d, fused_type
from autolora.fusion.gate import Gate
from autolora.fusion.merge import merge_, restore

GEOMETRY = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": (1, 3), "padding": "same"},
    {"kernel_size": 1},
]


def factors(base, rank, seed):
    random = torch.Generator().manual_seed(seed)
    size = base.weight[0].numel()
    return (
        torch.randn(rank, size, generator=random),
        torch.randn(base.out_channels, rank, generator=random),
    )


class Adapter:
    """An adapter of one convolution and one linear layer."""

    def __init__(self, name, model, seed):
        self.name, self.layers = name, ["conv", "linear"]
        linear = torch.Generator().manual_seed(seed + 100)
        self.pairs = {
            "conv": factors(model.conv, 3, seed),
            "linear": (torch.randn(2, 6, generator=linear), torch.randn(5, 2, generator=linear)),
        }

    def factors(self, layer):
        return self.pairs[layer]

    def shape(self, layer):
        return (6, 4, 3, 3) if layer == "conv" else (5, 6)


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = nn.Module()
    net.conv, net.linear = nn.Conv2d(4, 6, 3, padding=1), nn.Linear(6, 5)
    net.forward = lambda x: net.linear(net.conv(x).movedim(1, -1))
    return net.requires_grad_(False)


@pytest.mark.parametrize("geometry", GEOMETRY, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sum_is_the_convolution_of_the_changed_weight(geometry, dtype):
    torch.manual_seed(1)
    base = nn.Conv2d(4, 6, **geometry).to(dtype).requires_grad_(False)
    pairs, strengths = [factors(base, 3, 1), factors(base, 2, 2)], [0.5, -2.0]
    x = torch.randn(2, 4, 9, 8).to(dtype)
    change = sum(s * (b.double() @ a.double()) for s, (a, b) in zip(strengths, pairs, strict=True))
    weight = base.weight.double() + change.reshape(base.weight.shape)
    padding, stride, dilation = base.padding, base.stride, base.dilation
    wanted = F.conv2d(x.double(), weight, base.bias.double(), stride, padding, dilation)
    fused = FusedConv2d(base, pairs, None, strengths)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-6, torch.bfloat16: 2e-2}[dtype]
    for picture, truth in ((x, wanted), (x[0], wanted[0])):
        y = fused(picture)
        assert y.dtype == dtype and y.shape == truth.shape
        assert (y.double() - truth).norm() <= tolerance * truth.norm()


@pytest.mark.parametrize("geometry", GEOMETRY[:3], ids=str)
def test_gate_sees_channels_as_in_an_unfolded_linear_layer(geometry):
    torch.manual_seed(2)
    base = nn.Conv2d(4, 6, **geometry)
    pairs, strengths = [factors(base, 3, 1), factors(base, 2, 2)], [1.0, 0.7]
    gate = Gate(6)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.copy_(torch.randn_like(parameter))
    linear = nn.Linear(4 * 9, 6)
    linear.weight.data, linear.bias.data = base.weight.data.flatten(1), base.bias.data
    x = torch.randn(2, 4, 8, 6)
    options = {name: value for name, value in geometry.items() if name != "kernel_size"}
    patches = F.unfold(x, 3, **options).transpose(1, 2)
    wanted = FusedLinear(linear, pairs, gate, strengths)(patches).transpose(1, 2)
    y = FusedConv2d(base, pairs, gate, strengths)(x)
    assert (y.flatten(2) - wanted).norm() <= 1e-5 * wanted.norm()
    assert not torch.allclose(y, FusedConv2d(base, pairs, None, strengths)(x))


def test_attach_switch_and_detach(model):
    one, other = Adapter("one", model, 1), Adapter("other", model, 2)
    x = torch.randn(2, 4, 5, 5)
    conv, before = model.conv, model.forward(x)
    report = attach(model, [(one, 0.5)], "sum")
    assert report.layers == ("conv", "linear")
    assert isinstance(model.conv, FusedConv2d)
    first = model.forward(x)
    switch(model, [(other, 1.0)], "sum")
    assert not torch.equal(model.forward(x), first)
    switch(model, [(one, 0.5)], "sum")
    assert torch.equal(model.forward(x), first)
    assert detach(model) == 2
    assert model.conv is conv and torch.equal(model.forward(x), before)


def test_merged_is_the_same_and_restored_to_the_bit(model):
    one, x = Adapter("one", model, 1), torch.randn(2, 4, 5, 5)
    attach(model, [(one, 0.5)], "sum")
    summed = model.forward(x)
    detach(model)
    model.conv.weight.data = model.conv.weight.data.to(memory_format=torch.channels_last)
    weight = model.conv.weight.clone()
    merge_(model, [(one, 0.5)])
    assert (model.forward(x) - summed).norm() <= 1e-5 * summed.norm()
    restore(model)
    assert torch.equal(model.conv.weight, weight)


def test_gradients_reach_the_factors(model):
    pairs = [tuple(t.requires_grad_() for t in factors(model.conv, 3, 1))]
    FusedConv2d(model.conv, pairs)(torch.randn(1, 4, 5, 5)).sum().backward()
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in pairs[0])


def test_other_convolutions_are_left_alone(model):
    assert fused_type(nn.Conv2d(4, 4, 3, groups=2)) is FusedLinear
    for other in (nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, padding_mode="circular")):
        with pytest.raises(FusionError, match="not a linear"):
            FusedConv2d(other, [])
    with pytest.raises(FusionError, match="do not make a"):
        FusedConv2d(model.conv, [(torch.randn(2, 4), torch.randn(6, 2))])
    wrong = Adapter("wrong", model, 1)
    wrong.shape = lambda layer: (6, 4, 1, 1) if layer == "conv" else (5, 6)
    with pytest.raises(FusionError, match=r"\[6, 4, 3, 3\] here and \[6, 4, 1, 1\]"):
        attach(model, [(wrong, 1.0)], "sum")
    assert isinstance(model.conv, nn.Conv2d)
