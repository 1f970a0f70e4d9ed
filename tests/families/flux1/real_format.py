"""Writes a small FLUX.1 in the files of the published ones: BFL's layout and diffusers' layout.

Names are spelled out here from the published files, by hand and without autolora, and the text
encoders are written by transformers itself; only the sizes are small. Both layouts hold the same
weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

WIDTH, HEAD, DOUBLE, SINGLE = 64, 32, 2, 3
PATCH, TEXT, POOLED, TIME = 64, 32, 64, 256
CHANNELS = (32, 64, 128, 128)  # of the autoencoder's stages, in FLUX.1 128, 256, 512, 512
LATENT = 16
WORDS = [
    "a",
    "an",
    "the",
    "on",
    "of",
    "in",
    "red",
    "blue",
    "green",
    "neon",
    "rocket",
    "elephant",
    "background",
    "picture",
    "sketch",
]


@dataclass
class RealFormat:
    """Where the files are.

    Attributes:
        bfl: Folder with single files, as the published repository has them.
        diffusers: Folder with diffusers' sub-folders.
    """

    bfl: Path
    diffusers: Path

    @property
    def transformer(self) -> Path:
        return self.bfl / "flux1-dev.safetensors"


def write(folder: Path, guidance: bool = True, seed: int = 0) -> RealFormat:
    """Write both layouts; the same seed gives the same model with and without guidance."""
    found = RealFormat(folder / "bfl", folder / "diffusers")
    generator = torch.Generator().manual_seed(seed)
    transformer = make_transformer(generator)
    if not guidance:
        transformer = {k: v for k, v in transformer.items() if not k.startswith("guidance_in.")}
    autoencoder = make_autoencoder(generator)
    for root in (found.bfl, found.diffusers):
        root.mkdir(parents=True)
        write_text_encoders(root, seed)
    save_file(transformer, str(found.transformer))
    save_file(autoencoder, str(found.bfl / "ae.safetensors"))
    save_shards(diffusers_transformer(transformer), found.diffusers / "transformer", 3)
    (found.diffusers / "vae").mkdir()
    save_file(
        diffusers_autoencoder(autoencoder),
        str(found.diffusers / "vae" / "diffusion_pytorch_model.safetensors"),
    )
    return found


def save_shards(tensors: dict[str, Tensor], folder: Path, count: int) -> None:
    """Write tensors in shards, with the index that hub libraries write."""
    folder.mkdir(parents=True)
    names = sorted(tensors)
    shards = {
        f"diffusion_pytorch_model-{i + 1:05d}-of-{count:05d}.safetensors": names[i::count]
        for i in range(count)
    }
    for file, inside in shards.items():
        save_file({name: tensors[name] for name in inside}, str(folder / file))
    index = {
        "metadata": {"total_size": sum(t.numel() * t.element_size() for t in tensors.values())},
        "weight_map": {name: file for file, inside in shards.items() for name in inside},
    }
    text = json.dumps(index)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(text, encoding="utf-8")


def make_transformer(generator: torch.Generator) -> dict[str, Tensor]:
    """Random weights by BFL's names."""
    tensors: dict[str, Tensor] = {}

    def linear(name: str, out: int, inner: int) -> None:
        tensors[f"{name}.weight"] = torch.randn(out, inner, generator=generator) / inner**0.5
        tensors[f"{name}.bias"] = torch.randn(out, generator=generator) * 0.1

    def scale(name: str) -> None:
        tensors[f"{name}.scale"] = 1 + torch.randn(HEAD, generator=generator) * 0.1

    linear("img_in", WIDTH, PATCH)
    linear("txt_in", WIDTH, TEXT)
    for name, inner in (("time_in", TIME), ("guidance_in", TIME), ("vector_in", POOLED)):
        linear(f"{name}.in_layer", WIDTH, inner)
        linear(f"{name}.out_layer", WIDTH, WIDTH)
    for i in range(DOUBLE):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            linear(f"{block}_mod.lin", 6 * WIDTH, WIDTH)
            linear(f"{block}_attn.qkv", 3 * WIDTH, WIDTH)
            scale(f"{block}_attn.norm.query_norm")
            scale(f"{block}_attn.norm.key_norm")
            linear(f"{block}_attn.proj", WIDTH, WIDTH)
            linear(f"{block}_mlp.0", 4 * WIDTH, WIDTH)
            linear(f"{block}_mlp.2", WIDTH, 4 * WIDTH)
    for i in range(SINGLE):
        block = f"single_blocks.{i}"
        linear(f"{block}.modulation.lin", 3 * WIDTH, WIDTH)
        linear(f"{block}.linear1", 7 * WIDTH, WIDTH)
        linear(f"{block}.linear2", WIDTH, 5 * WIDTH)
        scale(f"{block}.norm.query_norm")
        scale(f"{block}.norm.key_norm")
    linear("final_layer.adaLN_modulation.1", 2 * WIDTH, WIDTH)
    linear("final_layer.linear", PATCH, WIDTH)
    return {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}


