"""What each loader makes of a file: the weight change of every canonical layer."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from tests.lora.truth import FLUX, Size, TruthFile
from tests.lora.truth.layers import (
    CLIP_WIDTH,
    Module,
    canonical_shapes,
    clip,
    diffusers,
    t5,
)

Change = Callable[[str], Tensor | None]
"""The change of a layer by name, None where the loader has none. Text encoders: ``clip:PATH``."""


class Loader(Protocol):
    """A way to load a LoRA file."""

    name: str

    def load(self, path: Path, truth: TruthFile) -> Change:
        """Load a file; what it raises is reported as it is."""
        ...


class Ours:
    """AutoLoRA's own reader."""

    def __init__(self) -> None:
        self.name = "AutoLoRA"

    def load(self, path: Path, truth: TruthFile) -> Change:
        from autolora.lora import LoRA

        lora = LoRA.load(path)
        encoders = {which: lora.text_encoder(which) for which in ("clip", "t5")}

        def change(layer: str) -> Tensor | None:
            which, _, inner = layer.rpartition(":")
            if which:
                encoder = encoders[which]
                return encoder.delta(inner) if encoder is not None and inner in encoder else None
            if layer not in lora:
                return None
            base = truth.base(layer) if layer in lora.needs_base else None
            return lora.delta(layer, base)

        return change


def _loaded_size(truth: TruthFile) -> Size:
    """The model that a file is loaded into: one block of each kind at the true width, else two."""
    blocks = 1 if truth.size.width == FLUX.width else 2
    return replace(truth.size, double=blocks, single=blocks)


def lazy_zeros(*shape: int) -> Tensor:
    """Zeros that take no memory until they are written, unlike ``torch.zeros``."""
    return torch.from_numpy(np.zeros(shape, dtype=np.float32))


def _tree(shapes: dict[str, tuple[int, int]]) -> nn.Module:
    """Modules of these names, every weight zero."""
    root = nn.Module()
    for name, (out, inner) in shapes.items():
        parent = root
        *path, last = name.split(".")
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        linear = nn.Linear(inner, out, device="meta")
        linear.weight = nn.Parameter(lazy_zeros(out, inner), requires_grad=False)
        linear.bias = nn.Parameter(lazy_zeros(out), requires_grad=False)
        parent.add_module(last, linear)
    return root


class DiffSynth:
    """``FluxImagePipeline.load_lora`` onto modules of DiffSynth's names, fused into zeros."""

    def __init__(self) -> None:
        self.name = f"DiffSynth {version('diffsynth')}"

    def load(self, path: Path, truth: TruthFile) -> Change:
        from diffsynth.pipelines.flux_image import FluxImagePipeline

        pipe = FluxImagePipeline(device="cpu", torch_dtype=torch.float32)
        parts = {
            "": canonical_shapes(_loaded_size(truth)),
            "clip": {module.layer: (module.outputs, module.inputs) for module in clip()},
            "t5": {module.layer: (module.outputs, module.inputs) for module in t5()},
        }
        trees = {which: _tree(shapes) for which, shapes in parts.items() if not which or truth.text}
        for tree in trees.values():
            with contextlib.redirect_stdout(io.StringIO()):
                pipe.load_lora(tree, str(path), alpha=1)

        def change(layer: str) -> Tensor | None:
            which, _, inner = layer.rpartition(":")
            weight: Tensor = trees[which].get_submodule(inner).weight.detach()
            return weight if bool(weight.any()) else None

        return change


