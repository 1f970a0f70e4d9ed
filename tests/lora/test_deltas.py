"""Values that no weight may have are found in every type that files hold."""

import math

import pytest
import torch

from autolora.lora.deltas import is_finite

TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def plainly_finite(tensor: torch.Tensor, limit: float) -> bool:
    values = tensor.to(torch.float64)
    return bool((values.isfinite() & (values.abs() <= limit)).all())


@pytest.mark.parametrize("dtype", FLOAT8)
@pytest.mark.parametrize("limit", [math.inf, 1e6, 100.0, 0.5])
def test_every_value_of_eight_bits_is_judged_rightly(dtype, limit):
    for bits in range(256):
        for others in (0, 0x30, 0xB0):
            tensor = torch.tensor([others, bits, others], dtype=torch.uint8).view(dtype)
            assert is_finite(tensor, limit) == plainly_finite(tensor, limit), (bits, others)


@pytest.mark.parametrize(
    ("dtype", "bad"),
    [
        (dtype, bad)
        for dtype in (*TYPES, *FLOAT8)
        for bad in (math.nan, -math.nan, math.inf, -math.inf)
        if dtype != torch.float8_e4m3fn or math.isnan(bad)  # it has no infinity
    ],
)
def test_one_bad_value_anywhere_is_found(dtype, bad):
    values = torch.linspace(-2, 2, 999)
    assert is_finite(values.to(dtype)) and is_finite(values.to(dtype).reshape(27, 37).T)
    for place in (0, 500, 998):
        spoiled = values.clone()
        spoiled[place] = bad
        assert not is_finite(spoiled.to(dtype))
        assert not is_finite(spoiled.to(dtype).reshape(27, 37).T)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_limit_counts_for_both_signs(dtype, sign):
    values = torch.zeros(9, dtype=dtype)
    values[4] = 1000 * sign
    assert is_finite(values, 1000) and not is_finite(values, 999)


def test_whole_numbers_are_finite():
    assert is_finite(torch.tensor([2**40, -5])) and not is_finite(torch.tensor([2**40]), 1e6)
    assert is_finite(torch.tensor([True, False]), 0.5)
