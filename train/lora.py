"""Trains one LoRA from a folder of pictures with captions.

    python -m train.lora --images FOLDER --out FILE.safetensors
    python -m train.lora --images FOLDER --out FILE.safetensors --model my-flux.yaml --size 512

Each picture needs a caption in a text file of the same name (``cat.png``, ``cat.txt``); several
lines are several captions. Works on the embedded tiny FLUX and on any FLUX.1 config.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from autolora.errors import AutoLoRAError, ConfigError
from autolora.lora import save_lora
from train.lora_trainer import LoRAData, LoRATrainConfig, MultiLoRATrainer

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Example:
    """One picture and its captions."""

    path: Path
    captions: list[str]


def read_folder(folder: Path) -> list[Example]:
    """Finds pictures and their caption files.

    Raises:
        ConfigError: If the folder or a caption is missing, or a caption is not UTF-8.
    """
    if not folder.is_dir():
        raise ConfigError(f"There is no folder {folder}; give one with pictures and .txt captions.")
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES)
    if not paths:
        raise ConfigError(f"{folder} holds no pictures ({', '.join(PICTURES)}).")
    examples = []
    for path in paths:
        text = path.with_suffix(".txt")
        try:
            lines = text.read_text(encoding="utf-8-sig").splitlines() if text.is_file() else []
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{text} can't be read as UTF-8 text; save it as such.") from error
        captions = [line.strip() for line in lines if line.strip()]
        if not captions:
            raise ConfigError(f"{path} has no caption; write one into {text.name} beside it.")
        examples.append(Example(path, captions))
    return examples


def load_picture(path: Path, size: int) -> Image.Image:
    """The picture as RGB, cut to a centred square and resized.

    Raises:
        ConfigError: If the file is not a picture.
    """
    try:
        with Image.open(path) as picture:
            return ImageOps.fit(picture.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
    except (UnidentifiedImageError, OSError) as error:
        raise ConfigError(f"{path} can't be read as a picture ({error}); remove it.") from error


@torch.no_grad()
def encode_examples(pipe: Any, examples: list[Example], size: int, length: int) -> LoRAData:
    """Latents and text states of the examples, through the pipeline's own encoders."""
    most = max(len(e.captions) for e in examples)
    latents, states, pooled = [], [], []
    for example in examples:
        picture = pipe.preprocess_image(load_picture(example.path, size))
        latents.append(pipe.vae_encoder(picture.to(pipe.device, pipe.torch_dtype)))
        # Captions are repeated up to the largest number, so that the tensors are rectangular.
        texts = [example.captions[i % len(example.captions)] for i in range(most)]
        rows = [encode_text(pipe, text, length) for text in texts]
        states.append(torch.cat([r[0] for r in rows])[None])
        pooled.append(torch.cat([r[1] for r in rows])[None])
    return LoRAData(torch.cat(latents), torch.cat(states), torch.cat(pooled))


def encode_text(pipe: Any, text: str, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token states [1, L, D] and pooled text [1, D'] of one prompt, as DiffSynth encodes it."""
    from diffsynth.pipelines.flux_image import FluxImageUnit_PromptEmbedder

    unit = FluxImageUnit_PromptEmbedder()
    out = unit.process(pipe, prompt=text, t5_sequence_length=length, positive=True)
    return out["prompt_emb"], out["pooled_prompt_emb"]


def load_for_training(model: str) -> Any:
    """The frozen base model: float32 where it is tiny, else bfloat16, half of float32's memory."""
    from autolora.config import load_config
    from autolora.families.load import load_pipeline

    config = load_config(model)
    storage = "float32" if config.kind == "tiny" else "bfloat16"
    return load_pipeline(replace(config, storage=storage))


def guidance_input(dit: Any, count: int, device: torch.device) -> dict[str, torch.Tensor]:
    """The distilled guidance [count], an input of FLUX.1-dev alone; 1 is without guidance."""
    if dit.guidance_embedder is None:
        return {}
    return {"guidance": torch.ones(count, device=device)}


def train_folder(
    model: str, folder: Path, out: Path, config: LoRATrainConfig, size: int | None
) -> Path:
    """Trains one LoRA on a folder and writes it.

    Args:
        model: Name or path of a model config.
        folder: Pictures and captions.
        out: The LoRA file; its ending decides nothing, the format is DiffSynth's names in kohya's.
        config: How to train.
        size: Side of the training pictures in pixels; None for the model's own.

    Returns:
        The path written.

    Raises:
        ConfigError: The size, the output or the folder cannot be used.
    """
    if size is not None and (size < 16 or size % 16):
        raise ConfigError(f"--size must be a multiple of 16, not {size}.")
    if out.is_dir():
        raise ConfigError(f"--out names the folder {out}; name a file in it.")
    examples = read_folder(folder)
    pipe = load_for_training(model)
    tiny = getattr(pipe.dit, "config", None)
    length = tiny.text_length if tiny else 512
    side = size or (tiny.size if tiny else 512)
    data = encode_examples(pipe, examples, side, length)
    empty = encode_text(pipe, "", length)
    extra = guidance_input(pipe.dit, config.batch, pipe.device)
    every = max(1, config.steps // 10)

    def report(step: int, loss: float) -> None:
        if step % every == 0 or step + 1 == config.steps:
            print(f"step {step + 1}/{config.steps}  loss {loss:.4f}", file=sys.stderr)

    with MultiLoRATrainer(pipe.dit, 1, config) as trainer:
        factors = trainer.train([data], (empty[0][0], empty[1][0]), report, **extra)[0]
    header = {"ss_network_module": "networks.lora_flux", "ss_network_dim": str(config.rank)}
    return save_lora(out, factors, "kohya", metadata=header, dtype="bfloat16")


def main() -> None:
    """Parses the command line, trains, prints the path."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="folder of pictures + .txt")
    parser.add_argument("--out", type=Path, required=True, help="LoRA file to write")
    parser.add_argument("--model", default="tiny", help="name or path of a model config")
    parser.add_argument("--size", type=int, help="side of the training pictures")
    for item in fields(LoRATrainConfig):
        kind = type(item.default)
        name = f"--{item.name.replace('_', '-')}"
        told = f"{item.metadata['help']} ({item.default})"
        parser.add_argument(name, type=kind, default=item.default, help=told)
    args = parser.parse_args()
    try:
        config = LoRATrainConfig(**{f.name: getattr(args, f.name) for f in fields(LoRATrainConfig)})
        print(train_folder(args.model, args.images, args.out, config, args.size))
    except AutoLoRAError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