def diffusers_transformer(bfl: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights by the names of diffusers' ``FluxTransformer2DModel``."""
    plain = {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "final_layer.linear": "proj_out",
        "img_mod.lin": "norm1.linear",
        "txt_mod.lin": "norm1_context.linear",
        "img_attn.proj": "attn.to_out.0",
        "txt_attn.proj": "attn.to_add_out",
        "img_mlp.0": "ff.net.0.proj",
        "img_mlp.2": "ff.net.2",
        "txt_mlp.0": "ff_context.net.0.proj",
        "txt_mlp.2": "ff_context.net.2",
        "img_attn.norm.query_norm": "attn.norm_q",
        "img_attn.norm.key_norm": "attn.norm_k",
        "txt_attn.norm.query_norm": "attn.norm_added_q",
        "txt_attn.norm.key_norm": "attn.norm_added_k",
        "modulation.lin": "norm.linear",
        "linear2": "proj_out",
        "norm.query_norm": "attn.norm_q",
        "norm.key_norm": "attn.norm_k",
    }
    split = {
        "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    }
    renamed: dict[str, Tensor] = {}
    for name, tensor in bfl.items():
        stem, _, kind = name.rpartition(".")
        prefix = ""
        for ours, theirs in (
            ("double_blocks", "transformer_blocks"),
            ("single_blocks", "single_transformer_blocks"),
        ):
            if stem.startswith(ours + "."):
                _, number, stem = stem.split(".", 2)
                prefix = f"{theirs}.{number}."
        kind = "weight" if kind == "scale" else kind
        if stem == "final_layer.adaLN_modulation.1":
            shift, scale = tensor.chunk(2)
            renamed[f"norm_out.linear.{kind}"] = torch.cat((scale, shift))
        elif stem in split:
            rows = [WIDTH, WIDTH, WIDTH, 4 * WIDTH][: len(split[stem])]
            for part, piece in zip(split[stem], tensor.split(rows), strict=True):
                renamed[f"{prefix}{part}.{kind}"] = piece.contiguous()
        else:
            renamed[f"{prefix}{plain[stem]}.{kind}"] = tensor
    return renamed


def make_autoencoder(generator: torch.Generator) -> dict[str, Tensor]:
    """Random weights by BFL's names, with FLUX.1's stages."""
    tensors: dict[str, Tensor] = {}

    def conv(name: str, out: int, inner: int, side: int = 3) -> None:
        fan = inner * side * side
        weight = torch.randn(out, inner, side, side, generator=generator)
        tensors[f"{name}.weight"] = weight / fan**0.5
        tensors[f"{name}.bias"] = torch.randn(out, generator=generator) * 0.1

    def norm(name: str, channels: int) -> None:
        tensors[f"{name}.weight"] = 1 + torch.randn(channels, generator=generator) * 0.1
        tensors[f"{name}.bias"] = torch.randn(channels, generator=generator) * 0.1

    def block(name: str, inner: int, out: int) -> None:
        norm(f"{name}.norm1", inner)
        conv(f"{name}.conv1", out, inner)
        norm(f"{name}.norm2", out)
        conv(f"{name}.conv2", out, out)
        if inner != out:
            conv(f"{name}.nin_shortcut", out, inner, 1)

    def middle(side: str, channels: int) -> None:
        block(f"{side}.mid.block_1", channels, channels)
        norm(f"{side}.mid.attn_1.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{side}.mid.attn_1.{part}", channels, channels, 1)
        block(f"{side}.mid.block_2", channels, channels)

    last = len(CHANNELS) - 1
    conv("encoder.conv_in", CHANNELS[0], 3)
    for i, channels in enumerate(CHANNELS):
        block(f"encoder.down.{i}.block.0", CHANNELS[max(i - 1, 0)], channels)
        block(f"encoder.down.{i}.block.1", channels, channels)
        if i < last:
            conv(f"encoder.down.{i}.downsample.conv", channels, channels)
    middle("encoder", CHANNELS[last])
    norm("encoder.norm_out", CHANNELS[last])
    conv("encoder.conv_out", 2 * LATENT, CHANNELS[last])
    conv("decoder.conv_in", CHANNELS[last], LATENT)
    middle("decoder", CHANNELS[last])
    for i in range(last, -1, -1):
        block(f"decoder.up.{i}.block.0", CHANNELS[min(i + 1, last)], CHANNELS[i])
        for j in (1, 2):
            block(f"decoder.up.{i}.block.{j}", CHANNELS[i], CHANNELS[i])
        if i > 0:
            conv(f"decoder.up.{i}.upsample.conv", CHANNELS[i], CHANNELS[i])
    norm("decoder.norm_out", CHANNELS[0])
    conv("decoder.conv_out", 3, CHANNELS[0])
    return tensors


def diffusers_autoencoder(bfl: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights by the names of diffusers' ``AutoencoderKL``."""
    renamed: dict[str, Tensor] = {}
    last = len(CHANNELS) - 1
    for name, tensor in bfl.items():
        side, _, rest = name.partition(".")
        parts = rest.split(".")
        if parts[0] == "mid" and parts[1] == "attn_1":
            inside = {"norm": "group_norm", "proj_out": "to_out.0"}.get(parts[2], f"to_{parts[2]}")
            rest = f"mid_block.attentions.0.{inside}.{parts[3]}"
            tensor = tensor[..., 0, 0].contiguous() if tensor.dim() == 4 else tensor
        elif parts[0] == "mid":
            rest = ".".join(["mid_block.resnets", str(int(parts[1][-1]) - 1), *parts[2:]])
        elif parts[0] in ("down", "up"):
            stage = int(parts[1]) if parts[0] == "down" else last - int(parts[1])
            tail = parts[2:]
            tail[0] = "resnets" if tail[0] == "block" else f"{tail[0]}rs.0"  # downsample, upsample
            rest = ".".join([f"{parts[0]}_blocks", str(stage), *tail])
            rest = rest.replace("nin_shortcut", "conv_shortcut")
        elif parts[0] == "norm_out":
            rest = rest.replace("norm_out", "conv_norm_out")
        renamed[f"{side}.{rest}"] = tensor
    return renamed


def write_text_encoders(root: Path, seed: int) -> None:
    """CLIP, T5 in shards, and tokenizers, each by its own library."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip_words = write_clip_tokenizer(root / "tokenizer")
    t5_words = write_t5_tokenizer(root / "tokenizer_2")
    torch.manual_seed(seed)
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=clip_words,
            hidden_size=POOLED,
            intermediate_size=2 * POOLED,
            num_hidden_layers=2,
            num_attention_heads=POOLED // 64,
            max_position_embeddings=77,
            eos_token_id=clip_words - 1,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=t5_words,
            d_model=TEXT,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )
    clip.save_pretrained(root / "text_encoder")
    t5.save_pretrained(root / "text_encoder_2", max_shard_size="20KB")


def write_clip_tokenizer(folder: Path) -> int:
    """A byte-pair tokenizer that knows a few words; its end token has the highest number."""
    letters = sorted({letter for word in WORDS for letter in word})
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[str] = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merges.append(" ".join(pieces[:2]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
            vocabulary.append(pieces[0])
    vocabulary = [*dict.fromkeys(vocabulary), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    numbered = {piece: number for number, piece in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(numbered), encoding="utf-8")
    lines = ["#version: 0.2", *dict.fromkeys(merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "pad_token": "<|endoftext|>",
    }
    config |= {"unk_token": "<|endoftext|>", "bos_token": "<|startoftext|>"}
    config |= {"eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return len(vocabulary)


def write_t5_tokenizer(folder: Path) -> int:
    """A unigram tokenizer over words and letters, with T5's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    letters = sorted({letter for word in WORDS for letter in word})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -3.0)]
    pieces += [(f"\u2581{word}", -1.0) for word in WORDS]
    pieces += [(letter, -4.0) for letter in letters]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "T5Tokenizer", "model_max_length": 512, "pad_token": "<pad>"}
    config |= {"eos_token": "</s>", "unk_token": "<unk>", "extra_ids": 0}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return len(pieces)
