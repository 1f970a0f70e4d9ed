"""Every family draws what DiffSynth's own pipeline draws, and everything around it holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from autolora.errors import GenerationError
from autolora.generate.sample import (
    Watch,
    can_batch,
    decode_latents,
    denoise_latents,
    input_names,
    prepare,
)
from autolora.images import GivenImages
from tests.families.conftest import NEGATIVE, PROMPT, SEED, SIDE, STEPS, Asked, Model


def picture(side: int = SIDE, seed: int = 1) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
    return small.resize((side, side), Image.Resampling.BICUBIC)


def mask(side: int = SIDE) -> Image.Image:
    image = Image.new("L", (side, side), 0)
    image.paste(255, (0, 0, side // 2, side))
    return image.convert("RGB")


def test_same_bytes_as_the_pipelines_own_call(small: Model) -> None:
    theirs = np.asarray(small.call())
    assert theirs.std() > 10, "a flat picture would prove nothing"
    ours = decode_latents(small.pipe, small.latents())
    assert np.array_equal(np.asarray(ours[0]), theirs)


def test_without_guidance_one_pass_is_the_same(small: Model) -> None:
    assert torch.equal(small.latents(guidance=1.0), small.theirs(**{"cfg_scale": 1.0}))


def test_image_to_image(small: Model) -> None:
    inputs = {"input_image": picture(), "denoising_strength": 0.6}
    ours = small.latents(inputs=inputs)
    theirs = by_units(small, inputs) if small.family.unit_inputs else small.theirs(**inputs)
    assert torch.equal(ours, theirs)
    assert not torch.allclose(ours, small.latents())


def by_units(small: Model, inputs: dict) -> torch.Tensor:
    """DiffSynth's loop where its units take a picture, and its call has no argument for it."""
    pipe = small.pipe
    pipe.scheduler.set_timesteps(STEPS, denoising_strength=inputs["denoising_strength"])
    shared = {"cfg_scale": 3.0, "height": SIDE, "width": SIDE, "seed": SEED, "rand_device": "cpu"}
    shared |= {"input_image": inputs["input_image"]}
    positive, negative = {"prompt": PROMPT}, {"prompt": NEGATIVE}
    with torch.no_grad():
        for unit in pipe.units:
            torch.manual_seed(SEED)  # the autoencoder samples
            shared, positive, negative = pipe.unit_runner(unit, pipe, shared, positive, negative)
        for i, timestep in enumerate(pipe.scheduler.timesteps):
            noise = pipe.cfg_guided_model_fn(
                pipe.model_fn,
                3.0,
                shared,
                positive,
                negative,
                unet=pipe.unet,
                timestep=timestep[None],
                progress_id=i,
            )
            shared["latents"] = pipe.step(pipe.scheduler, progress_id=i, noise_pred=noise, **shared)
    return shared["latents"]


def test_a_mask_keeps_the_rest(load_small) -> None:
    for name in ("qwen_image", "flux2"):
        small = load_small(name)
        inputs = {"input_image": picture(), "denoising_strength": 0.8, "inpaint_mask": mask()}
        ours = small.latents(inputs=inputs)
        assert torch.equal(ours, small.theirs(**inputs))
        plain = small.latents(inputs=inputs | {"inpaint_mask": None})
        assert not torch.equal(ours, plain)


def test_seeds_share_one_reading_of_the_prompt(small: Model, monkeypatch) -> None:
    alone = [small.latents(seed) for seed in (SEED, 9)]
    conditions = prepare(small.pipe, Asked(), PROMPT, SEED)
    for attribute in small.family.text_encoders.values():
        encoder = getattr(small.pipe, attribute)
        if encoder is not None:
            monkeypatch.setattr(encoder, "forward", None)
    together = [denoise_latents(conditions, [seed])[0] for seed in (SEED, 9)]
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_a_batch_is_the_same_up_to_rounding(small: Model) -> None:
    if not can_batch(small.family, GivenImages()):
        pytest.skip("this family's pipeline draws one picture at a time")
    alone = torch.cat([small.latents(seed) for seed in (SEED, 9)])
    conditions = prepare(small.pipe, Asked(), PROMPT, SEED)
    together = denoise_latents(conditions, [SEED, 9])[0]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_the_last_preview_is_the_picture(small: Model) -> None:
    seen, told = [], []
    watch = Watch(lambda *done: told.append(done), lambda step, image: seen.append(image))
    image = decode_latents(small.pipe, small.latents(watch=watch))[0]
    assert told == [(i, STEPS) for i in range(STEPS + 1)] and len(seen) == STEPS
    assert np.array_equal(np.asarray(seen[-1]), np.asarray(image))
    assert not np.array_equal(np.asarray(seen[0]), np.asarray(image))


def test_stopping_leaves_the_pipeline_as_it_was(small: Model) -> None:
    before = small.latents()

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small.latents(watch=Watch(stop))
    assert torch.equal(small.latents(), before)


def test_what_a_pipeline_does_not_take_is_one_sentence(small: Model) -> None:
    assert "input_image" in input_names(small.family)
    with pytest.raises(GenerationError, match=r"does not take no_such_input; it takes .*input_im"):
        small.latents(inputs={"no_such_input": 1})
    with pytest.raises(GenerationError, match="use adapters"):
        small.latents(inputs={"lora": {}})
    for name, part in small.family.needs.items():
        with pytest.raises(GenerationError, match=f"{name} needs a {part}"):
            small.latents(inputs={name: [picture()]})
