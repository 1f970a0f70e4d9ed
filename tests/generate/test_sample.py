"""Drawing against DiffSynth's own loop; previews, batches and callbacks that raise."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from autolora.config import PipelineConfig
from autolora.families.load import load_pipeline
from autolora.generate.sample import Watch, decode_latents, denoise, denoise_latents, prepare
from autolora.request import make_request

PROMPT = "a red rocket"


@pytest.fixture(scope="module")
def config(tiny_weights: Path) -> PipelineConfig:
    return PipelineConfig("random", weights=tiny_weights, device="cpu", width=64, height=64)


@pytest.fixture(scope="module")
def pipe(config: PipelineConfig):
    return load_pipeline(config)


@pytest.fixture
def request_(config: PipelineConfig):
    return make_request(config, PROMPT, seed=5, steps=3, guidance=2.0, negative_prompt="blue")


def pixels(image) -> np.ndarray:
    return np.asarray(image, dtype=int)


def test_pictures_are_those_of_diffsynths_loop(pipe, request_) -> None:
    for guidance in (2.0, 1.0):
        wanted = replace(request_, guidance=guidance, sigma_shift=2.0)
        expected = pipe(
            PROMPT,
            negative_prompt="blue",
            cfg_scale=guidance,
            width=64,
            height=64,
            seed=5,
            num_inference_steps=3,
            sigma_shift=2.0,
            **pipe.family.inputs(pipe, [PROMPT, "blue"]),
            progress_bar_cmd=lambda steps: steps,
        )
        image, timings = denoise(pipe, wanted, PROMPT)
        assert np.array_equal(pixels(image), pixels(expected))
        assert min(vars(timings).values()) > 0
    assert pixels(image).std() > 1, "a flat picture would prove nothing"


def test_previews_are_the_guess_of_the_clean_picture(pipe, request_) -> None:
    seen: dict[int, np.ndarray] = {}
    done = []
    image, _ = denoise(
        pipe,
        request_,
        PROMPT,
        progress=lambda step, total: done.append((step, total)),
        preview=lambda step, guess: seen.update({step: pixels(guess)}),
    )
    assert done == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert list(seen) == [1, 2, 3]
    # By hand: x0 = x - sigma v, at the first step from the noise itself.
    _, positive, negative = prepare(pipe, request_, PROMPT).at(5)
    noise = torch.randn((1, 16, 8, 8), generator=torch.Generator().manual_seed(5))
    noise = noise.to(pipe.torch_dtype)
    pipe.scheduler.set_timesteps(3)
    sigma = pipe.scheduler.sigmas[0]
    with torch.no_grad():
        velocities = [
            pipe.model_fn(pipe.dit, latents=noise, timestep=(sigma * 1000)[None], **text)
            for text in (positive, negative)
        ]
    velocity = velocities[1] + 2.0 * (velocities[0] - velocities[1])
    guess = pixels(decode_latents(pipe, noise - velocity * sigma)[0])
    assert np.abs(seen[1] - guess).max() <= 1
    # The last step ends where the guess already is.
    assert np.array_equal(seen[3], pixels(image))


def test_large_previews_are_shrunk(pipe, request_, monkeypatch: pytest.MonkeyPatch) -> None:
    from autolora.generate import sample as module

    monkeypatch.setattr(module, "PREVIEW_SIDE", 4)
    sizes = []
    wide = replace(request_, width=128, steps=4)
    image, _ = denoise(
        pipe, wide, PROMPT, preview=lambda step, guess: sizes.append(guess.size), preview_every=2
    )
    assert sizes == [(32, 16), (32, 16)] and image.size == (128, 64)


def test_a_batch_is_the_single_pictures_but_for_rounding(pipe, request_) -> None:
    conditions = prepare(pipe, request_, PROMPT)

    def draw(seeds: list[int]) -> list[np.ndarray]:
        return [pixels(i) for i in decode_latents(pipe, denoise_latents(conditions, seeds)[0])]

    seeds = [5, 6, 7]
    apart = [draw([seed])[0] for seed in seeds]
    together = draw(seeds)
    for one, other in zip(apart, together, strict=True):
        assert np.abs(one - other).max() <= 2
    assert np.abs(apart[0] - apart[1]).mean() > 3, "other seeds must be other pictures"
    assert np.array_equal(apart[0], pixels(denoise(pipe, request_, PROMPT)[0]))


@pytest.mark.parametrize("callback", ["progress", "preview"])
@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
def test_a_callback_that_raises_ends_the_picture_cleanly(
    pipe, request_, callback: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    monkeypatch.setattr(pipe, "load_models_to_device", lambda names: loaded.append(tuple(names)))
    before = pixels(denoise(pipe, request_, PROMPT)[0])

    def raising(*_) -> None:
        raise error

    with pytest.raises(type(error)):
        denoise(pipe, request_, PROMPT, **{callback: raising})
    assert loaded[-1] == (), "every part is sent back where it waits"
    assert np.array_equal(pixels(denoise(pipe, request_, PROMPT)[0]), before)


def test_previews_keep_the_decoder_beside_the_transformer(
    pipe, request_, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    monkeypatch.setattr(pipe, "load_models_to_device", lambda names: loaded.append(set(names)))
    conditions = prepare(pipe, request_, PROMPT)
    latents, _ = denoise_latents(conditions, [1], Watch(preview=lambda *_: None))
    decode_latents(pipe, latents)
    fetched = [names for names in loaded if "dit" in names]
    assert len(fetched) == 1 and "vae_decoder" in fetched[0] and loaded[-1] == set(), (
        "fetched once, and nothing stays behind"
    )
