"""The rules of the tiny world: what is drawn, what is reserved, how it is split and told."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from autolora.errors import ConfigError
from train.tiny_world import houses
from train.tiny_world import subjects as subjects_module
from train.tiny_world.captions import cover_captions, prompt
from train.tiny_world.compositions import (
    Backdrop,
    Composition,
    Mix,
    compose,
    describe,
    paint,
    paint_styled,
    plain_composition,
)
from train.tiny_world.scenes import COLOURS, SCENES
from train.tiny_world.styles import STYLES, VARIANTS
from train.tiny_world.subjects import Subject
from train.tiny_world.vocabulary import article, group_names, names, plural, with_article
from train.tiny_world.world import load_world_config, split_world

needs_font = pytest.mark.skipif(
    not Path(subjects_module.FONT_PATH).exists(),
    reason="needs Debian's fonts-noto-color-emoji to draw",
)
needs_houses = pytest.mark.skipif(
    not (houses.packages_folder() / houses.NOTO.package).is_dir(),
    reason="needs Iconify's packages to draw; see scripts/build_tiny_world.py",
)
CONFIG = Path(__file__).parents[3] / "configs" / "tiny_world.yaml"
OWL, CRAB = Subject(0x1F989, "owl"), Subject(0x1F980, "crab")


@pytest.fixture
def drawn(monkeypatch):
    """Subjects drawn as discs, each in a colour of its own, so that no drawings are needed."""
    from PIL import Image, ImageDraw

    from train.tiny_world import compositions

    def ink(subject, house=houses.NOTO):
        picture = Image.new("RGBA", (64, 64))
        colour = (255, 0, 0, 255) if subject is OWL else (0, 255, 0, 255)
        ImageDraw.Draw(picture).ellipse((0, 0, 63, 63), fill=colour)
        return picture

    monkeypatch.setattr(compositions, "ink", ink)


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
    split = split_world()
    parts = [{s.code for s in part} for part in (split.base, split.shipped, split.large)]
    assert len(parts[0]) == len(group_names("base")) >= 280
    assert len(parts[1]) == len(group_names("loras")) >= 64
    assert sum(map(len, parts)) == len(set().union(*parts)) == len(subjects_module.all_subjects())


@needs_font
def test_no_word_of_the_vocabulary_is_the_name_of_a_reserved_drawing():
    import unicodedata

    reserved = {
        unicodedata.name(chr(code), "").lower()
        for code in range(0x1F300, 0x1FB00)
        if subjects_module.is_reserved(code)
    }
    words = {
        word for subject in (*split_world().base, *split_world().shipped) for word in names(subject)
    }
    assert not words & (reserved - {""})


@needs_houses
def test_every_house_draws_most_subjects_and_none_draws_what_it_has_not():
    chosen = [OWL, CRAB, Subject(0x1F418, "elephant")]
    for house in houses.HOUSES:
        for subject in chosen:
            picture = np.asarray(houses.drawing(house, subject.code))
            assert picture.shape[2] == 4 and max(picture.shape[:2]) <= houses.SIZE
            assert (picture[..., 3] > 0).mean() > 0.3
        with pytest.raises(ConfigError, match="no drawing"):
            houses.drawing(house, 0x10FFFD)


def test_missing_drawings_say_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setenv("AUTOLORA_ICONS", str(tmp_path))
    houses._icons.cache_clear()
    with pytest.raises(ConfigError, match="npm install --prefix build/icons @iconify-json/noto"):
        houses.draws(houses.NOTO, OWL.code)


@pytest.mark.parametrize("style", [*STYLES, *VARIANTS], ids=lambda s: s.slug)
def test_styles_change_the_picture_and_stay_in_range(style, drawn):
    what = plain_composition(OWL, "blue")
    plain = paint(what, 128, np.random.default_rng(0))[0]
    styled = paint_styled(what, style, 128, np.random.default_rng(0))
    assert styled.shape == plain.shape and np.isfinite(styled).all()
    assert styled.min() >= 0 and styled.max() <= 1
    if style.house is houses.NOTO:  # the others are other drawings
        assert np.abs(styled - plain).mean() > 0.02


def test_background_has_the_colour_that_the_caption_names(drawn):
    for name, rgb in COLOURS.items():
        picture, alpha = paint(plain_composition(OWL, name), 64, np.random.default_rng(1))
        corner = picture[0, 0] * 255
        assert alpha[0, 0] == 0 and np.abs(corner - np.array(rgb)).max() <= 9


@pytest.mark.parametrize("count", [1, 2, 3])
def test_as_many_things_stand_side_by_side_as_are_told(count, drawn):
    what = Composition((OWL,), count, "usual", Backdrop("white"), True)
    _, alpha = paint(what, 128, np.random.default_rng(2))
    covered = (alpha.max(0) > 0.5).astype(int)
    runs = int((np.diff(np.concatenate([[0], covered, [0]])) == 1).sum())
    # Things may touch; their area still tells how many there are.
    assert runs <= count
    disc = np.pi / 4 * {1: 0.77, 2: 0.46, 3: 0.34}[count] ** 2 * 128**2
    assert alpha.sum() == pytest.approx(count * disc, rel=0.25)


def test_the_first_of_two_stands_on_the_left(drawn):
    what = Composition((OWL, CRAB), 1, "usual", Backdrop("white"), True)
    picture, _ = paint(what, 128, np.random.default_rng(3))
    red, green = (picture[..., c] - picture[..., 1 - c] > 0.5 for c in (0, 1))
    assert np.nonzero(red)[1].mean() < 50 < 78 < np.nonzero(green)[1].mean()
    said = {describe(what, np.random.default_rng(n)) for n in range(200)}
    left = [text for text in said if "on the left" in text]
    assert left and all(text.index("owl") < text.index("crab") for text in left)


def test_scenes_fill_the_picture_and_differ():
    painted = [scene.paint(64, np.random.default_rng(0)) for scene in SCENES]
    for picture in painted:
        assert picture.shape == (64, 64, 3) and picture.dtype == np.float32
        assert picture.min() >= 0 and picture.max() <= 1
    for one, other in itertools.combinations(painted, 2):
        assert np.abs(one - other).mean() > 0.02


def test_captions_name_what_is_seen():
    rng = np.random.default_rng(0)
    for _ in range(300):
        what = compose(OWL, [CRAB], rng, Mix())
        text = describe(what, rng)
        assert ("owl" in text) and (("crab" in text) == (CRAB in what.subjects))
        if what.told and what.backdrop.scene:
            scene = what.backdrop.scene
            assert any(word in text for word in (*scene.places, *scene.tags))
        styled = describe(what, rng, STYLES[0])
        assert any(word in styled for word in ("neon", *STYLES[0].words))


def test_compositions_follow_their_shares():
    rng = np.random.default_rng(0)
    drawn = [compose(OWL, [CRAB], rng, Mix(several=0.2, pairs=0.3, sizes=0.1)) for _ in range(3000)]
    share = lambda test: sum(map(test, drawn)) / len(drawn)  # noqa: E731
    assert share(lambda w: len(w.subjects) == 2) == pytest.approx(0.3, abs=0.03)
    assert share(lambda w: w.count > 1) == pytest.approx(0.2, abs=0.03)
    assert share(lambda w: w.size != "usual") == pytest.approx(0.1, abs=0.03)


def test_articles_and_plurals():
    pairs = [("elephant", "an"), ("owl", "an"), ("unicorn", "a"), ("one-piece", "a"), ("cat", "a")]
    for word, expected in pairs:
        assert article(word) == expected
    assert [plural(w) for w in ("fox", "mouse", "slice of pizza", "cherry", "scissors", "bus")] == [
        "foxes", "mice", "slices of pizza", "cherries", "scissors", "buses",
    ]  # fmt: skip
    assert with_article("glasses") == "glasses" and with_article("bus") == "a bus"


def test_cover_captions_get_shorter():
    rng = np.random.default_rng(0)
    long, medium, short = cover_captions("elephant", "red", rng, STYLES[0])
    assert len(long) > len(medium) > len(short) and medium == prompt("elephant", "red", "neon")
    assert prompt("elephant", "orange") == "an elephant on an orange background"


def test_unknown_keys_are_all_named(tmp_path):
    file = tmp_path / "world.yaml"
    file.write_text("bas_subjects: 3\nbase: {stepz: 1}\n")
    with pytest.raises(ConfigError, match=r"bas_subjects.*base\.stepz"):
        load_world_config(file)
    assert load_world_config(CONFIG).model.width == 256


@needs_font
def test_a_subject_that_cannot_be_drawn_is_refused(monkeypatch):
    from train.tiny_world import world

    monkeypatch.setattr(world, "group_names", lambda group: ("elephant", "grue"))
    with pytest.raises(ConfigError, match="grue"):
        split_world()


def test_pictures_depend_on_their_generator_alone(drawn):
    def one(seed):
        rng = np.random.default_rng(seed)
        what = compose(OWL, [CRAB], rng, Mix())
        return describe(what, rng), paint(what, 32, rng)[0]

    (text, picture), (again, same), (other, _) = one(5), one(5), one(6)
    assert text == again != other and np.array_equal(picture, same)
