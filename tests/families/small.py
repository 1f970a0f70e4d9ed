"""Writes a small model of every family in the files of the published ones.

Names and shapes are those of DiffSynth's classes at their published sizes, which are the published
files'; blocks are counted down and every dimension is replaced by a small one. Nothing of autolora
is used, so that what reads the files is tested against something else. FLUX.1's writer is
``tests.families.flux1.real_format.py``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.families.flux1.real_format import (
    diffusers_autoencoder,
    make_autoencoder,
    save_shards,
    write_clip_tokenizer,
)
from tests.families.flux1.real_format import write as write_real_format

_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def skeleton(make: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a module that is made without numbers."""
    from diffsynth.core.vram.initialization import skip_model_initialization

    with skip_model_initialization():
        return {name: tuple(t.shape) for name, t in make().state_dict().items()}


def shrunk(
    shapes: Mapping[str, tuple[int, ...]], sides: Mapping[int, int], blocks: int
) -> dict[str, tuple[int, ...]]:
    """Replace dimensions, and leave out blocks that are counted beyond ``blocks``."""
    return {
        name: tuple(sides.get(side, side) for side in shape)
        for name, shape in shapes.items()
        if all(int(n) < blocks for n in re.findall(r"(?:blocks|layers)\.(\d+)\.", name))
    }


def random_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Numbers of a size that lets signals through: a flat picture would prove nothing."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        if name.endswith(("running_var", "num_batches_tracked")):
            value = torch.ones(shape)
        elif len(shape) > 1 and "embed_tokens" not in name:
            value = value / max(value[0].numel(), 1) ** 0.5
        elif len(shape) == 1:
            value = 1 + 0.1 * value if name.endswith("weight") else 0.1 * value
        tensors[name] = value
    return tensors


def write_qwen_tokenizer(folder: Path) -> int:
    """A byte-pair tokenizer of bytes alone, with Qwen's special tokens; returns its words."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>"]
    specials += ["<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": 4096,
        "pad_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "unk_token": None,
        "bos_token": None,
        "additional_special_tokens": specials[1:],
        "chat_template": _TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return len(letters) + len(specials)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, str(path))


def _write_qwen3(folder: Path, words: int, layers: int) -> None:
    from diffsynth.models.z_image_text_encoder import ZImageTextEncoder

    sides = {151936: words, 2560: 128, 9728: 64, 4096: 128, 1024: 128}
    tensors = random_tensors(shrunk(skeleton(ZImageTextEncoder), sides, layers), 1)
    save_shards(tensors, folder, 2)
    for file in folder.iterdir():  # as transformers calls the shards of a language model
        file.rename(folder / file.name.replace("diffusion_pytorch_model", "model"))
    index = folder / "model.safetensors.index.json"
    text = index.read_text(encoding="utf-8").replace("diffusion_pytorch_model", "model")
    index.write_text(text, encoding="utf-8")


def write_z_image(root: Path) -> Path:
    """Z-Image in diffusers' folders."""
    from diffsynth.models.z_image_dit import ZImageDiT

    words = write_qwen_tokenizer(root / "tokenizer")
    _write_qwen3(root / "text_encoder", words, 2)
    sides = {3840: 256, 15360: 1024, 10240: 682, 2560: 128}
    tensors = random_tensors(shrunk(skeleton(ZImageDiT), sides, 2), 2)
    tensors = {n: t for n, t in tensors.items() if not re.search(r"refiner\.1\.", n)}
    save_shards(tensors, root / "transformer", 2)
    autoencoder = make_autoencoder(torch.Generator().manual_seed(3))
    _save(diffusers_autoencoder(autoencoder), root / "vae" / "diffusion_pytorch_model.safetensors")
    return root


