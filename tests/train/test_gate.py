"""Gate training: what is drawn, and that it teaches silence."""

import pytest
import torch
from torch import nn

from autolora.errors import ConfigError
from autolora.fusion import GateBank, attached
from autolora.lora import LoRA
from train.gate import (
    GateTrainConfig,
    Item,
    Sampler,
    average_gradients,
    gate_loss,
    split_names,
)


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


def test_the_fullest_pictures_are_drawn_as_often_as_asked_and_rivals_share_nothing():
    items = [_item("a"), _item("b"), _item("c"), _item("a", "b")]
    batches = {}
    for share in (0.0, 1.0):
        config = GateTrainConfig(fullest_share=share, batch=400)
        sampler = Sampler(items, ["a", "b", "c"], config, seed=0)
        batches[share], rivals = sampler.draw_batch(["a", "b", "c"])
        for item, rival in zip(batches[share], rivals, strict=True):
            assert not item.loras & rival.loras
    full = {share: sum(len(i.loras) == 2 for i in batch) for share, batch in batches.items()}
    assert full[1.0] == 400 and 60 < full[0.0] < 140  # one of four groups
    alone = Sampler(items, ["a"], GateTrainConfig(batch=2), seed=0)
    assert [i.loras for i in alone.draw_batch(["a"])[1]] == [frozenset("a")] * 2


@pytest.fixture(scope="module")
def dit() -> nn.Module:
    from autolora.families.tiny.model import TinyFluxConfig, TinyFluxDiT

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


def test_too_few_loras_are_named_and_parts_share_none():
    config = GateTrainConfig(adapters_max=3, held_out=0.1)
    names = [f"lora-{i}" for i in range(40)]
    train, held = split_names(names, config)
    assert sorted(train + held) == sorted(names) and len(held) == 4
    assert split_names(names, config) == (train, held)
    assert [len(part) for part in split_names(names[:6], config)] == [3, 3]
    with pytest.raises(ConfigError, match=r"5 LoRAs with covers are too few to attach 3"):
        split_names(names[:5], config)


def test_impossible_settings_are_named_all_at_once():
    with pytest.raises(ConfigError) as caught:
        GateTrainConfig(steps=0, batch=0, adapters_min=4, held_out=2, size=100)
    for words in ("steps", "batch", "adapters_max 3", "held_out", "multiple of 16"):
        assert words in str(caught.value)


def test_gradients_are_averaged_over_processes():
    class Three:
        num_processes = 3

        def reduce(self, tensor: torch.Tensor, how: str) -> torch.Tensor:
            assert how == "mean"
            return tensor + 1

    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))]
    parameters[0].grad = torch.full((2,), 5.0)
    average_gradients(Three(), parameters)
    assert [p.grad.tolist() for p in parameters] == [[6, 6], [1, 1]]  # the second had none


def test_guidance_is_given_to_models_that_take_it(dit, monkeypatch):
    from train import gate

    monkeypatch.setattr(gate, "guidance_input", lambda dit, n, device: {"guidance": torch.ones(n)})
    seen = {}
    monkeypatch.setattr(
        gate,
        "predict_velocity",
        lambda dit, noisy, *_, **extra: seen.update(extra) or torch.zeros_like(noisy),
    )
    item = Item(torch.zeros(16, 4, 4), torch.zeros(1, 3, 384), torch.zeros(1, 384), frozenset("a"))
    config = GateTrainConfig(batch=4, weight=1.0)
    empty = (torch.zeros(3, 384), torch.zeros(384))
    gate.gate_loss(dit, [item] * 4, [item] * 4, empty, config, torch.Generator().manual_seed(0))
    assert seen["guidance"].shape == (6,)  # four samples and the two under a rival's caption


def test_the_loss_is_zero_for_the_right_velocity_and_empty_prompts_are_empty(dit, monkeypatch):
    """Latents are all 2, so the noise, and with it ``noise - x0``, follows from what is given."""
    from train import gate

    seen = {}

    def perfect(dit, noisy, sigmas, states, pooled):
        seen.update(states=states, pooled=pooled, sigmas=sigmas)
        s = sigmas.view(-1, 1, 1, 1)
        return (noisy - (1 - s) * 2) / s - 2

    monkeypatch.setattr(gate, "predict_velocity", perfect)
    item = Item(torch.full((16, 4, 4), 2.0), torch.ones(1, 3, 384), torch.ones(1, 384), frozenset())
    empty = (torch.full((3, 384), 5.0), torch.full((384,), 6.0))
    for share, state, text in ((0.0, 1.0, 1.0), (1.0, 5.0, 6.0)):
        config = GateTrainConfig(batch=8, weight=0.0, empty_prompts=share)
        draws = torch.Generator().manual_seed(0)
        own, hinge = gate.gate_loss(dit, [item] * 8, [item] * 8, empty, config, draws)
        assert own.item() < 1e-6 and hinge.item() == 0
        assert bool((seen["states"] == state).all()) and bool((seen["pooled"] == text).all())
    assert len(seen["sigmas"].unique()) == 8
