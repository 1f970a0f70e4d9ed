"""How generated pictures are counted."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from autolora.errors import ConfigError
from train.tiny_world.evaluation import (
    Case,
    Count,
    Scorer,
    high_frequencies,
    interval,
    read_people_prompts,
)
from train.tiny_world.probes import (
    PLAIN,
    FeatureJudge,
    Probe,
    discriminant,
    load_judge,
    name_of,
    save_judge,
)
from train.tiny_world.styles import STYLES
from train.tiny_world.vocabulary import group_names

PEOPLE = Path(__file__).parents[2] / "data" / "people_prompts.yaml"


class Colours:
    """A judge that names the colour of the middle of what it is shown."""

    subjects, styles = ["red", "green", "blue"], [PLAIN, "dark"]

    def __call__(self, pictures):
        middle = pictures[:, :, 60:68, 60:68].mean((2, 3))
        dark = pictures.mean((1, 2, 3)) < -0.9
        return middle, torch.stack([~dark, dark], 1).float()


def test_wilson_interval_against_its_definition():
    """Its ends are the shares from which the count lies 1.96 standard errors away."""
    for right, total in ((3, 10), (50, 60), (1, 1000)):
        for end in interval(right, total):
            error = (end * (1 - end) / total) ** 0.5
            assert abs(right / total - end) == pytest.approx(1.96 * error, rel=1e-6)
    assert interval(0, 20)[0] == 0 and interval(20, 20)[1] == pytest.approx(1)


def test_two_things_are_seen_through_windows():
    picture = torch.full((3, 128, 128), -1.0)
    picture[0, 20:110, 4:60] = 1
    picture[2, 20:110, 68:124] = 1
    seen, _ = name_of(Colours(), picture, windows=True)
    assert {"red", "blue"} <= seen
    assert len(name_of(Colours(), picture)[0]) == 1


def test_a_case_is_right_only_where_all_is_visible():
    from PIL import Image

    scorer = Scorer(None, None, {"colours": Colours()}, None)
    pictures = {"red": (255, 0, 0), "green": (0, 255, 0)}
    cases = [
        Case("a red thing", ("red",), PLAIN, ()),
        Case("another", ("blue",), PLAIN, ()),
        Case("two", ("red", "green"), PLAIN, ()),
        Case("dark", ("green",), "dark", ()),
    ]
    shown = ["red", "green", "red", "green"]
    rows = scorer.judge_all(
        cases, lambda case, seed: Image.new("RGB", (128, 128), pictures[shown[seed]])
    )
    assert rows["pictures"] == 4
    assert rows["subject"]["colours"][0] == 0.5
    assert rows["style"]["colours"][0] == 0.75
    assert rows["both"]["colours"][0] == 0.25


def test_counts_keep_judges_apart():
    count = Count(total=4)
    for answer in (True, True, False, True):
        count.add("one", both=answer)
        count.add("other", both=not answer)
    assert count.shares()["both"]["one"][0] == 0.75
    assert count.shares()["both"]["other"][0] == 0.25


def test_high_frequencies_by_a_plain_wave():
    """A wave of wavelength 3 lies above the limit, one of 8 below it."""
    x = torch.arange(48).float()
    waves = [torch.cos(2 * np.pi * x / n).expand(3, 48, 48)[None] for n in (3, 8)]
    assert high_frequencies(waves[0]) > 100 * high_frequencies(waves[1])


def test_the_discriminant_is_the_bayes_rule_of_gaussians():
    torch.manual_seed(0)
    mix = torch.randn(4, 4)
    means = torch.randn(3, 4) * 2
    labels = torch.arange(6000) % 3
    x = means[labels] + torch.randn(6000, 4) @ mix
    layer = discriminant(x, labels, 3, shrink=0.0)
    precision = torch.linalg.inv(mix.T @ mix)
    offset = (means[:, None] - x[None]) @ precision
    best = ((means[:, None] - x[None]) * offset).sum(-1).argmin(0)
    assert (layer(x).argmax(1) == best).float().mean() > 0.985


@pytest.mark.parametrize("kind", [Probe, FeatureJudge])
def test_a_judge_is_read_as_it_was_written(tmp_path, kind):
    torch.manual_seed(0)
    judge = kind(["owl", "crab"], [PLAIN, "neon"]).half().float().eval()
    save_judge(judge, tmp_path / "judge.safetensors")
    again = load_judge(tmp_path / "judge.safetensors")
    assert type(again) is kind and (again.subjects, again.styles) == (judge.subjects, judge.styles)
    for name, value in judge.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    (tmp_path / "judge.safetensors").write_bytes(b"no")
    with pytest.raises(ConfigError, match="--stage judges"):
        load_judge(tmp_path / "judge.safetensors")


def test_the_list_of_people_names_subjects_and_styles_that_there_are():
    cases = read_people_prompts(PEOPLE)
    known = {*group_names("base"), *group_names("loras")}
    assert len(cases) >= 150 and len({c.text for c in cases}) == len(cases)
    assert not {s for c in cases for s in c.subjects} - known
    assert not {c.style for c in cases} - {PLAIN, *(s.name for s in STYLES)}


def test_an_entry_without_what_it_shows_is_refused(tmp_path):
    file = tmp_path / "prompts.yaml"
    file.write_text(yaml.safe_dump([{"prompt": "a cat"}]))
    with pytest.raises(ConfigError, match="shows"):
        read_people_prompts(file)
