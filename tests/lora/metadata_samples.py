"""What programs write about a LoRA, in its header and beside it."""

import json

HEADER = {
    "modelspec.title": "Header title",
    "modelspec.description": "Header text",
    "modelspec.trigger_phrase": "header trigger",
    "modelspec.architecture": "flux-1-dev/lora",
    "ss_output_name": "out",
    "ss_tag_frequency": json.dumps({"a": {"neon": 5, "sign": 9}, "b": {"neon": 7, "Sign": 1}}),
}
MANAGER = {
    "model_name": "Neon Lights",
    "modelDescription": "<p>Bright &amp; <b>bold</b></p>",
    "tags": ["style", "neon"],
    "base_model": "Flux.1 D",
    "civitai": {"trainedWords": ["neon style, ", "n30n", "Neon Style"]},
    "usage_tips": '{"strength": 0.8, "strength_min": 0.5, "strength_max": 1.2}',
}
A1111 = {
    "description": "From the web UI",
    "sd version": "Flux",
    "activation text": "neon glow, n30n",
    "preferred weight": 0.7,
}
CIVITAI = {
    "name": "v1.0",
    "model": {"name": "Neon by somebody", "tags": ["light"]},
    "description": "Version text",
    "trainedWords": ["civ word"],
    "baseModel": "Flux.1 D",
}
