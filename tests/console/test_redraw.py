"""Pictures to start from, sent over HTTP or dropped on the page."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from autolora.console.page import PICTURE, VALUES, Forms
from autolora.errors import AutoLoRAError
from tests.console.asking import ask
from tests.console.test_page import values


def sent(width: int = 64, height: int = 64) -> str:
    rng = np.random.default_rng(2)
    out = io.BytesIO()
    pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, format="PNG")
    return base64.b64encode(out.getvalue()).decode("ascii")


def test_a_sent_picture_is_redrawn(client) -> None:
    def pixels(**more) -> tuple[np.ndarray, dict]:
        body = {"prompt": "a neon elephant", "steps": 2, "automatic": False, **more}
        answer = client.post("/api/generate", json=body)
        assert answer.status_code == 200, answer.text
        (picture,) = answer.json()["pictures"]
        png = Image.open(io.BytesIO(base64.b64decode(picture["png"])))
        return np.asarray(png.convert("RGB"), dtype=float), picture["report"]

    start = np.asarray(Image.open(io.BytesIO(base64.b64decode(sent()))), dtype=float)
    plain, report = pixels(seed=1)
    assert "images" not in report
    little, report = pixels(seed=1, init_image=sent(), strength=0.05)
    assert report["images"]["strength"] == 0.05
    much, _ = pixels(seed=1, init_image=f"data:image/png;base64,{sent()}", strength=1.0)
    assert np.abs(little - much).mean() > 1 and not np.array_equal(little, plain)
    again, _ = pixels(seed=1, init_image=sent(), strength=0.05)
    assert np.array_equal(little, again) and little.shape == start.shape


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"init_image": "no base64!"}, "init_image must be a picture as base64"),
        ({"init_image": "bm8gcGljdHVyZQ=="}, "init_image cannot be read"),
        ({"init_image": "/etc/hostname"}, "init_image"),
        ({"init_image": 5}, "init_image must be a picture as base64"),
        ({"mask": sent()}, "A mask goes with a picture"),
        ({"control": [{"type": "canny"}]}, 'needs an "image"'),
        ({"control": ["canny=a.png"]}, "control must be a list of objects"),
        ({"init_image": sent(), "strength": 2.0}, "above 0 and at most 1"),
    ],
)
def test_what_is_no_picture_is_one_sentence(fields: dict, words: str) -> None:
    with pytest.raises(AutoLoRAError, match=words):
        ask("a cat", **fields)


def test_the_page_redraws_a_dropped_picture_in_its_own_shape(studio) -> None:
    forms = Forms(studio)
    picture = Image.new("RGB", (300, 150), "red")
    order = forms.order(*values(size="64x64"), picture, 0.4)
    given = order.images()
    assert len(PICTURE) == 2 and len(VALUES) == len(values())
    assert (order.width, order.height) == (96, 48) == given.image.size
    assert given.strength == 0.4
    assert forms.order(*values(), None, 0.4).images().image is None
    assert order.without_images().init_image is None
