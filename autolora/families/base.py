"""What a base model's family is: everything that differs between one and another.

A family is a folder of this package with a module-level ``FAMILY``; code outside the folder asks
the value and never the name. Nothing here imports torch or DiffSynth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from autolora.runtime.checkpoints import Located, PartLayout
    from autolora.runtime.memory import ModelSizes

Load = Callable[[Any, "torch.device"], Any]


def _same(latents: Tensor, shared: Mapping[str, Any]) -> Tensor:
    return latents


def _no_inputs(pipe: Any, prompts: Sequence[str]) -> dict[str, Any]:
    return {}


def _no_guidance(pipe: Any) -> bool:
    return False


@dataclass(frozen=True)
class ImageInputs:
    """The pipeline's names of the pictures that people give; None where it takes none.

    Attributes:
        image: Picture to redraw.
        mask: White where it is to be redrawn.
        control: List of DiffSynth's ``ControlNetInput``.
        reference: Pictures to edit or to take after.
        required: Whether the model draws nothing without picture and mask.
        takes_strength: Whether a part of the picture's noise schedule can be left out.
    """

    image: str | None = "input_image"
    mask: str | None = None
    control: str | None = None
    reference: str | None = None
    required: bool = False
    takes_strength: bool = True


@dataclass(frozen=True)
class Family:
    """A family of base models that share pipeline, layers and files.

    Attributes:
        name: Its ``kind`` in a configuration, and the name of its folder.
        title: What sentences call it.
        pipeline: DiffSynth's pipeline class, ``module:Class``.
        load: Makes the pipeline of a configuration on a device, or raises ConfigError.
        denoiser: The pipeline's attribute of the model that adapters act on.
        text_encoders: The pipeline's attributes by the names of adapters' parts.
        decoder: The pipeline's attribute of the autoencoder that decodes.
        text_layer: The denoiser's first attention layer that reads the text stream; empty where
            nothing is said of what a prompt asks for (`autolora.generate.relevance`).
        telling: Tensors of which the denoiser's files have one, and other families' none.
        whole_file: A tensor of single files that hold all of the model's weights.
        parts: Files of the parts by name (`autolora.config.CheckpointSettings` has the keys).
        packaged: The weights that the package itself ships; a family with them has no parts.
        sizes: Sizes of a model by the headers of its parts; None is `autolora.families.headers`.
        check_part: Looks at a part's headers and raises ConfigError; None is the same module's.
        read_text: Loads tokenizer and CLIP for the search from a configuration; None is MiniLM.
        multiple: Pixels that width and height are multiples of.
        channels: Channels of the latents.
        factor: Pixels per latent along a side.
        embeds_guidance: Tells of a pipeline whether its model was distilled to take guidance as an
            input; classifier-free guidance is then ``true_cfg``.
        inputs: Further arguments of the pipeline's call, by the prompts of a generation.
        unpack: Brings latents to ``[B, channels, height / factor, width / factor]``.
        decode: Decodes one picture's unpacked latents.
        images: The pipeline's names of pictures.
        samples_latents: Whether the autoencoder draws the latents of a picture at random.
        unit_inputs: Inputs that its units take and its ``__call__`` does not.
        needs: Attributes of the pipeline that must be there for an input, by its name.
        per_image: Inputs with one row per picture; none means that pictures are drawn one by one.
    """

    name: str
    title: str
    pipeline: str
    load: Load
    decode: Callable[[Any, Tensor], Image]
    denoiser: str = "dit"
    text_encoders: Mapping[str, str] = field(default_factory=dict)
    decoder: str = "vae"
    text_layer: str = ""
    telling: tuple[str, ...] = ()
    whole_file: str = ""
    parts: Mapping[str, PartLayout] = field(default_factory=dict)
    packaged: Path | None = None
    sizes: Callable[[Mapping[str, Located]], ModelSizes | None] | None = None
    check_part: Callable[[Located], None] | None = None
    read_text: Callable[[Any], tuple[Any, Any]] | None = None
    multiple: int = 16
    channels: int = 16
    factor: int = 8
    embeds_guidance: Callable[[Any], bool] = _no_guidance
    inputs: Callable[[Any, Sequence[str]], dict[str, Any]] = _no_inputs
    unpack: Callable[[Tensor, Mapping[str, Any]], Tensor] = _same
    images: Callable[[Any], ImageInputs] = lambda pipe: ImageInputs()
    samples_latents: bool = False
    unit_inputs: frozenset[str] = frozenset()
    needs: Mapping[str, str] = field(default_factory=dict)
    per_image: tuple[str, ...] = ()

    def model(self, pipe: Any) -> Any:
        """The denoiser of a pipeline."""
        return getattr(pipe, self.denoiser)
