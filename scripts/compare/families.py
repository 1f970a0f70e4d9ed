"""What each loader makes of files for FLUX.2, Z-Image, Qwen-Image and SDXL.

Ours and DiffSynth's load through their public entrances. Of diffusers it is the public
``lora_state_dict`` of the family's pipeline, which converts a file to its own names; the change of
every module is then computed from what it returns.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests.lora.truth.families import FamilyFile

Change = Callable[[str], Tensor | None]

_DIFFSYNTH = {
    "flux2": "flux2_image:Flux2ImagePipeline",
    "z_image": "z_image:ZImagePipeline",
    "qwen_image": "qwen_image:QwenImagePipeline",
    "sdxl": "stable_diffusion_xl:StableDiffusionXLPipeline",
}
_DIFFUSERS = {
    "flux2": "Flux2Pipeline",
    "z_image": "ZImagePipeline",
    "qwen_image": "QwenImagePipeline",
    "sdxl": "StableDiffusionXLPipeline",
}


_ALPHA = re.compile(r"[._]lora.*$|\.alpha$")


def ours(path: Path, file: FamilyFile) -> Change:
    """AutoLoRA's reader."""
    from autolora import LoRA

    lora = LoRA.load(path)
    return lambda layer: lora.delta(layer) if layer in lora else None


def diffsynth(path: Path, file: FamilyFile) -> Change:
    """``load_lora`` of DiffSynth's pipeline onto modules of its names, fused into zeros."""
    module, _, name = _DIFFSYNTH[file.family].partition(":")
    kind = getattr(importlib.import_module(f"diffsynth.pipelines.{module}"), name)
    pipe, root = kind(device="cpu", torch_dtype=torch.float32), nn.Module()
    for layer, shape in file.layers.items():
        parent = root
        *parts, last = layer.split(".")
        for part in parts:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        made: nn.Module = nn.Linear(shape[1], shape[0])
        if len(shape) > 2:
            made = nn.Conv2d(shape[1], shape[0], (shape[2], shape[3]))
        made.weight = nn.Parameter(torch.zeros(shape), requires_grad=False)
        parent.add_module(last, made)
    with contextlib.redirect_stdout(io.StringIO()):
        pipe.load_lora(root, str(path), alpha=1)

    def change(layer: str) -> Tensor | None:
        weight: Tensor = root.get_submodule(layer).weight.detach()
        return weight if bool(weight.any()) else None

    return change


def diffusers(path: Path, file: FamilyFile) -> Change:
    """``lora_state_dict`` of diffusers' pipeline, and the products of what it returns."""
    import diffusers as library

    kind = getattr(library, _DIFFUSERS[file.family])
    options: dict[str, Any] = {}
    if file.family == "sdxl":  # as its ``load_lora_weights`` does
        options["unet_config"] = SimpleNamespace(layers_per_block=2)
    found = kind.lora_state_dict(str(path.parent), weight_name=path.name, **options)
    state, alphas = found if isinstance(found, tuple) else (found, {})
    prefix = "unet." if file.family == "sdxl" else "transformer."
    if file.family == "sdxl":
        from diffusers.utils import convert_unet_state_dict_to_peft

        inner = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        state = {prefix + k: v for k, v in convert_unet_state_dict_to_peft(inner).items()}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        module, _, role = key.removeprefix(prefix).partition(".lo")
        for name in ("lora_A", "lora_B", "lokr_w1", "lokr_w2", "hada_w1", "hada_w2"):
            if name in key and key.startswith(prefix):
                parts.setdefault(module, {})["lo" + role.removesuffix(".weight")] = tensor
    scales = _scales(alphas or {}, prefix)
    header = json.loads(file.metadata.get("lora_adapter_metadata", "{}"))

    def change(layer: str) -> Tensor | None:
        roles = parts.get(layer, {})
        A = next((t for name, t in roles.items() if name.startswith("lora_A")), None)
        B = next((t for name, t in roles.items() if name.startswith("lora_B")), None)
        if A is not None and B is not None:
            scale = scales.get(layer, float(header.get(f"{prefix}lora_alpha", len(A)))) / len(A)
            product = scale * B.double().flatten(1) @ A.double().flatten(1)
            return product.reshape(file.layers[layer])
        if "lokr_w1" in roles and "lokr_w2" in roles:
            return torch.kron(roles["lokr_w1"].double(), roles["lokr_w2"].double())
        return None

    return change


def _scales(alphas: dict[str, Any], prefix: str) -> dict[str, float]:
    """Alpha by module."""
    scales = {}
    for key, value in alphas.items():
        path = _ALPHA.sub("", key.removeprefix(prefix)).replace(".processor", "")
        scales[re.sub(r"to_out$", "to_out.0", path)] = float(value)
    return scales


LOADERS: dict[str, Callable[[Path, FamilyFile], Change]] = {
    "AutoLoRA": ours,
    "DiffSynth": diffsynth,
    "diffusers": diffusers,
}
"""By the first word of the loaders' names in the table."""