class Diffusers:
    """``FluxPipeline.load_lora_weights``, then PEFT's own merge of each layer into its base.

    PEFT's own folders, with an ``adapter_config.json``, go to ``PeftModel.from_pretrained``.
    """

    def __init__(self) -> None:
        self.name = f"diffusers {version('diffusers')}, PEFT {version('peft')}"

    def load(self, path: Path, truth: TruthFile) -> Change:
        from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
        from peft import PeftModel

        transformer = _flux_transformer(truth)
        pipe = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=None,
            text_encoder=_clip_encoder(),
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=transformer,
        )
        with quiet():
            if "adapter_config.json" in truth.beside:
                PeftModel.from_pretrained(transformer, str(path.parent))
            else:
                pipe.load_lora_weights(str(path.parent), weight_name=path.name)
        modules: dict[str, list[Module]] = {}
        for module in diffusers(_loaded_size(truth)):
            modules.setdefault(module.layer, []).append(module)
        clip_paths = {module.layer: module.path for module in clip()}

        def change(layer: str) -> Tensor | None:
            which, _, inner = layer.rpartition(":")
            if which == "clip":
                return merged_change(pipe.text_encoder, clip_paths[inner])
            if which:
                return None
            return _assembled(truth, layer, modules[layer], transformer)

        return change


def _flux_transformer(truth: TruthFile) -> Any:
    """diffusers' transformer with zero weights, or the base weights where a DoRA needs them."""
    from diffusers import FluxTransformer2DModel

    size = _loaded_size(truth)
    head = 128 if size.width == FLUX.width else size.width // 4
    with torch.device("meta"):
        model = FluxTransformer2DModel(
            in_channels=size.channels,
            num_layers=size.double,
            num_single_layers=size.single,
            attention_head_dim=head,
            num_attention_heads=size.width // head,
            joint_attention_dim=size.context,
            pooled_projection_dim=size.pooled,
            guidance_embeds=True,
            axes_dims_rope=(16, 56, 56) if head == 128 else (4, 6, 6),
        )
    for child in model.modules():
        for name, parameter in list(child.named_parameters(recurse=False)):
            zeros = lazy_zeros(*parameter.shape)
            setattr(child, name, nn.Parameter(zeros, requires_grad=False))
    present = dict(model.named_modules())
    needing = set(truth.needs_base)
    for module in diffusers(size):
        if module.layer in needing and module.path in present:
            present[module.path].weight.data = truth.module_base(module)
    return model


def _clip_encoder() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=16,
        hidden_size=CLIP_WIDTH,
        intermediate_size=4 * CLIP_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        eos_token_id=1,
        bos_token_id=0,
    )
    model = CLIPTextModel(config)
    for parameter in model.parameters():
        parameter.data.zero_()
        parameter.requires_grad_(False)
    return model


def merged_change(model: nn.Module, path: str) -> Tensor | None:
    """What PEFT adds to the weight of a module, by its own ``merge``; None without an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = dict(model.named_modules()).get(path)
    if found is None and path.startswith("text_model."):
        found = dict(model.named_modules()).get(path.removeprefix("text_model."))
    if not isinstance(found, BaseTunerLayer):
        return None
    layer: Any = found
    base = layer.get_base_layer()
    before = base.weight.data
    base.weight.data = before.clone()
    layer.merge()
    change = base.weight.data.sub_(before)
    base.weight.data = before
    layer.merged_adapters.clear()
    return change


def _assembled(
    truth: TruthFile, layer: str, modules: list[Module], transformer: nn.Module
) -> Tensor | None:
    """A canonical layer's change from those of the modules that it consists of."""
    dense: Tensor | None = None
    for module in modules:
        part = merged_change(transformer, module.path)
        if part is None:
            continue
        if dense is None:
            dense = lazy_zeros(*truth.shape(layer))
        start = 0
        for first, stop in module.rows:
            dense[first:stop] += part[start : start + stop - first]
            start += stop - first
    return dense


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep a library's warnings and prints off the table's output."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        gc.collect()


class NeverEnds(Exception):
    """A loader did not come back within the time that it was given."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Stop what runs too long, in seconds of this process' own time.

    Raises:
        NeverEnds: The time is over.
    """

    def stop(*_: object) -> None:
        raise NeverEnds(f"stopped after {seconds:g} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def loaders() -> tuple[list[Loader], str]:
    """All that can be compared here, ours first, and a sentence on what is missing, or none."""
    try:
        return [Ours(), DiffSynth(), Diffusers()], ""
    except PackageNotFoundError as error:
        missing = (
            f"{error.name} is not installed, so that diffusers is left out of the comparison; "
            '`pip install -e ".[compare]"` adds it.'
        )
        return [Ours(), DiffSynth()], missing
