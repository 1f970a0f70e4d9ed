"""The base model's training: the bank, the relay, widening, resuming."""

import pytest
import torch
from safetensors.torch import save_file

from autolora.errors import ConfigError
from autolora.families.tiny.model import TinyFluxConfig, TinyFluxDiT
from train.flow import predict_velocity
from train.tiny_world.bank import Bank, shard_path
from train.tiny_world.base import Average, BaseConfig, averaged_weights, rate_share, train_base
from train.tiny_world.relay import load_relay, save_relay
from train.tiny_world.widen import widen

SMALL = TinyFluxConfig(
    width=16, heads=1, rope_axes=(4, 6, 6), double_blocks=1, single_blocks=1, text_length=4, size=32
)


def write_shard(folder, number, value, pictures=6):
    """A shard whose numbers say where they come from."""
    import json

    states = torch.full((3, 4, 384), float(value)).bfloat16()
    states[0] = 0
    tensors = {
        "latents": torch.full((pictures, 16, 4, 4), float(value)).bfloat16(),
        "rows": torch.tensor([[1, 2, 1]] * pictures, dtype=torch.int32),
        "states": states,
        "pooled": states[:, 0].contiguous(),
    }
    folder.mkdir(exist_ok=True)
    metadata = {"captions": json.dumps(["", "a", "b"])}
    save_file(tensors, str(shard_path(folder, number)), metadata=metadata)


@pytest.fixture
def model():
    torch.manual_seed(0)
    dit = TinyFluxDiT(SMALL)
    dit.init_weights()
    for parameter in dit.parameters():  # away from the zeros that training starts from
        torch.nn.init.normal_(parameter, std=0.1)
    return dit


def test_a_sample_keeps_pictures_and_captions_together(tmp_path):
    write_shard(tmp_path, 0, 1)
    bank = Bank(tmp_path)
    write_shard(tmp_path, 1, 2)
    assert bank.refresh() == 2
    latents, states, pooled = bank.sample(200, 0.3, torch.Generator().manual_seed(0))
    shard = latents[:, 0, 0, 0]
    said = states[:, 0, 0].float()
    assert {1.0, 2.0} == set(shard.tolist())
    empty = said == 0
    assert 0.2 < empty.float().mean() < 0.4
    assert torch.equal(said[~empty], shard[~empty]) and torch.equal(pooled[:, 0].float(), said)


def test_an_empty_or_damaged_bank_says_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match="stage `bank`"):
        Bank(tmp_path)
    shard_path(tmp_path, 0).write_bytes(b"half")
    with pytest.raises(ConfigError, match="delete it"):
        Bank(tmp_path)


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path, model):
    """Two legs of 3 steps and one of 6 end in the same weights, moments and average."""
    write_shard(tmp_path / "bank", 0, 0.5)
    bank = Bank(tmp_path / "bank")
    start = {k: v.clone() for k, v in model.state_dict().items()}

    def run(folder, legs):
        for steps in legs:
            model.load_state_dict(start)
            model.requires_grad_(True)
            config = BaseConfig(steps=steps, batch=4, warmup=2, compile=False)
            train_base(config, model, bank, folder)
        return averaged_weights(folder)

    whole, step = run(tmp_path / "whole", [6])
    assert step == 6
    relayed, step = run(tmp_path / "legs", [3, 6])
    assert step == 6 and set(whole) == set(relayed)
    moved = [n for n in whole if not torch.equal(whole[n], start[n])]
    assert len(moved) > 20
    for name in whole:
        torch.testing.assert_close(relayed[name], whole[name], rtol=1e-5, atol=1e-7)


def test_the_average_is_the_mean_early_and_slow_later(model):
    average = Average(model, decay=0.9)
    first = next(iter(average.weights))
    with torch.no_grad():
        value = model.state_dict()[first].clone()
        expected = value.clone()
        for n in range(1, 40):
            for parameter in model.parameters():
                parameter.add_(1.0)
            average.update(model)
            keep = min(0.9, (1 + n) / (10 + n))
            expected = keep * expected + (1 - keep) * (value + n)
    torch.testing.assert_close(average.weights[first], expected)


def test_the_rate_warms_up_stays_and_falls_to_zero():
    config = BaseConfig(steps=100, warmup=10, decay_from=60)
    assert rate_share(0, config) == pytest.approx(0.1)
    assert rate_share(30, config) == rate_share(60, config) == 1
    assert rate_share(80, config) == pytest.approx(0.5)
    assert rate_share(99, BaseConfig(steps=100, warmup=10)) == 1


def test_a_relay_keeps_the_function(tmp_path, model):
    path = tmp_path / "relay.safetensors"
    save_relay(path, SMALL, model.state_dict(), 123)
    again, step = load_relay(path)
    assert step == 123
    for name, value in model.state_dict().items():
        if value.ndim == 2:  # at most half a step of the row's scale, which float16 rounds
            bound = value.abs().amax(1, keepdim=True) / 15 * 0.51
            assert ((again.state_dict()[name] - value).abs() <= bound + 1e-6).all(), name
        else:
            assert torch.equal(again.state_dict()[name], value.bfloat16().float()), name
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ConfigError, match="relay"):
        load_relay(path)


def test_a_wider_model_computes_what_the_narrow_one_did():
    torch.manual_seed(0)
    config = TinyFluxConfig(width=64, heads=2, rope_axes=(8, 12, 12), text_length=4, size=32)
    narrow = TinyFluxDiT(config)
    narrow.init_weights()
    with torch.no_grad():
        for name, parameter in narrow.named_parameters():
            if ".linear." in name or "final_proj_out" in name:
                parameter.normal_(std=0.05)
        # Residual channels with mean zero, where the widening is exact: weights that write there
        # are centred over the channels.
        for name, module in narrow.named_modules():
            if name.endswith(("x_embedder", "context_embedder", "to_out", "ff_a.2", "ff_b.2")) or (
                name.startswith("single_blocks") and name.endswith("proj_out")
            ):
                module.weight -= module.weight.mean(0)
                module.bias -= module.bias.mean()
    x, states, pooled = torch.randn(3, 16, 4, 4), torch.randn(3, 4, 384), torch.randn(3, 384)
    sigmas = torch.tensor([0.1, 0.5, 1.0])
    wide = widen(narrow.eval(), heads=3, text_length=4).eval()
    assert wide.config.width == 96
    with torch.no_grad():
        before = predict_velocity(narrow, x, sigmas, states, pooled)
        after = predict_velocity(wide, x, sigmas, states, pooled)
    # Gates of the modulation break the zero mean a little; the noise floor of that is a percent.
    assert (after - before).std() < 0.03 * before.std()
    with pytest.raises(ValueError, match="fewer"):
        widen(narrow, heads=1, text_length=4)
