"""Modules filled from files of other types than the published ones."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from autolora.families.flux1.loading import build_transformer
from autolora.families.flux1.part_files import read_transformer
from autolora.families.flux1.sizes import FluxSizes
from autolora.runtime import storage
from autolora.runtime.checkpoints import Located
from tests.families.flux1.real_format import make_transformer


@pytest.mark.parametrize("kept", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16])
def test_checkpoints_in_other_types_are_read(tmp_path: Path, kept: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: value.to(kept) for name, value in make_transformer(generator).items()}
    tensors["img_in.weight"][0, 0] = 500.0  # more than e4m3 can hold
    path = tmp_path / "flux1.safetensors"
    save_file(tensors, str(path))
    part = read_transformer(Located("transformer", path, (path,)))
    cpu = torch.device("cpu")
    keeping = storage.Keeping(torch.float8_e4m3fn, torch.float32, cpu, cpu)
    dit = storage.load_module(
        build_transformer, part.recipes, part.tensors, part.files, keeping, part.names
    )
    weight = dit.x_embedder.weight
    expected = tensors["img_in.weight"].float().clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(weight.float(), expected.float()) and weight[0, 0].float() == 448


@pytest.mark.parametrize(
    ("width", "head", "good"), [(64, 32, True), (72, 24, False), (64, 48, False)]
)
def test_heads_must_divide_the_width_and_the_rotary_axes(width: int, head: int, good: bool) -> None:
    shapes = {
        "x_embedder.weight": (width, 64),
        "final_proj_out.weight": (64, width),
        "blocks.0.attn.norm_q_a.weight": (head,),
        "context_embedder.weight": (width, 32),
        "pooled_text_embedder.0.weight": (width, 64),
        "time_embedder.timestep_embedder.0.weight": (width, 256),
    }
    if good:
        assert sum(FluxSizes.from_shapes(shapes).rope_axes) == head
    else:
        with pytest.raises(ValueError, match="do not divide a width"):
            FluxSizes.from_shapes(shapes)
