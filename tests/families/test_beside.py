"""ControlNets and IP-Adapters beside a model with adapters: the same as DiffSynth's own call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from autolora.config import CheckpointSettings, PipelineConfig
from autolora.errors import ConfigError, GenerationError
from autolora.families.beside import load_beside
from autolora.fusion import attached, linear_shapes
from autolora.images import Control, GivenImages
from tests.families.conftest import SIDE, Model
from tests.families.test_adapters import assert_close, fused_by_diffsynth
from tests.families.test_sampling import picture
from tests.fusion.reference import random_adapter


@pytest.fixture
def put() -> Iterator[Callable[[Any, str, Any], None]]:
    """Give a pipeline another part until the test ends."""
    before = []

    def change(pipe: Any, name: str, value: Any) -> None:
        before.append((pipe, name, getattr(pipe, name, None)))
        setattr(pipe, name, value)

    yield change
    for pipe, name, value in reversed(before):
        setattr(pipe, name, () if name == "controlnets" else value)


@pytest.fixture
def adapters() -> Callable[[Model], list]:
    def make(small: Model) -> list:
        shapes = {n: s for n, s in linear_shapes(small.denoiser).items() if "0" in n.split(".")}
        return [(random_adapter("adapter", shapes, 4, 1), 0.8)]

    return make


def same_with_adapters(small: Model, adapters: list, inputs: dict) -> None:
    plain = small.latents()
    assert torch.equal(small.latents(inputs=inputs), small.theirs(**inputs))
    with fused_by_diffsynth(small, adapters):
        theirs = small.theirs(**inputs)
    with attached(small.denoiser, adapters, "sum"):
        ours = small.latents(inputs=inputs)
    assert_close(ours, theirs)
    assert (ours - plain).abs().max() > 0.01


class SmallControlNet(nn.Module):
    """Residuals for every block from the conditioning, in the shapes that FLUX.1's gives."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(64, width)

    def forward(self, hidden_states, controlnet_conditioning, **inputs):
        b, c, h, w = controlnet_conditioning.shape
        tokens = controlnet_conditioning.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
        residual = self.out(tokens.reshape(b, h * w // 4, 4 * c))
        return [residual] * 2, [residual] * 3


def test_flux1_with_a_controlnet(load_small, adapters, put) -> None:
    from diffsynth.pipelines.flux_image import MultiControlNet

    small = load_small("flux1")
    torch.manual_seed(0)
    net = SmallControlNet(small.denoiser.x_embedder.out_features).requires_grad_(False)
    put(small.pipe, "controlnet", MultiControlNet([net]))
    put(small.pipe, "controlnets", ("canny",))
    given = GivenImages(control=(Control("canny", picture(), 0.7),))
    named = given.named(small.pipe, SIDE, SIDE)
    assert named["controlnet_inputs"][0].scale == 0.7
    same_with_adapters(small, adapters(small), named)
    with pytest.raises(GenerationError, match="no ControlNet 'depth': this base model has canny"):
        GivenImages(control=(Control("depth", picture()),)).named(small.pipe, SIDE, SIDE)


def test_qwen_image_with_a_controlnet(load_small, adapters, put) -> None:
    from diffsynth.models.qwen_image_controlnet import QwenImageBlockWiseControlNet
    from diffsynth.pipelines.qwen_image import QwenImageBlockwiseMultiControlNet

    small = load_small("qwen_image")
    torch.manual_seed(0)
    net = QwenImageBlockWiseControlNet(num_layers=2, dim=128).requires_grad_(False)
    joined = QwenImageBlockwiseMultiControlNet([net])
    put(small.pipe, "blockwise_controlnet", joined)
    put(small.pipe, "controlnets", ("canny",))
    given = GivenImages(control=(Control("canny", picture()),))
    same_with_adapters(small, adapters(small), given.named(small.pipe, SIDE, SIDE))


def test_flux1_with_an_ip_adapter(load_small, adapters, put) -> None:
    from diffsynth.models.flux_ipadapter import FluxIpAdapter

    small = load_small("flux1")
    sizes = small.denoiser.sizes
    torch.manual_seed(0)
    blocks = sizes.double_blocks + sizes.single_blocks
    adapter = FluxIpAdapter(sizes.heads, sizes.head_dim, 32, 4, blocks).requires_grad_(False)
    features = torch.randn(1, 1152)
    put(small.pipe, "ipadapter", adapter)
    encoder = SimpleNamespace(pooler_output=features)
    put(small.pipe, "ipadapter_image_encoder", lambda images: encoder)
    inputs = {"ipadapter_images": [picture()], "ipadapter_scale": 0.5}
    same_with_adapters(small, adapters(small), inputs)


def test_kontext_takes_reference_pictures(load_small, adapters) -> None:
    small = load_small("flux1")
    same_with_adapters(small, adapters(small), {"kontext_images": [picture(32)]})


def test_flux2_takes_pictures_to_edit(load_small, adapters) -> None:
    small = load_small("flux2")
    inputs = {"edit_image": [picture(32)], "edit_image_auto_resize": False}
    same_with_adapters(small, adapters(small), inputs)


def test_models_beside_are_loaded_by_diffsynth(
    load_small, put, monkeypatch, tmp_path: Path
) -> None:
    small = load_small("flux1")
    seen = []

    def auto_load(pool, path, vram_config) -> None:
        seen.append((Path(path).name, vram_config["computation_dtype"]))
        if "unknown" in path:
            raise ValueError("Cannot detect the model type.")
        pool.model.append(nn.Linear(2, 2))

    monkeypatch.setattr("diffsynth.models.model_loader.ModelPool.auto_load_model", auto_load)
    for attribute in ("controlnet", "ipadapter"):
        put(small.pipe, attribute, None)
    put(small.pipe, "controlnets", ())
    for name in ("canny", "ip", "unknown"):
        (tmp_path / f"{name}.safetensors").touch()
    files = {name: str(tmp_path / f"{name}.safetensors") for name in ("canny", "ip", "unknown")}
    config = PipelineConfig("a", kind="flux1")

    def load(**settings) -> None:
        checkpoint = CheckpointSettings(**settings)
        load_beside(small.pipe, replace(config, checkpoint=checkpoint), "controlnet", nn.ModuleList)

    load(controlnets={"canny": files["canny"]}, beside={"ipadapter": files["ip"]})
    assert seen == [("ip.safetensors", torch.float32), ("canny.safetensors", torch.float32)]
    assert small.pipe.controlnets == ("canny",) and small.pipe.ipadapter is not None
    with pytest.raises(ConfigError, match="no place for a model named 'wings'"):
        load(beside={"wings": files["ip"]})
    with pytest.raises(ConfigError, match=r"DiffSynth cannot load .*unknown.* beside FLUX.1"):
        load(controlnets={"x": files["unknown"]})
    with pytest.raises(ConfigError, match=r"lacks files: canny at .*gone"):
        load(controlnets={"canny": str(tmp_path / "gone.safetensors")})
    with pytest.raises(ConfigError, match=r"canny below .*get them with `modelscope download"):
        load(controlnets={"canny": "owner/name:canny.safetensors"})
