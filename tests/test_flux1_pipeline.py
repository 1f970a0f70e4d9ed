"""The whole way with a small FLUX.1 in published files: pool, search, adapters, picture, shell."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from autolora.cli import main
from autolora.errors import LoRAFormatError
from autolora.pipeline import AutoLoRAPipeline
from tests.conftest import random_factors
from tests.families.flux1 import real_format


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Published files, a pool of three LoRAs in three formats, and a configuration."""
    from autolora.config import PipelineConfig
    from autolora.families.flux1 import FAMILY
    from autolora.families.flux1.part_files import flux_sizes
    from autolora.lora import save_lora
    from autolora.runtime.checkpoints import locate_part

    root = tmp_path_factory.mktemp("flux1")
    files = real_format.write(root / "files")
    part = locate_part(
        PipelineConfig("x", kind="flux1", weights=files.bfl), "transformer", FAMILY.parts
    )
    shapes = flux_sizes(part).linear_shapes()
    pool = root / "pool"
    pool.mkdir()
    factors = [random_factors(shapes, seed, scale=0.1) for seed in (1, 2, 3)]
    header = {"modelspec.title": "Rocket", "modelspec.trigger_phrase": "rckt thing"}
    save_lora(pool / "rocket.safetensors", factors[0], metadata=header)
    schnell = {"modelspec.title": "Neon", "modelspec.architecture": "flux-1-schnell/lora"}
    save_lora(pool / "neon.safetensors", factors[1], "diffusers", metadata=schnell)
    save_lora(pool / "elephant.safetensors", factors[2], "diffsynth")
    values = {
        "name": "small",
        "kind": "flux1",
        "weights": str(files.bfl),
        "pool": "pool",
        "index": "index",
        "steps": 2,
        "width": 64,
        "height": 64,
        "guidance": 3.5,
        "portrait": {"size": 64, "noises": 1, "sigmas": [1.0]},
    }
    (root / "small.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def pipe(folder: Path) -> AutoLoRAPipeline:
    return AutoLoRAPipeline.from_config(folder / "small.yaml")


def pixels(output) -> np.ndarray:
    return np.asarray(output.image, dtype=int)


def test_a_pool_is_searched_without_loading_the_transformer(pipe) -> None:
    hits = pipe.search("a neon rocket", k=3)
    assert {hit.name for hit in hits[:2]} == {"neon", "rocket"}
    assert "base" not in pipe.__dict__
    state = pipe.open_index()
    assert state.size == 3 and state.searcher.text_encoder.name.startswith("clip-64-")


def test_a_prompt_becomes_a_picture_with_the_adapters_it_asks_for(pipe, tmp_path: Path) -> None:
    out = pipe("a neon rocket", seed=1)
    used = {adapter.name: adapter for adapter in out.report.adapters}
    assert set(used) == {"neon", "rocket"}
    assert all(adapter.layers > 20 for adapter in used.values())
    assert out.prompt.startswith("a neon rocket") and "rckt thing" in out.prompt
    notes = " ".join(out.report.notes)
    assert "no trained gates" in notes and "neon was made for FLUX.1 schnell" in notes
    bare = pipe("a neon rocket", seed=1, retrieve=False)
    assert np.abs(pixels(out) - pixels(bare)).mean() > 1, "the adapters must do something"
    assert np.array_equal(pixels(pipe("a neon rocket", seed=1)), pixels(out))
    path = out.save(tmp_path / "out.png")
    assert path.stat().st_size > 1000


def test_guidance_negative_prompts_and_true_cfg(folder: Path, pipe) -> None:
    weak, strong = (pipe("a rocket", guidance=g, retrieve=False) for g in (1.0, 6.0))
    assert not np.array_equal(pixels(weak), pixels(strong)), "guidance is an input"
    plain = pipe("a rocket", guidance=1.0, retrieve=False, negative_prompt="blue")
    assert np.array_equal(pixels(plain), pixels(weak))
    assert "negative prompt has no effect" in " ".join(plain.report.notes)
    text = (folder / "small.yaml").read_text(encoding="utf-8") + "true_cfg: 3.0\n"
    (folder / "cfg.yaml").write_text(text, encoding="utf-8")
    other = AutoLoRAPipeline.from_config(folder / "cfg.yaml")
    other.__dict__["base"] = pipe.base
    pictures = [
        pixels(other("a rocket", guidance=1.0, retrieve=False, negative_prompt=words))
        for words in ("", "blue")
    ]
    assert not np.array_equal(pictures[0], pixels(weak))
    assert not np.array_equal(*pictures)


def test_portraits_can_be_taken(pipe) -> None:
    portrait = pipe._search.portrait(pipe.pool.load("rocket"))
    assert portrait.shape == (1, 1, 16, 8, 8) and portrait.abs().mean() > 1e-3


def test_a_lora_of_another_size_is_refused_by_name(folder: Path, pipe) -> None:
    from autolora.lora import save_lora

    factors = random_factors({"blocks.0.attn.a_to_qkv": (384, 128)}, 4)
    path = folder / "other.safetensors"
    save_lora(path, factors)
    from autolora import LoRA

    with pytest.raises(LoRAFormatError, match="other"):
        pipe.attach([(LoRA.load(path), 1.0)])


def test_published_gates_are_used(folder: Path, pipe) -> None:
    import torch
    from safetensors.torch import save_file

    shapes = pipe.base.dit.sizes.linear_shapes()
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{layer.replace('.', '___')}.{name}": torch.randn(out, generator=generator)
        for layer, (out, _) in shapes.items()
        if "blocks." in layer and "norm" not in layer
        for name in ("weight_base", "weight_lora", "weight_cross", "weight_out", "bias")
    }
    for key in list(tensors):
        if key.endswith(".weight_base"):
            ones = torch.ones_like(tensors[key])
            for norm in ("norm_base", "norm_lora"):
                tensors[key.replace("weight_base", f"{norm}.weight")] = ones.clone()
                tensors[key.replace("weight_base", f"{norm}.bias")] = 0 * ones
    save_file(tensors, str(folder / "gates.safetensors"))
    text = (folder / "small.yaml").read_text(encoding="utf-8") + "gate: gates.safetensors\n"
    (folder / "gated.yaml").write_text(text, encoding="utf-8")
    gated = AutoLoRAPipeline.from_config(folder / "gated.yaml")
    gated.__dict__["base"] = pipe.base
    out = gated("a neon rocket", seed=1)
    assert all(adapter.gate is not None for adapter in out.report.adapters)
    assert not np.array_equal(pixels(out), pixels(pipe("a neon rocket", seed=1)))


def test_the_shell_draws_and_examines(folder: Path, tmp_path: Path, capsys) -> None:
    model = str(folder / "small.yaml")
    target = tmp_path / "picture.png"
    assert main(["generate", "a rocket", "--model", model, "--out", str(target)]) == 0
    assert target.is_file()
    capsys.readouterr()
    assert main(["doctor", "--model", model, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == [] and found["model"]["command"] is None
    sizes = found["model"]["parameters"]
    assert sizes["transformer"] == sum(
        value.size for value in headers(folder / "files" / "bfl" / "flux1-dev.safetensors")
    )


def headers(path: Path):
    from autolora.safetensors_io import read_checkpoint_header

    return read_checkpoint_header(path).values()
