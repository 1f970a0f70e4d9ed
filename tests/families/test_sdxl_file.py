"""SDXL in one file, as most of its finetunes are shared, is the model in diffusers' folders."""

from pathlib import Path

import torch

from autolora.config import CheckpointSettings, PipelineConfig
from autolora.doctor import examine
from autolora.families.detect import layer_table
from autolora.families.headers import model_sizes
from autolora.families.load import load_pipeline
from autolora.fusion import layer_shapes as shapes_of
from autolora.runtime.checkpoints import locate
from tests.families.conftest import Model
from tests.families.sgm import write_one_file
from tests.families.small import write_sdxl


def test_one_file_is_the_model_in_folders(tmp_path: Path) -> None:
    folders = write_sdxl(tmp_path / "folders", layers=2)
    root = write_one_file(folders, tmp_path / "one")
    settings = {"kind": "sdxl", "storage": "float32", "device": "cpu"}
    by_folders = load_pipeline(PipelineConfig("a", weights=folders, **settings))
    base = CheckpointSettings(base=str(root))
    config = PipelineConfig(
        "b", weights=root / "anything-xl.safetensors", checkpoint=base, **settings
    )
    by_file = load_pipeline(config)
    for name in ("unet", "text_encoder", "text_encoder_2", "vae"):
        ours, theirs = getattr(by_file, name).state_dict(), getattr(by_folders, name).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items()), name
    family = by_file.family
    a, b = (Model(family, pipe, root).latents() for pipe in (by_file, by_folders))
    assert torch.equal(a, b)
    found = examine(config)
    assert found["problems"] == [] and found["needs"]
    sizes = model_sizes(family, locate(config, family.parts))
    assert sizes is not None
    shapes = layer_table("sdxl").canonical(sizes.denoiser.weights)
    expected = {name: tuple(shape) for name, shape in shapes_of(by_file.unet).items()}
    assert shapes == expected
