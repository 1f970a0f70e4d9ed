"""The few-step twin's distillation against a flow whose answer is known."""

import pytest
import torch

from train.tiny_world import turbo
from train.tiny_world.turbo import TurboConfig, guided_walk, turbo_loss, window_ends


class Line:
    """Stands in for a model: velocity ``c * x`` with text, 0 without, so guidance scales ``c``."""

    def __init__(self, rate):
        self.rate = rate

    def __call__(self, dit, noisy, sigmas, states, pooled):
        said = (states[:, 0, 0] != 0).float().view(-1, 1, 1, 1)
        return dit.rate * said * noisy


class Bank:
    """Pictures of ones with a text that is not empty."""

    states, pooled = torch.zeros(2, 3, 4), torch.zeros(2, 4)
    states[1] = 1

    def sample(self, count, empty, generator):
        return torch.ones(count, 16, 2, 2), self.states[1:].expand(count, -1, -1), self.pooled[1:]


@pytest.fixture(autouse=True)
def line(monkeypatch):
    monkeypatch.setattr(turbo, "predict_velocity", Line(0.0).__call__)


def test_windows_are_the_schedulers_steps():
    from diffsynth.diffusion import FlowMatchScheduler

    scheduler = FlowMatchScheduler("FLUX.1")
    scheduler.set_timesteps(4)
    ends = window_ends(4)
    assert len(ends) == 5 and ends[0] == 1 and ends[-1] == 0
    torch.testing.assert_close(ends[:-1], scheduler.sigmas)


def test_the_walk_is_eulers_with_guidance():
    config = TurboConfig(teacher_steps=4, guidance=3.0)
    x, begin, end = torch.ones(2, 1, 1, 1), torch.tensor([1.0, 0.5]), torch.tensor([0.6, 0.1])
    text = (torch.ones(2, 3, 4), torch.zeros(2, 4))
    empty = (torch.zeros(1, 3, 4), torch.zeros(1, 4))
    walked = guided_walk(Line(0.2), x, begin, end, text, empty, config)
    for i in range(2):
        value = 1.0
        for _ in range(4):
            value += (float(end[i]) - float(begin[i])) / 4 * 3.0 * 0.2 * value
        assert walked[i].item() == pytest.approx(value, rel=1e-5)


def test_a_student_that_goes_straight_has_no_loss():
    """The teacher stands still, so the line is flat; any other student errs by its own slope."""
    config = TurboConfig(batch=8, guidance=1.0)
    ends = window_ends(4)
    loss = lambda rate: turbo_loss(  # noqa: E731
        config, Line(rate), Line(0.0), Bank(), ends, torch.Generator().manual_seed(0)
    )
    assert loss(0.0).item() == 0
    assert loss(0.5).item() > 0.05
    assert loss(1.0).item() == pytest.approx(4 * loss(0.5).item(), rel=0.02)
