"""Files of one family in another's configuration, half of a file, and files that are not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from autolora.config import PipelineConfig
from autolora.doctor import examine
from autolora.errors import ConfigError
from autolora.families.load import load_pipeline
from autolora.families.registry import family_names, find_family
from autolora.generate.sample import Watch, decode_latents
from tests.families.conftest import Model
from tests.families.small import WRITERS


def config(kind: str, root: Path) -> PipelineConfig:
    return PipelineConfig(kind, kind=kind, weights=root, storage="float32", device="cpu")


def denoiser_files(root: Path) -> list[Path]:
    folders = [root / name for name in ("transformer", "unet") if (root / name).is_dir()]
    return sorted((folders or [root])[0].glob("*.safetensors"))


@pytest.fixture
def copied(small: Model, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small.root, tmp_path / "copy"))


def test_every_family_is_found_by_its_folder() -> None:
    assert set(WRITERS) | {"tiny"} == set(family_names())
    for name in family_names():
        family = find_family(name)
        assert family.name == name and (family.packaged is None) == bool(family.parts)
    with pytest.raises(ConfigError, match="no kind of base model named 'wan'; choose one of"):
        find_family("wan")


def test_a_checkpoint_of_another_family_is_refused_by_name(
    load_small: Callable[[str], Model], tmp_path: Path
) -> None:
    names = sorted(WRITERS)
    for name, other in zip(names, names[1:] + names[:1], strict=True):
        root = Path(shutil.copytree(load_small(name).root, tmp_path / name))
        (target,) = {file.parent for file in denoiser_files(root)}
        for file in target.iterdir():
            if file.name.startswith(("flux1", "diffusion_pytorch_model")):
                file.unlink()
        tensors = {}
        for file in denoiser_files(load_small(other).root):
            if other != "flux1" or file.name.startswith("flux1"):
                tensors |= load_file(file)
        place = target / ("flux1-x.safetensors" if name == "flux1" else "model.safetensors")
        save_file(tensors, str(place))
        title = find_family(name).title
        with pytest.raises(ConfigError, match=rf"is .*; give a (checkpoint of )?{title}"):
            load_pipeline(config(name, root))


def test_half_of_a_file_is_said_to_be_incomplete(small: Model, copied: Path) -> None:
    files = [f for f in denoiser_files(copied) if small.family.name != "flux1" or "flux1" in f.name]
    data = files[0].read_bytes()
    files[0].write_bytes(data[: len(data) // 2])
    with pytest.raises(ConfigError, match="is incomplete"):
        load_pipeline(config(small.family.name, copied))
    problems = examine(config(small.family.name, copied))["problems"]
    assert any("incomplete" in problem for problem in problems)


def test_missing_files_are_named_with_what_gets_them(small: Model, copied: Path) -> None:
    shutil.rmtree(copied / "tokenizer")
    with pytest.raises(ConfigError, match=r"lacks files: tokenizer"):
        load_pipeline(config(small.family.name, copied))


def test_doctor_knows_sizes_and_what_they_need(small: Model) -> None:
    found = examine(config(small.family.name, small.root))
    assert found["problems"] == []
    model = small.denoiser
    count = sum(t.numel() for t in model.state_dict().values())
    assert found["model"]["parameters"]["transformer"] == count
    assert found["needs"] and found["here"]["storage"] == "float32"


def test_float8_storage_draws_nearly_the_same(small: Model) -> None:
    exact = small.latents()
    settings = config(small.family.name, small.root)
    stored = load_pipeline(replace(settings, storage="float8", compute="float32"))
    kinds = {p.dtype for p in small.family.model(stored).parameters()}
    assert torch.float8_e4m3fn in kinds
    close = Model(small.family, stored, small.root).latents()
    assert 0 < (close - exact).norm() / exact.norm() < 0.7


def test_sdxl_takes_its_prediction_from_the_schedulers_settings(
    load_small: Callable[[str], Model], tmp_path: Path
) -> None:
    small = load_small("sdxl")
    assert small.pipe.scheduler.prediction_type == "epsilon"
    root = Path(shutil.copytree(small.root, tmp_path / "v"))
    (root / "scheduler").mkdir()
    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    path = root / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    pipe = load_pipeline(config("sdxl", root))
    assert pipe.scheduler.prediction_type == "v_prediction"
    assert pipe.scheduler.alphas_cumprod[-1] == 0
    model, seen = Model(small.family, pipe, root), []
    latents = model.latents(watch=Watch(preview=lambda step, image: seen.append(image)))
    assert torch.equal(latents, model.theirs())
    last = np.asarray(decode_latents(pipe, latents)[0])
    assert np.array_equal(np.asarray(seen[-1]), last)
    path.write_text(json.dumps({"prediction_type": "sample"}), encoding="utf-8")
    with pytest.raises(ConfigError, match="predicts sample, which"):
        load_pipeline(config("sdxl", root))