def write_flux2(root: Path, guidance: bool = False) -> Path:
    """FLUX.2 [klein] in diffusers' folders."""
    from diffsynth.models.flux2_dit import Flux2DiT
    from diffsynth.models.flux2_vae import Flux2VAE

    words = write_qwen_tokenizer(root / "tokenizer")
    _write_qwen3(root / "text_encoder", words, 28)
    sides = {6144: 128, 12288: 256, 15360: 384, 18432: 384, 36864: 768, 55296: 1152, 24576: 512}
    shapes = shrunk(skeleton(lambda: Flux2DiT(guidance_embeds=guidance)), sides, 2)
    _save(
        random_tensors(shapes, 4),
        root / "transformer" / "diffusion_pytorch_model.safetensors",
    )
    vae = skeleton(lambda: Flux2VAE(block_out_channels=(32, 32, 32, 64)))
    _save(random_tensors(vae, 5), root / "vae" / "diffusion_pytorch_model.safetensors")
    return root


def write_qwen_image(root: Path) -> Path:
    """Qwen-Image in diffusers' folders."""
    from diffsynth.models.qwen_image_dit import QwenImageDiT
    from diffsynth.models.qwen_image_text_encoder import QwenImageTextEncoder
    from diffsynth.models.qwen_image_vae import QwenImageVAE

    words = write_qwen_tokenizer(root / "tokenizer")
    sides = {152064: words, 3584: 128, 18944: 64, 512: 128}
    sides |= {1280: 80, 3840: 240, 3420: 64, 5120: 320}
    shapes = shrunk(skeleton(QwenImageTextEncoder), sides, 2)
    tensors = {_published(name): t for name, t in random_tensors(shapes, 6).items()}
    _save(tensors, root / "text_encoder" / "model.safetensors")
    sides = {3072: 128, 3584: 128, 6144: 256, 12288: 512, 18432: 768}
    tensors = random_tensors(shrunk(skeleton(QwenImageDiT), sides, 2), 7)
    save_shards(tensors, root / "transformer", 3)
    vae = skeleton(lambda: QwenImageVAE(base_dim=8))
    _save(random_tensors(vae, 8), root / "vae" / "diffusion_pytorch_model.safetensors")
    return root


def _published(name: str) -> str:
    """The published files of Qwen2.5-VL have older names than transformers' model."""
    if name.startswith("model.visual."):
        return name.removeprefix("model.")
    return name.replace("model.language_model.", "model.")


def write_sdxl(root: Path, layers: int = 1) -> Path:
    """Stable Diffusion XL in diffusers' folders."""
    from diffsynth.models.stable_diffusion_vae import StableDiffusionVAE
    from diffsynth.models.stable_diffusion_xl_unet import SDXLUNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    words = write_clip_tokenizer_at(root / "tokenizer")
    write_clip_tokenizer_at(root / "tokenizer_2")
    torch.manual_seed(9)
    CLIPTextModel(_clip(words)).save_pretrained(root / "text_encoder")
    CLIPTextModelWithProjection(_clip(words)).save_pretrained(root / "text_encoder_2")
    unet = skeleton(
        lambda: SDXLUNet2DConditionModel(
            block_out_channels=(32, 64, 64),
            layers_per_block=layers,
            cross_attention_dim=128,
            attention_head_dim=[1, 1, 1],
            transformer_layers_per_block=[1, 1, 2],
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=6 * 256 + 64,
        )
    )
    tensors = random_tensors(unet, 10)
    tensors["conv_out.weight"] *= 0.2  # untrained, it would drive float32 apart within two steps
    _save(tensors, root / "unet" / "diffusion_pytorch_model.safetensors")
    vae = skeleton(lambda: StableDiffusionVAE(block_out_channels=(32, 32, 32, 64)))
    _save(random_tensors(vae, 11), root / "vae" / "diffusion_pytorch_model.safetensors")
    return root


def write_clip_tokenizer_at(folder: Path) -> int:
    """CLIP's tokenizer in a folder whose parents may not be there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return write_clip_tokenizer(folder)


def _clip(words: int) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=words,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=1,
        max_position_embeddings=77,
        projection_dim=64,
        eos_token_id=words - 1,
    )


def write_flux1(root: Path) -> Path:
    """FLUX.1 [schnell] in BFL's files."""
    root.mkdir(parents=True)
    return write_real_format(root, guidance=False).bfl


WRITERS: Mapping[str, Callable[[Path], Path]] = {
    "flux1": write_flux1,
    "flux2": write_flux2,
    "qwen_image": write_qwen_image,
    "sdxl": write_sdxl,
    "z_image": write_z_image,
}
