"""Fixtures: a random tiny FLUX, a small pool for it, and a configuration that joins them.

Nothing here reads the weights that the package ships.
"""

import os
from pathlib import Path

import pytest
import yaml

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[1]
SHAPES_RANK = 4


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the smallest tiny FLUX with random weights (imports DiffSynth, once)."""
    import torch

    from autolora.families.tiny.model import TinyDecoder, TinyEncoder, TinyFluxConfig, TinyFluxDiT
    from autolora.families.tiny.weights import save_tiny

    torch.manual_seed(0)
    config = TinyFluxConfig(
        width=64, heads=2, rope_axes=(8, 12, 12), double_blocks=1, single_blocks=2, size=64
    )
    dit = TinyFluxDiT(config)
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    parts = {"dit": dit, "encoder": TinyEncoder(), "decoder": TinyDecoder()}
    path = tmp_path_factory.mktemp("tiny") / "random.safetensors"
    save_tiny(path, config, parts, {"made_by": "tests/conftest.py"})
    return path


@pytest.fixture(scope="session")
def tiny_shapes(tiny_weights: Path) -> dict[str, tuple[int, int]]:
    """Shapes ``(out, in)`` of the random model's linear layers by canonical name."""
    from autolora.families.flux1.layers import LAYERS
    from autolora.families.tiny.weights import load_tiny

    return LAYERS.shapes(load_tiny(tiny_weights)[1]["dit"])


def random_factors(shapes, seed, rank=SHAPES_RANK, scale=0.5):
    """Factors that change what the random model draws, for the layers inside its blocks."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return {
        layer: (
            torch.randn(rank, inner, generator=generator) / inner**0.5,
            torch.randn(outer, rank, generator=generator) * scale,
        )
        for layer, (outer, inner) in shapes.items()
        if "blocks." in layer
    }


@pytest.fixture(scope="session")
def make_pool(tiny_shapes):
    """A function that writes a pool: an elephant, a neon style, a rocket without metadata."""
    from autolora.lora import save_lora

    def write(folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        header = {"modelspec.title": "Elephant", "modelspec.trigger_phrase": "elphnt animal"}
        save_lora(folder / "elephant.safetensors", random_factors(tiny_shapes, 1), metadata=header)
        save_lora(folder / "neon.safetensors", random_factors(tiny_shapes, 2), "diffusers")
        (folder / "neon.json").write_text(
            '{"activation text": "neon", "preferred weight": 0.7}', encoding="utf-8"
        )
        save_lora(folder / "rocket.safetensors", random_factors(tiny_shapes, 3), "diffsynth")
        return folder

    return write


@pytest.fixture
def make_config(tmp_path: Path, tiny_weights: Path):
    """A function that writes a configuration for the random model; returns its path."""

    def write(**changes) -> Path:
        values = {
            "name": "random",
            "kind": "tiny",
            "weights": str(tiny_weights),
            "pool": "pool",
            "index": "index",
            "steps": 2,
            "width": 64,
            "height": 64,
            **changes,
        }
        path = tmp_path / "random.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    return write


@pytest.fixture
def home(tmp_path: Path, make_config, make_pool, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a pool and a configuration, which the environment names."""
    make_pool(tmp_path / "pool")
    monkeypatch.setenv("AUTOLORA_MODEL", str(make_config()))
    monkeypatch.chdir(tmp_path)
    return tmp_path
