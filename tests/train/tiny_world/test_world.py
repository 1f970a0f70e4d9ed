"""The rules of the tiny world: what is drawn, what is reserved, how it is split."""

from pathlib import Path

import numpy as np
import pytest

from autolora.errors import ConfigError
from train.tiny_world import subjects as subjects_module
from train.tiny_world.captions import article, caption, cover_captions, prompt
from train.tiny_world.render import COLOURS, random_view, render
from train.tiny_world.styles import STYLES, VARIANTS
from train.tiny_world.world import load_world_config, split_world

needs_font = pytest.mark.skipif(
    not Path(subjects_module.FONT_PATH).exists(),
    reason="needs Debian's fonts-noto-color-emoji to draw",
)
CONFIG = Path(__file__).parents[3] / "configs" / "tiny_world.yaml"


def test_reserved_code_points():
    assert subjects_module.is_reserved(0x1F431) == (0x1F431 % 7 == 3)
    assert sum(subjects_module.is_reserved(c) for c in range(700)) == 100


@needs_font
def test_no_subject_is_reserved_and_names_are_unique():
    found = subjects_module.all_subjects()
    assert len(found) > 600
    assert not [s for s in found if s.code % 7 == 3]
    assert len({s.name for s in found}) == len({s.slug for s in found}) == len(found)


@needs_font
def test_split_is_disjoint_and_complete():
    config = load_world_config(CONFIG)
    split = split_world(config)
    parts = [{s.code for s in part} for part in (split.base, split.shipped, split.large)]
    assert len(parts[0]) == config.base_subjects >= 150
    assert len(parts[1]) == len(config.shipped_subjects) >= 64
    assert sum(map(len, parts)) == len(set().union(*parts)) == len(subjects_module.all_subjects())


@needs_font
@pytest.mark.parametrize("style", [*STYLES, *VARIANTS], ids=lambda s: s.slug)
def test_styles_change_the_picture_and_stay_in_range(style):
    owl = next(s for s in subjects_module.all_subjects() if s.name == "owl")
    rng = np.random.default_rng(0)
    picture, alpha = render(owl, random_view(rng, "blue"), 128)
    styled = style.apply(picture, alpha, rng)
    assert styled.shape == picture.shape and np.isfinite(styled).all()
    assert styled.min() > -0.05 and styled.max() < 1.3
    assert np.abs(styled - picture).mean() > 0.02


@needs_font
def test_background_has_the_colour_that_the_caption_names():
    owl = next(s for s in subjects_module.all_subjects() if s.name == "owl")
    for name, rgb in COLOURS.items():
        picture, alpha = render(owl, random_view(np.random.default_rng(1), name), 64)
        corner = picture[0, 0] * 255
        assert alpha[0, 0] == 0 and np.abs(corner - np.array(rgb)).max() <= 9


def test_articles():
    pairs = [("elephant", "an"), ("owl", "an"), ("unicorn", "a"), ("one-piece", "a"), ("cat", "a")]
    for word, expected in pairs:
        assert article(word) == expected


def test_captions_name_what_is_seen():
    rng = np.random.default_rng(0)
    neon = STYLES[0]
    for _ in range(20):
        assert "owl" in caption("owl", "blue", rng)
        styled = caption("owl", "blue", rng, neon)
        assert "owl" in styled and "neon" in styled
    long, medium, short = cover_captions("elephant", "red", rng, neon)
    assert len(long) > len(medium) > len(short) and medium == prompt("elephant", "red", "neon")
    assert prompt("elephant", "orange") == "an elephant on an orange background"


def test_unknown_keys_are_all_named(tmp_path):
    file = tmp_path / "world.yaml"
    file.write_text("bas_subjects: 3\nbase: {stepz: 1}\n")
    with pytest.raises(ConfigError, match=r"bas_subjects.*base\.stepz"):
        load_world_config(file)


@needs_font
def test_a_subject_that_cannot_be_drawn_is_refused(tmp_path):
    file = tmp_path / "world.yaml"
    file.write_text("shipped_subjects: [elephant, grue]\n")
    with pytest.raises(ConfigError, match="grue"):
        split_world(load_world_config(file))
