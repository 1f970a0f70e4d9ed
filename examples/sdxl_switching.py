"""One SDXL, many LoRAs, in the three calls of sd-scripts: backup, merge, draw, restore.

    python examples/sdxl_switching.py "a cat" first.safetensors second.safetensors --model sdxl

The model is loaded once. Each LoRA is added to its weights in float32, a picture is drawn at the
speed of the bare model, and the original weights are put back to the bit.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from autolora import LoRA
from autolora.config import load_config
from autolora.families.load import load_pipeline
from autolora.fusion import WeightExchange
from autolora.generate.sample import denoise
from autolora.request import make_request


def targets(pipe: Any, lora: LoRA, scale: float) -> list[tuple[Any, list[tuple[LoRA, float]]]]:
    """The denoiser, and every text encoder that the LoRA has a part for."""
    found = [(pipe.family.model(pipe), [(lora, scale)])]
    for which, attribute in pipe.family.text_encoders.items():
        part, encoder = lora.text_encoder(which), getattr(pipe, attribute)
        if part is not None and encoder is not None:
            found.append((encoder, [(part, scale)]))
    return found


def main() -> None:
    """Draw one picture per LoRA, and one without any at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt")
    parser.add_argument("loras", nargs="+", type=Path)
    parser.add_argument("--model", default="sdxl", help="name or YAML file of a base model")
    parser.add_argument("--scale", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--out", type=Path, default=Path("."))
    arguments = parser.parse_args()

    config = load_config(arguments.model)
    pipe = load_pipeline(config)
    request = make_request(config, arguments.prompt, seed=arguments.seed, steps=arguments.steps)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for file in arguments.loras:
        network = WeightExchange(targets(pipe, LoRA.load(file), arguments.scale))
        network.backup_weights()
        network.pre_calculation()
        try:
            image, _ = denoise(pipe, request, arguments.prompt)
        finally:
            network.restore_weights()
        image.save(arguments.out / f"{file.stem}.png")
    image, _ = denoise(pipe, request, arguments.prompt)
    image.save(arguments.out / "without.png")


if __name__ == "__main__":
    main()
