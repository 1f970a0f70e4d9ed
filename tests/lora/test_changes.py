"""Kinds of weight change, and their low-rank forms, against dense computations in float64."""

import pytest
import torch

from autolora.lora.deltas import (
    Full,
    Hadamard,
    Kronecker,
    LayerDelta,
    LowRank,
    Magnitude,
    Matrix,
    Piece,
)
from autolora.lora.low_rank import low_rank_delta

RANDOM = torch.Generator()


@pytest.fixture(autouse=True)
def seeded():
    RANDOM.manual_seed(5)


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=RANDOM).to(dtype)


def product(p, q, rank=3):
    return Matrix(a=draw(p, rank), b=draw(rank, q))


def tucker(p, q, rank=3):
    return Matrix(a=draw(rank, p), b=draw(rank, q), core=draw(rank, rank, 1, 1))


def naive(matrix):
    """The matrix of a side, computed in float64."""
    if matrix.whole is not None:
        return matrix.whole.double()
    a, b = matrix.a.double(), matrix.b.double()
    return a @ b if matrix.core is None else a.T @ matrix.core.double()[:, :, 0, 0] @ b


def changes():
    yield LowRank(draw(4, 30), draw(24, 4, dtype=torch.bfloat16), -0.3), None
    for w1 in (Matrix(draw(4, 5)), product(4, 5), tucker(4, 5)):
        for w2 in (Matrix(draw(6, 6)), product(6, 6), tucker(6, 6)):
            yield Kronecker(w1, w2, 0.7), torch.kron(naive(w1), naive(w2)) * 0.7
    for w1, w2 in ((product(24, 30), product(24, 30)), (tucker(24, 30), product(24, 30))):
        yield Hadamard(w1, w2, -2.0), naive(w1) * naive(w2) * -2.0
    diff = draw(24, 30, dtype=torch.float16)
    yield Full(diff), diff.double()


