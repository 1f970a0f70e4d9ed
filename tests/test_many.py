"""Several pictures of one prompt, previews through the pipeline, and rounded sizes."""

import numpy as np
import pytest

from autolora.errors import GenerationError
from autolora.pipeline import AutoLoRAPipeline


@pytest.fixture(scope="module")
def pipe(tmp_path_factory, tiny_weights, make_pool) -> AutoLoRAPipeline:
    from autolora.config import PipelineConfig

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
    assert many[0].report.timings["encode"] > 0, "the prompt is read for the first picture"
    assert [out.report.timings["encode"] for out in many[1:]] == [0.0, 0.0]
    assert len(planned) == 1 and steps[0] == (0, 6) and steps[-1] == (6, 6)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    for seed, out in zip(seeds, many, strict=True):
        alone = pipe(prompt, seed, guidance=2.0)
        assert out.png() == alone.png(), "the picture and what it says of itself"
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
    assert [out.report.batch for out in batched] == [[1, 2], [1, 2], []]
    assert not any(out.report.batch for out in apart)
    assert any("batch of 2" in note for note in batched[0].report.notes)
    assert not any("batch" in note for note in batched[2].report.notes + apart[0].report.notes)


def test_the_time_of_a_batch_is_shared_by_its_pictures(pipe, monkeypatch) -> None:
    from autolora.generate import sample

    take_steps = sample.denoise_latents
    monkeypatch.setattr(sample, "denoise_latents", lambda *given: (take_steps(*given)[0], 12.0))
    outputs = pipe.generate_many("a rocket", [1, 2, 3], batch=2, retrieve=False)
    assert [out.report.timings["denoise"] for out in outputs] == [6.0, 6.0, 12.0]


def test_pictures_are_given_as_soon_as_they_are_there(pipe) -> None:
    seeds, events = [3, 1, 2], []
    kept = pipe.generate_many(
        "a rocket",
        seeds,
        batch=2,
        drawn=lambda out: events.append(out.report.seed),
        progress=lambda done, total: events.append(f"{done}/{total}"),
    )
    assert kept == [], "any number of pictures must not fill the memory"
    assert events == ["0/4", "1/4", "2/4", 3, 1, "2/4", "3/4", "4/4", 2]


def test_a_receiver_that_raises_ends_the_call(pipe) -> None:
    seen = []

    def refuse(out) -> None:
        seen.append(out)
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        pipe.generate_many("a rocket", [1, 2, 3], drawn=refuse)
    assert len(seen) == 1
    assert not any("fused" in type(m).__name__.lower() for m in pipe.base.dit.modules())


@pytest.mark.parametrize("batch", [0, -1, 17])
def test_impossible_batches_are_refused(pipe, batch: int) -> None:
    with pytest.raises(GenerationError, match="Batch must be between 1 and 16"):
        pipe.generate_many("a cat", [1], batch=batch)


def test_no_seeds_are_no_pictures_and_wrong_ones_are_refused_first(pipe) -> None:
    assert pipe.generate_many("a cat", []) == []
    planned = []
    with pytest.raises(GenerationError, match="Seed"):
        pipe.generate_many("a cat", [1, -1], planned=planned.append)
    assert not planned
    with pytest.raises(GenerationError, match="stepz"):
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
