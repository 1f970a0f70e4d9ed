"""Many LoRAs at once must be the same as one at a time, and leave the base alone."""

import pytest
import torch
from torch import nn

from autolora.errors import ConfigError
from train import lora_trainer
from train.lora_trainer import (
    BatchedLoRALinear,
    LoRAData,
    LoRATrainConfig,
    MultiLoRATrainer,
    target_layers,
)


@pytest.fixture(scope="module")
def dit():
    from autolora.families.tiny.model import TinyFluxConfig, TinyFluxDiT

    torch.manual_seed(0)
    config = TinyFluxConfig(
        width=32, heads=2, rope_axes=(4, 6, 6), double_blocks=1, single_blocks=1, text_length=4
    )
    model = TinyFluxDiT(config)
    model.init_weights()
    for parameter in model.parameters():  # zero modulations would hide the blocks
        parameter.data.add_(0.15 * torch.randn_like(parameter))
    return model.eval()


def _data(seed: int, count: int = 3) -> LoRAData:
    g = torch.Generator().manual_seed(seed)
    return LoRAData(
        2 + 0.1 * torch.randn(count, 16, 4, 4, generator=g),  # a mean that can be learned
        torch.randn(count, 2, 4, 384, generator=g),
        torch.randn(count, 2, 384, generator=g),
    )


EMPTY = (torch.zeros(4, 384), torch.zeros(384))


def test_batched_layer_equals_each_lora_alone():
    base = nn.Linear(6, 5)
    layer = BatchedLoRALinear(base, count=3, rank=2)
    layer.reset(torch.Generator().manual_seed(0))
    layer.up.data.normal_()
    x = torch.randn(6, 4, 6)  # three LoRAs, two samples of each, four tokens
    y = layer(x)
    for k in range(3):
        a, b = layer.factors(k)
        for row in (2 * k, 2 * k + 1):
            naive = x[row].double() @ (base.weight.double() + b.double() @ a.double()).T
            naive = naive + base.bias.double()
            torch.testing.assert_close(y[row].double(), naive, atol=1e-5, rtol=1e-5)


def test_batched_layer_takes_inputs_without_tokens():
    layer = BatchedLoRALinear(nn.Linear(6, 5), count=2, rank=2)
    assert layer(torch.randn(4, 6)).shape == (4, 5)


def test_training_lowers_the_loss_and_restores_the_model(dit):
    before = {k: v.clone() for k, v in dit.state_dict().items()}
    modules = dict(dit.named_modules())
    losses: list[float] = []
    config = LoRATrainConfig(steps=30, batch=4, lr=2e-2)
    with MultiLoRATrainer(dit, 2, config) as trainer:
        factors = trainer.train([_data(1), _data(2)], EMPTY, lambda _, loss: losses.append(loss))
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert dict(dit.named_modules()).keys() == modules.keys()
    assert all(dict(dit.named_modules())[n] is m for n, m in modules.items())
    for key, value in dit.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert len(factors) == 2
    for layer, (a, b) in factors[0].items():
        out_features, in_features = dit.get_submodule(layer).weight.shape
        assert a.shape == (4, in_features) and b.shape == (out_features, 4)
        assert b.abs().max() > 0, layer


def test_layers_are_unwrapped_after_an_error(dit):
    names = set(dict(dit.named_modules()))
    with pytest.raises(RuntimeError, match="stop"), MultiLoRATrainer(dit, 1, LoRATrainConfig()):
        raise RuntimeError("stop")
    assert set(dict(dit.named_modules())) == names


def test_number_of_data_sets_must_match(dit):
    with (
        MultiLoRATrainer(dit, 2, LoRATrainConfig(steps=1)) as trainer,
        pytest.raises(ValueError, match="1 data sets for 2"),
    ):
        trainer.train([_data(1)], EMPTY)


@pytest.mark.parametrize(("which", "count"), [("all", 13), ("no-modulation", 10), ("light", 8)])
def test_target_layers(dit, which, count):
    assert len(target_layers(dit, which)) == count


def test_impossible_settings_are_named_all_at_once():
    with pytest.raises(ConfigError) as caught:
        LoRATrainConfig(steps=0, rank=0, warmup=0, batch=0, lr=0, empty_prompts=2, layers="every")
    for words in ("steps", "rank", "warmup", "batch", "lr", "empty_prompts", "no-modulation"):
        assert words in str(caught.value)


def test_the_loss_is_zero_for_the_right_velocity_and_empty_prompts_are_empty(dit, monkeypatch):
    """Latents are all 2, so the noise, and with it ``noise - x0``, follows from what is given."""
    seen = {}

    def perfect(dit, noisy, sigmas, states, pooled):
        seen.update(states=states, pooled=pooled, sigmas=sigmas)
        s = sigmas.view(-1, 1, 1, 1)
        return (noisy - (1 - s) * 2) / s - 2

    monkeypatch.setattr(lora_trainer, "predict_velocity", perfect)
    data = LoRAData(torch.full((3, 16, 4, 4), 2.0), torch.ones(3, 2, 4, 384), torch.ones(3, 2, 384))
    empty = (torch.full((4, 384), 5.0), torch.full((384,), 6.0))
    for share, state, text in ((0.0, 1.0, 1.0), (1.0, 5.0, 6.0)):
        config = LoRATrainConfig(batch=8, empty_prompts=share)
        trainer = MultiLoRATrainer(dit, 1, config)
        g = torch.Generator().manual_seed(0)
        batch = lora_trainer._batch([data], config, empty, g)
        assert trainer._loss(batch, g, {}).item() < 1e-6
        assert bool((seen["states"] == state).all()) and bool((seen["pooled"] == text).all())
    assert len(seen["sigmas"].unique()) == 8


def test_the_learning_rate_warms_up_and_falls_to_zero():
    config = LoRATrainConfig(steps=100, warmup=10, lr=1.0)
    rates = [lora_trainer._learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] > 0.95
    assert rates[50] == pytest.approx(0.5) and rates[99] < 1e-3
