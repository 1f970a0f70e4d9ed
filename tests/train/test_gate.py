"""Gate training: what is drawn, and that it teaches silence."""

import pytest
import torch
from torch import nn

from autolora.adapters import LoRA
from autolora.fusion import GateBank, attached
from train.gate import GateTrainConfig, Item, Sampler, gate_loss


def _item(*loras: str) -> Item:
    return Item(torch.zeros(2, 2, 2), torch.zeros(1, 3, 4), torch.zeros(1, 4), frozenset(loras))


def test_every_picture_of_a_batch_fits_the_attached_set():
    items = [_item("a"), _item("b"), _item("c"), _item("a", "b"), _item("c", "x")]
    config = GateTrainConfig(adapters_min=2, adapters_max=3, recipe_share=0.5, batch=8)
    sampler = Sampler(items, ["a", "b", "c"], config, seed=0)
    assert all("x" not in item.loras for item in sampler.items)
    seen_recipe = False
    for _ in range(50):
        names = sampler.draw_set()
        assert 2 <= len(names) == len(set(names)) <= 3
        batch, rivals = sampler.draw_batch(names)
        assert len(batch) == len(rivals) == 8
        for item, rival in zip(batch, rivals, strict=True):
            assert item.loras <= set(names) and rival.loras <= set(names)
            seen_recipe |= len(item.loras) == 2
    assert seen_recipe


@pytest.fixture(scope="module")
def dit() -> nn.Module:
    from autolora.flux.tiny.config import TinyFluxConfig
    from autolora.flux.tiny.dit import TinyFluxDiT

    torch.manual_seed(0)
    sizes = {"width": 32, "heads": 2, "rope_axes": (4, 6, 6), "text_length": 3}
    model = TinyFluxDiT(TinyFluxConfig(double_blocks=1, single_blocks=1, **sizes))
    model.init_weights()
    for parameter in model.parameters():
        parameter.data.add_(0.15 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def test_gates_learn_from_the_loss_and_leave_the_base_alone(dit):
    """From the plain sum on, the loss on fixed draws falls; only the gates change."""
    g = torch.Generator().manual_seed(0)
    layer = dit.get_submodule("single_blocks.0.proj_out")
    shape = layer.weight.shape
    adapter = LoRA.from_factors(
        "adapter",
        {
            "single_blocks.0.proj_out": (
                torch.randn(2, shape[1], generator=g),
                3 * torch.randn(shape[0], 2, generator=g),
            )
        },
    )
    config = GateTrainConfig(batch=4, weight=0.0, empty_prompts=0.0)
    latents = torch.randn(4, 16, 4, 4, generator=g)
    states, pooled = torch.randn(4, 1, 3, 384, generator=g), torch.randn(4, 1, 384, generator=g)
    items = [Item(latents[i], states[i], pooled[i], frozenset(("adapter",))) for i in range(4)]
    bank = GateBank.neutral({"single_blocks.0.proj_out": tuple(shape)})
    optimizer = torch.optim.Adam(bank.parameters(), lr=0.1)
    empty = (torch.zeros(3, 384), torch.zeros(384))

    def loss_of(strategy: str) -> torch.Tensor:
        draws = torch.Generator().manual_seed(1)
        with attached(dit, [(adapter, 1.0)], strategy=strategy, gates=bank):
            return gate_loss(dit, items, items, empty, config, draws)[0]

    plain, start = loss_of("sum").item(), loss_of("gated").item()
    assert start == pytest.approx(plain, rel=1e-2)  # untrained gates are the plain sum
    before = {key: value.clone() for key, value in dit.state_dict().items()}
    for _ in range(40):
        loss = loss_of("gated")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss_of("gated").item() < 0.95 * plain
    assert not bank["single_blocks.0.proj_out"].is_neutral()
    for key, value in dit.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_the_hinge_needs_a_bad_prediction_under_the_rivals_caption(dit):
    config = GateTrainConfig(batch=2, weight=1.0, margin=1e3, empty_prompts=0.0)
    g = torch.Generator().manual_seed(0)
    items = [
        Item(
            torch.randn(16, 4, 4, generator=g),
            torch.randn(1, 3, 384, generator=g),
            torch.randn(1, 384, generator=g),
            frozenset((name,)),
        )
        for name in ("a", "b")
    ]
    empty = (torch.zeros(3, 384), torch.zeros(384))
    draws = torch.Generator().manual_seed(2)
    own, hinge = gate_loss(dit, items, items[::-1], empty, config, draws)
    assert 0 < own.item() < 1e2 and hinge.item() > 9e2  # far below the margin
    low = GateTrainConfig(batch=2, weight=1.0, margin=0.0, empty_prompts=0.0)
    draws = torch.Generator().manual_seed(2)
    assert gate_loss(dit, items, items[::-1], empty, low, draws)[1].item() == 0
