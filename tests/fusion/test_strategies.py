"""Every strategy against its equation, written out naively in float64."""

from __future__ import annotations

import zlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from autolora.errors import FusionError
from autolora.fusion import (
    Response,
    add,
    attach,
    attached,
    attached_layers,
    detach,
    get_strategy,
    remove,
    reserve,
    set_strengths,
    stepping,
    strategy_names,
    switch,
)
from autolora.fusion.packed import Capacity
from tests.fusion.reference import FakeAdapter, random_factors

OUT, IN, TOKENS = 10, 14, 7
STRENGTHS = (1.0, -0.5, 0.8)
NAMES = ("a", "b", "c")


class Model(nn.Module):
    """One layer, called as a pipeline's model function calls a model."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(IN, OUT)

    def forward(self, x, **_):
        return self.layer(x)


@pytest.fixture
def setting():
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(1)
    model = Model().eval().requires_grad_(False)
    factors = random_factors([2, 3, 4], IN, OUT, generator)
    adapters = [FakeAdapter(n, {"layer": f}) for n, f in zip(NAMES, factors, strict=True)]
    x = torch.randn(TOKENS, IN, generator=generator)
    deltas = [s * (b.double() @ a.double()) for s, (a, b) in zip(STRENGTHS, factors, strict=True)]
    pairs = list(zip(adapters, STRENGTHS, strict=True))
    return SimpleNamespace(model=model, factors=factors, pairs=pairs, x=x, deltas=deltas)


def added(setting, strategy) -> torch.Tensor:
    """What the adapters add to the base output, float64."""
    base = setting.model(setting.x)
    with attached(setting.model, setting.pairs, strategy):
        return (setting.model(setting.x) - base).double()


def applied(setting, delta: torch.Tensor) -> torch.Tensor:
    return setting.x.double() @ delta.T


def close(found, wanted) -> None:
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)


def naive_ties(deltas):
    trimmed = []
    for delta in deltas:
        flat = sorted(delta.flatten().abs().tolist(), reverse=True)
        least = flat[round(0.2 * len(flat)) - 1]
        trimmed.append([[v if abs(v) >= least else 0.0 for v in row] for row in delta.tolist()])
    result = torch.zeros(OUT, IN, dtype=torch.float64)
    for i in range(OUT):
        for j in range(IN):
            values = [t[i][j] for t in trimmed]
            total = sum(values)
            same = [v for v in values if v * total > 0]
            result[i, j] = sum(same) / len(same) if same else 0.0
    return result


def naive_dare(deltas):
    total = torch.zeros(OUT, IN, dtype=torch.float64)
    for name, delta in zip(NAMES, deltas, strict=True):
        seed = torch.Generator().manual_seed(zlib.crc32(f"{name}\nlayer".encode()))
        total += 2 * delta * (torch.rand(OUT, IN, generator=seed) >= 0.5)
    return total


def naive_np(deltas, first):
    q = torch.linalg.svd(first.double())[2][: first.shape[0]]  # rows span the rows of A_1
    projector = torch.eye(IN, dtype=torch.float64) - (0.5 / 1.5) * q.T @ q
    return deltas[0] + sum(delta @ projector for delta in deltas[1:])


def naive_norm(deltas):
    bare = [delta / abs(s) for delta, s in zip(deltas, STRENGTHS, strict=True)]
    norms = [float(delta.norm()) for delta in bare]
    return sum(d * (sum(norms) / 3) / n for d, n in zip(deltas, norms, strict=True))


EQUATIONS = {
    "sum": lambda s: sum(s.deltas),
    "gated": lambda s: sum(s.deltas),  # without gates
    "autolora": lambda s: sum(s.deltas),
    "merged": lambda s: sum(s.deltas),
    "average": lambda s: sum(s.deltas) / 3,
    "norm": lambda s: naive_norm(s.deltas),
    "ties": lambda s: naive_ties(s.deltas),
    "dare": lambda s: naive_dare(s.deltas),
    "np": lambda s: naive_np(s.deltas, s.factors[0][0]),
}
BY_STEP = {"switch", "composite", "loratorio", "klora"}


def test_every_strategy_has_a_test_here() -> None:
    assert set(strategy_names()) == {*EQUATIONS, *BY_STEP, "ssr"}


@pytest.mark.parametrize("name", EQUATIONS)
def test_a_layer_adds_what_the_equation_says(setting, name) -> None:
    close(added(setting, name), applied(setting, EQUATIONS[name](setting)))


@pytest.mark.parametrize("name", ["average", "norm", "ties", "dare", "np"])
def test_strengths_and_removal_shape_the_rest_anew(setting, name) -> None:
    model = setting.model
    with attached(model, [(setting.pairs[0][0], 0.3), *setting.pairs[1:]], name):
        set_strengths(model, {"a": 1.0})
        base = setting.x.double() @ model.layer.base.weight.double().T + model.layer.base.bias
        close(model(setting.x).double() - base, applied(setting, EQUATIONS[name](setting)))
        remove(model, "c")
        after = model(setting.x)
        attach(model, setting.pairs[:2], name)
        torch.testing.assert_close(model(setting.x), after)
        switch(model, setting.pairs, name)
        close(model(setting.x).double() - base, applied(setting, EQUATIONS[name](setting)))
        with pytest.raises(FusionError, match="depend on each other"):
            add(model, FakeAdapter("d", {"layer": setting.factors[0]}), 1.0, name)
    detach(model)
    with pytest.raises(FusionError, match="no room can be made"):
        reserve(model, Capacity(2, 8), torch.float32, torch.device("cpu"), name)


@pytest.mark.parametrize("name", ["average", "norm", "ties", "dare", "np"])
def test_all_strengths_at_zero_leave_the_base_output(setting, name) -> None:
    silent = [(adapter, 0.0) for adapter, _ in setting.pairs]
    base = setting.model(setting.x)
    with attached(setting.model, silent, name):
        assert torch.equal(setting.model(setting.x), base)


def own_inputs(setting):
    generator = torch.Generator().manual_seed(9)
    return {name: torch.randn(30, IN, generator=generator) for name in NAMES}


def prepared_ssr(setting, inputs):
    strategy = get_strategy("ssr")

    def run(adapter) -> None:
        with attached(setting.model, [(adapter, 1.0)], "sum"):
            setting.model(inputs[adapter.name])

    strategy.prepare(setting.model, setting.pairs, run)
    return strategy


def test_ssr_is_the_least_squares_solution(setting) -> None:
    """Against a general solver: minimise the error over all R with unknown entries."""
    inputs = own_inputs(setting)
    found = added(setting, prepared_ssr(setting, inputs))
    a = torch.cat([f[0] for f in setting.factors]).double()
    b = torch.cat(
        [s * f[1].double() for s, f in zip(STRENGTHS, setting.factors, strict=True)], dim=1
    )
    z = torch.cat([inputs[n].double() @ a.T for n in NAMES])  # rows are samples
    wanted = torch.zeros(len(z), len(a), dtype=torch.float64)
    start = 0
    for k, name in enumerate(NAMES):
        rank = len(setting.factors[k][0])
        own = inputs[name].double() @ setting.factors[k][0].double().T
        wanted[30 * k : 30 * (k + 1), start : start + rank] = own
        start += rank
    gram = z.T @ z
    ridge = 1e-4 * gram.diagonal().mean() * torch.eye(len(a), dtype=torch.float64)
    r = torch.linalg.lstsq(gram + ridge, z.T @ wanted).solution.T
    close(found, applied(setting, b @ r @ a))


def test_ssr_of_equal_inputs_is_the_average_and_needs_its_passes(setting) -> None:
    same = dict.fromkeys(NAMES, own_inputs(setting)["a"])
    found = added(setting, prepared_ssr(setting, same))
    torch.testing.assert_close(
        found, applied(setting, sum(setting.deltas) / 3), rtol=1e-2, atol=1e-2
    )
    with pytest.raises(FusionError, match="own prompt first"):
        attach(setting.model, setting.pairs, "ssr")
    assert not attached_layers(setting.model)


class Pipe:
    """What `stepping` asks of a pipeline; outputs are ``[1, C, h, w]``."""

    def __init__(self, setting, steps: int) -> None:
        self.scheduler = SimpleNamespace(timesteps=list(range(steps)))
        self.model_fn = lambda progress_id=0: shaped(setting.model(setting.x))


def shaped(y: torch.Tensor) -> torch.Tensor:
    return y[:6].reshape(1, 5, 3, 4)  # 6 tokens of 10 channels


def alone(setting, i=None) -> torch.Tensor:
    base = setting.model.layer
    weight = getattr(base, "base", base).weight.double()
    y = setting.x.double() @ weight.T + getattr(base, "base", base).bias.double()
    return y if i is None else y + applied(setting, setting.deltas[i])


def run_steps(setting, name: str, steps: int = 6) -> list[torch.Tensor]:
    pipe = Pipe(setting, steps)
    inner = pipe.model_fn
    with attached(setting.model, setting.pairs, name):
        before = attached_layers(setting.model)["layer"].strengths
        with stepping(pipe, setting.model, get_strategy(name)):
            found = [pipe.model_fn(progress_id=step).double() for step in range(steps)]
        assert attached_layers(setting.model)["layer"].strengths == before
    assert pipe.model_fn is inner
    return found


def test_switch_takes_turns(setting) -> None:
    for step, found in enumerate(run_steps(setting, "switch")):
        close(found, shaped(alone(setting, step // 2)))  # 6 steps, 3 adapters
    turns = run_steps(setting, "switch", 30)
    for step in (0, 4, 5, 14, 15, 29):
        close(turns[step], shaped(alone(setting, (step % 15) // 5)))


def test_composite_is_the_mean_of_single_predictions(setting) -> None:
    mean = sum(alone(setting, i) for i in range(3)) / 3
    close(run_steps(setting, "composite", 1)[0], shaped(mean))


def test_loratorio_weighs_patches_by_unlikeness(setting) -> None:
    found = run_steps(setting, "loratorio", 1)[0]
    base, single = shaped(alone(setting)), [shaped(alone(setting, i)) for i in range(3)]
    for top in (0, 2):
        for left in (0, 2):
            patch = (0, slice(None), slice(top, top + 2), slice(left, left + 2))
            o = base[patch].flatten()
            cosines = [float(v[patch].flatten() @ o / v[patch].norm() / o.norm()) for v in single]
            weights = torch.softmax(-torch.tensor(cosines, dtype=torch.float64) / 0.1, 0)
            wanted = sum(w * v[patch] for w, v in zip(weights, single, strict=True))
            close(found[patch], wanted)


def test_klora_lets_the_larger_top_entries_act(setting) -> None:
    bare = [b.double() @ a.double() for a, b in setting.factors]
    total = [float(d.abs().sum()) for d in bare]
    for step, found in enumerate(run_steps(setting, "klora")):
        scores = []
        for i, delta in enumerate(bare):
            k = 2 * len(setting.factors[i][0])
            top = sum(sorted(delta.abs().flatten().tolist(), reverse=True)[:k])
            late = 1.5 * step / 6 + 0.5
            scores.append(top if i == 0 else top * total[0] / total[i] * late)
        close(found, shaped(alone(setting, scores.index(max(scores)))))


def test_a_failing_step_puts_strengths_and_function_back(setting) -> None:
    pipe = Pipe(setting, 3)

    def fail(progress_id=0):
        raise RuntimeError("out of memory")

    pipe.model_fn = fail
    with attached(setting.model, setting.pairs, "composite"):
        with (
            pytest.raises(RuntimeError),
            stepping(pipe, setting.model, get_strategy("composite")),
        ):
            pipe.model_fn(progress_id=0)
        assert attached_layers(setting.model)["layer"].strengths == STRENGTHS
    assert pipe.model_fn is fail


@pytest.mark.parametrize("name", sorted(BY_STEP))
def test_no_adapter_that_acts_is_the_base_model(setting, name) -> None:
    setting.pairs = [(adapter, 0.0) for adapter, _ in setting.pairs]
    close(run_steps(setting, name, 2)[1], shaped(alone(setting)))


@pytest.mark.parametrize(
    ("responses", "kept"),
    [
        ({"a": (0.1, 5.0)}, {"a"}),
        ({"a": (0.1, 1.9)}, set()),
        ({"a": (0.1, 2.3)}, {"a"}),
        ({"a": (0.1, 2.3), "b": (9.0, 2.2)}, {"a", "b"}),
        ({"a": (0.1, 2.3), "b": (0.0, 2.4)}, {"b"}),  # the same word, claimed more
        ({"a": (0.1, 5.0), "b": (0.0, 5.4)}, {"a", "b"}),
        ({"a": (0.1, 5.0), "b": (0.0, 5.6)}, {"b"}),
        ({"a": None, "b": (0.0, 0.1)}, {"a"}),
        ({"a": (-1.0,)}, set()),
    ],
)
def test_autolora_keeps_what_the_prompt_asks_for(responses, kept) -> None:
    given = {n: None if w is None else Response(w) for n, w in responses.items()}
    decided = get_strategy("autolora").choose(given)
    assert {name for name, keep in decided.items() if keep} == kept


def test_autolora_keeps_what_is_named() -> None:
    decided = get_strategy("autolora").choose({"a": Response((0.0,), named=True)})
    assert decided == {"a": True}