@pytest.mark.parametrize("case", range(13))
def test_rows_norm_and_shape(case):
    change, truth = list(changes())[case]
    if truth is None:
        truth = change.B.double() @ change.A.double() * change.scale
    assert change.shape == (24, 30)
    assert change.block(0, 24).dtype == torch.float64
    torch.testing.assert_close(change.block(0, 24), truth, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(change.block(5, 17), truth[5:17], rtol=1e-12, atol=1e-12)
    assert change.square_norm() == pytest.approx(float(truth.square().sum()), rel=1e-5)
    u, v = draw(24, 3), draw(30, 3)
    expected = torch.stack([u[:, k].double() @ truth @ v[:, k].double() for k in range(3)])
    torch.testing.assert_close(change.bilinear(u, v), expected, rtol=1e-5, atol=1e-4)


def whole(change, magnitude=None):
    return LayerDelta(*change.shape, (Piece(change, (slice(0, change.shape[0]),), magnitude),))


def relative(value, truth):
    return float((value.double() - truth.double()).norm() / truth.double().norm())


def best_error(truth, rank):
    s = torch.linalg.svdvals(truth.double())
    return float(s[rank:].norm() / s.norm())


def check_approximation(delta, rank, base=None, slack=1.001):
    truth = delta.dense(base)
    low = low_rank_delta(delta, rank, base)
    A, B = low.factors()
    assert len(A) <= rank
    error = relative(B.double() @ A.double(), truth)
    assert low.error == pytest.approx(error, rel=1e-3, abs=2e-7)
    assert error <= best_error(truth, rank) * slack + 1e-6
    return error


@pytest.mark.parametrize("scale", [0.7, -1.5])
@pytest.mark.parametrize("rank", [1, 2, 7, 12, 100])
def test_kronecker_is_truncated_at_its_best(rank, scale):
    for w1 in (Matrix(draw(4, 5)), product(4, 5)):
        for w2 in (Matrix(draw(6, 7)), product(6, 7, rank=2)):
            error = check_approximation(whole(Kronecker(w1, w2, scale)), rank)
            if rank == 12 and w2.rank == 2:
                assert error < 1e-6  # its exact rank is at most 4 * 2


def test_kronecker_with_a_large_side():
    side = Matrix(draw(530, 20) @ draw(20, 540) + 0.1 * draw(530, 540))
    check_approximation(whole(Kronecker(Matrix(draw(2, 1)), side, 0.5)), 24, slack=1.01)
    check_approximation(whole(Kronecker(side, Matrix(draw(2, 1)), 0.5)), 3, slack=1.01)


@pytest.mark.parametrize("size", [(24, 30), (60, 50)])  # through the matrix, through the factors
def test_hadamard_is_truncated_at_its_best(size):
    change = Hadamard(product(*size), product(*size), 0.3)
    for rank in (2, 5):
        check_approximation(whole(change), rank)
    assert check_approximation(whole(change), 9) < 1e-6


@pytest.mark.parametrize("shape", [(40, 30), (700, 520), (520, 700)])
def test_full_difference_is_truncated_near_its_best(shape):
    smooth = draw(shape[0], 30) @ draw(30, shape[1])
    for diff in (smooth, smooth + 3 * draw(*shape)):
        check_approximation(whole(Full(diff)), 16, slack=1.005)


def test_a_slowly_falling_spectrum_is_truncated_near_its_best():
    """One pass of subspace iteration is 3 % off here."""
    left, right = (torch.linalg.qr(draw(n, 600)).Q for n in (700, 600))
    diff = (left * torch.arange(1, 601) ** -0.25) @ right.T
    check_approximation(whole(Full(diff)), 64, slack=1.001)


def test_approximation_of_nothing_is_nothing():
    low = low_rank_delta(whole(Full(torch.zeros(8, 9))), 4, None)
    assert low.error == 0
    assert not low.dense().any()


def test_same_approximation_every_time():
    change = whole(Full(draw(530, 530)))
    first, second = (low_rank_delta(change, 8, None).factors() for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("rows", [(slice(0, 24),), (slice(8, 24), slice(0, 8))])
def test_magnitudes(axis, rows):
    """Against the definition, with the base's rows in the module's order."""
    change = LowRank(draw(3, 10), draw(24, 3), 0.5)
    length = draw(24 if axis == "rows" else 10)
    base = draw(24, 10)
    delta = LayerDelta(24, 10, (Piece(change, rows, Magnitude(length, axis)),))
    assert delta.needs_base and not delta.is_low_rank and delta.square_norm() is None
    order = torch.cat([torch.arange(24)[where] for where in rows])
    before = base.double()[order]
    after = before + 0.5 * change.B.double() @ change.A.double()
    if axis == "rows":
        after = after / after.norm(dim=1, keepdim=True) * length.double()[:, None]
    else:
        after = after / after.norm(dim=0, keepdim=True) * length.double()[None]
    truth = torch.zeros(24, 10, dtype=torch.float64)
    truth[order] = after - before
    assert relative(delta.dense(base), truth) < 1e-6
    check_approximation(delta, 4, base)


def test_magnitude_of_a_row_of_zeros_is_no_nan():
    change = LowRank(torch.zeros(1, 4), torch.zeros(3, 1))
    delta = whole(change, Magnitude(torch.ones(3), "rows"))
    assert not delta.dense(torch.zeros(3, 4)).any()


def test_magnitudes_agree_with_peft():
    dora = pytest.importorskip("peft.tuners.lora.dora")
    A, B, base, x = draw(4, 16), draw(12, 4), draw(12, 16), draw(5, 16)
    length = draw(12).abs() + 0.5
    layer = dora.DoraLinearLayer(fan_in_fan_out=False)
    layer.weight = torch.nn.Parameter(length)
    down, up, linear = (torch.nn.Linear(*s, bias=False) for s in ((16, 4), (4, 12), (16, 12)))
    for module, weight in ((down, A), (up, B), (linear, base)):
        module.weight = torch.nn.Parameter(weight)
    with torch.no_grad():
        theirs = layer(x, lora_A=down, lora_B=up, scaling=0.25, base_layer=linear)
    delta = whole(LowRank(A, B, 0.25), Magnitude(length, "rows")).dense(base)
    torch.testing.assert_close(x @ delta.T, theirs, rtol=1e-4, atol=1e-4)
