"""Pictures to start from: read, checked, brought to size, and named as the pipeline calls them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from autolora.errors import GenerationError
from autolora.families.base import ImageInputs
from autolora.images import GivenImages, parse_control, read_image


def picture(width: int = 64, height: int = 48, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).convert(mode)


def pipe(**names) -> SimpleNamespace:
    family = SimpleNamespace(title="This model", images=lambda _: ImageInputs(**names))
    return SimpleNamespace(family=family)


def test_the_picture_gives_the_size_unless_one_is_asked_for() -> None:
    given = GivenImages(picture(70, 50))
    assert given.size(16, None) == (64, 48)
    assert given.size(16, (140, 100)) == (140, 100)
    with pytest.raises(GenerationError, match="70x50, which is not the shape of 64x64"):
        given.size(16, (64, 64))
    assert GivenImages().size(16, None) is None


def test_inputs_have_the_pipelines_names_and_the_results_size() -> None:
    half = Image.new("1", (64, 48))
    half.paste(1, (0, 0, 32, 48))
    given = GivenImages(picture(), 0.3, half)
    named = given.named(pipe(mask="inpaint_mask"), 128, 96)
    assert named["denoising_strength"] == 0.3
    assert named["input_image"].size == named["inpaint_mask"].size == (128, 96)
    assert np.asarray(named["inpaint_mask"])[50, [10, 120], 0].tolist() == [255, 0]
    with pytest.raises(GenerationError, match=r"This model does not take a mask\."):
        given.named(pipe(), 128, 96)
    with pytest.raises(GenerationError, match=r"This model does not take a picture\."):
        GivenImages(picture()).named(pipe(image=None), 128, 96)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mask": picture()}, "A mask goes with a picture"),
        ({"strength": 0.5}, "A strength goes with a picture"),
        ({"image": picture(), "strength": 0.0}, "above 0 and at most 1, not 0.0"),
        ({"image": picture(), "strength": float("nan")}, "above 0 and at most 1"),
        ({"control": ["canny"]}, "write TYPE=FILE:SCALE"),
        ({"control": ["canny=a.png:99"]}, "scale of canny must be between 0 and 10"),
        ({"control": "canny=a.png"}, "control must be a list"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(options: dict, words: str) -> None:
    with pytest.raises(GenerationError, match=words):
        GivenImages.of(options)


def test_masks_of_another_size_and_unknown_controls_are_refused() -> None:
    given = GivenImages(picture(), mask=picture(32, 32))
    with pytest.raises(GenerationError, match="mask is 32x32 and the picture 64x48"):
        given.named(pipe(mask="inpaint_mask"), 64, 48)
    control, _ = GivenImages.of({"control": ["canny=edges.png:0.5"]})
    with pytest.raises(GenerationError, match="no ControlNet 'canny': this base model has none"):
        control.named(pipe(control="controlnet_inputs"), 64, 48)


def test_controls_are_read_from_text() -> None:
    control = parse_control("depth=C:/maps/a=b.png:0.75")
    assert (control.kind, control.image, control.scale) == ("depth", Path("C:/maps/a=b.png"), 0.75)
    assert parse_control("canny=edges.png").scale == 1.0


def test_files_that_are_no_pictures_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "a.png"
    text.write_text("no picture", encoding="utf-8")
    for file in (text, tmp_path / "none.png", tmp_path):
        with pytest.raises(GenerationError, match=r"The picture .* cannot be read"):
            read_image(file, "The picture")
    with pytest.raises(GenerationError, match="mode F, which has no RGB picture"):
        read_image(Image.new("F", (8, 8)), "The picture")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_other_modes_become_rgb_on_white(mode: str) -> None:
    image = read_image(Image.new(mode, (4, 4)), "The picture")
    assert image.mode == "RGB" and image.size == (4, 4)
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert read_image(clear, "The picture").getpixel((0, 0)) == (255, 255, 255)


def test_facts_tell_pictures_apart() -> None:
    one, same = GivenImages(picture()), GivenImages(picture())
    other = GivenImages(picture().transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert one.facts() == same.facts() != other.facts()
    assert one.facts()["strength"] == 0.6 and GivenImages().facts() == {}
