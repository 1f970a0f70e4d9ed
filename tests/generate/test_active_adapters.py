"""What stays attached acts only where just that is wanted; the order of asking changes nothing."""

from pathlib import Path

import pytest

from autolora.config import PipelineConfig
from autolora.pipeline import AutoLoRAPipeline

NAMES = ("elephant", "neon", "rocket")


@pytest.fixture(scope="module")
def pipe(tmp_path_factory, tiny_weights: Path, make_pool) -> AutoLoRAPipeline:
    folder = tmp_path_factory.mktemp("applying")
    config = PipelineConfig(
        "random",
        weights=tiny_weights,
        pool=make_pool(folder / "pool"),
        index=folder / "index",
        strategy="sum",
        device="cpu",
        steps=1,
        width=64,
        height=64,
    )
    return AutoLoRAPipeline(config)


def draw(pipe: AutoLoRAPipeline, **options) -> bytes:
    return pipe("a cat", 3, retrieve=False, use_triggers=False, **options).image.tobytes()


def test_the_order_of_asking_does_not_change_a_byte(pipe) -> None:
    pairs = [(name, 0.7 + number) for number, name in enumerate(NAMES)]
    first = draw(pipe, loras=pairs)
    assert draw(pipe, loras=pairs[::-1]) == draw(pipe, loras=pairs[1:] + pairs[:1]) == first
    pipe.attach(pairs[::-1])
    try:
        assert draw(pipe) == first
    finally:
        pipe.detach()


def test_a_call_may_ask_for_another_strength_or_strategy_than_is_attached(pipe) -> None:
    weak, merged = (
        draw(pipe, loras=[("neon", 0.2)]),
        draw(pipe, loras=[("neon", 1.0)], strategy="merged"),
    )
    pipe.attach([("neon", 1.0)])
    try:
        strong = draw(pipe)
        assert draw(pipe, loras=[("neon", 0.2)]) == weak != strong
        assert draw(pipe, strategy="merged") == merged != strong
        assert draw(pipe) == strong and pipe.attached == {"neon": 1.0}
    finally:
        pipe.detach()
