"""Adapters made ready beside other work, and captured graphs."""

from __future__ import annotations

import pytest
import torch

from autolora.errors import FusionError
from autolora.fusion.attach import capture, ready_beside
from autolora.fusion.linear import FusedLinear

CPU = torch.device("cpu")


def test_a_graph_needs_a_gpu():
    with pytest.raises(FusionError, match="CUDA device"):
        capture(torch.sin, torch.ones(2))
    with pytest.raises(FusionError, match="CUDA device"):
        capture(torch.sin)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_replayed_graph_takes_new_inputs():
    replay = capture(lambda a, b: a @ b, torch.ones(4, 4).cuda(), torch.ones(4, 4).cuda())
    a, b = torch.randn(4, 4).cuda(), torch.randn(4, 4).cuda()
    torch.testing.assert_close(replay(a, b), a @ b)
    with pytest.raises(FusionError, match="takes"):
        replay(a[:2], b)


def fused_layer(device: torch.device) -> torch.nn.Module:
    torch.manual_seed(0)
    factors = [(torch.randn(4, 32), torch.randn(16, 4)) for _ in range(3)]
    base = torch.nn.Linear(32, 16).to(device)
    return torch.nn.Sequential(FusedLinear(base, factors))


def test_layers_of_a_cpu_make_themselves_ready():
    ready_beside(fused_layer(CPU), torch.float32, CPU)()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_adapters_made_ready_beside_other_work_give_the_same():
    device = torch.device("cuda")
    x = torch.randn(7, 32, device=device)
    model = fused_layer(device)
    wait = ready_beside(model, torch.float32, device)
    (torch.randn(2000, 2000, device=device) @ torch.randn(2000, 2000, device=device)).sum()
    wait()
    assert torch.equal(model(x), fused_layer(device)(x))
