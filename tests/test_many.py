"""Several pictures of one prompt, previews through the pipeline, and rounded sizes."""

import numpy as np
import pytest

from autolora.errors import GenerationError
from autolora.pipeline import AutoLoRAPipeline


@pytest.fixture(scope="module")
def pipe(tmp_path_factory, tiny_weights, make_pool) -> AutoLoRAPipeline:
    from autolora.flux.config import PipelineConfig

    folder = tmp_path_factory.mktemp("many")
    config = PipelineConfig(
        "random",
        weights=tiny_weights,
        pool=make_pool(folder / "pool"),
        index=folder / "index",
        steps=2,
        width=64,
        height=64,
        device="cpu",
    )
    return AutoLoRAPipeline(config)


def pixels(output) -> np.ndarray:
    return np.asarray(output.image, dtype=int)


def test_many_are_the_single_pictures_to_the_byte(pipe) -> None:
    prompt, seeds = "a neon elephant", [4, 9, 4]
    planned, steps = [], []
    many = pipe.generate_many(
        prompt,
        seeds,
        guidance=2.0,
        planned=planned.append,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert [out.report.seed for out in many] == seeds
    assert len(planned) == 1 and steps[0] == (0, 6) and steps[-1] == (6, 6)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    for seed, out in zip(seeds, many, strict=True):
        alone = pipe(prompt, seed, guidance=2.0)
        assert np.array_equal(pixels(out), pixels(alone))
        assert [a.name for a in out.report.adapters] == [a.name for a in alone.report.adapters]
        assert out.report.adapters and out.hits
    assert not np.array_equal(pixels(many[0]), pixels(many[1]))
    assert many[0].report.notes is not many[1].report.notes, "each picture has its own report"


def test_a_batch_says_so_and_differs_by_rounding_only(pipe) -> None:
    steps = []
    seeds = [1, 2, 3]
    batched = pipe.generate_many(
        "a neon elephant", seeds, batch=2, progress=lambda *pair: steps.append(pair)
    )
    apart = pipe.generate_many("a neon elephant", seeds)
    assert [out.report.seed for out in batched] == seeds
    assert steps[-1] == (4, 4), "two batches of two steps"
    for one, other in zip(batched, apart, strict=True):
        assert np.abs(pixels(one) - pixels(other)).max() <= 2
    assert any("batch of 2" in note for note in batched[0].report.notes)
    assert not any("batch" in note for note in batched[2].report.notes + apart[0].report.notes)


def test_no_seeds_are_no_pictures_and_wrong_ones_are_refused_first(pipe) -> None:
    assert pipe.generate_many("a cat", []) == []
    planned = []
    with pytest.raises(GenerationError, match="Seed"):
        pipe.generate_many("a cat", [1, -1], planned=planned.append)
    assert not planned
    with pytest.raises(TypeError, match="stepz"):
        pipe.generate_many("a cat", [1], stepz=3)


def test_previews_come_from_the_call(pipe) -> None:
    seen = []
    out = pipe(
        "a rocket",
        steps=3,
        preview=lambda step, image: seen.append((step, image)),
        preview_every=3,
    )
    assert [step for step, _ in seen] == [3]
    assert np.array_equal(np.asarray(seen[0][1]), np.asarray(out.image))

    def stop(*_) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        pipe("a rocket", preview=stop)
    assert not any("fused" in type(m).__name__.lower() for m in pipe.base.dit.modules())


def test_sizes_are_rounded_and_the_report_says_so(pipe) -> None:
    out = pipe("a rocket", size=(70, 81), retrieve=False)
    assert out.image.size == (80, 96) == (out.report.width, out.report.height)
    assert "The size 70x81 was rounded up to 80x96." in out.report.notes
