"""Files of plain LoRA, in the spelling of every program that writes it."""

import itertools
import json
from typing import Any

import torch
from torch import Generator

from tests.lora.truth import layers as names
from tests.lora.truth.cases import ALPHAS, case, in_blocks, plain
from tests.lora.truth.files import DOWN_UP, KOHYA, Spelling, TruthFile
from tests.lora.truth.layers import Module
from tests.lora.truth.weights import Weights, block_diagonal, lora

# ---------------------------------------------------------------- kohya


@case("kohya/mixed alphas, in and out layers, text encoders")
def _(file: TruthFile) -> TruthFile:
    te1 = Spelling("lora_te1_", "_", "lora_down.weight", "lora_up.weight")
    te3 = Spelling("lora_te3_", "_", "lora_down.weight", "lora_up.weight")
    # The first alpha of the file is a text encoder's, and unlike the others.
    file.add(names.clip(), te1, plain((8,), (1.0,)), text="clip")
    file.add(names.t5(), te3, plain((4,), (2.0,)), text="t5")
    return file.add(names.bfl(file.size), KOHYA, plain(alphas=ALPHAS))


@case("kohya/one alpha for all")
def _(file: TruthFile) -> TruthFile:
    return file.add(names.bfl(file.size), KOHYA, plain((16,), (16.0,), keep=in_blocks))


@case("kohya/no alpha")
def _(file: TruthFile) -> TruthFile:
    return file.add(names.bfl(file.size), KOHYA, plain())


@case("kohya/alpha zero")
def _(file: TruthFile) -> TruthFile:
    return file.add(names.bfl(file.size), KOHYA, plain(alphas=(0.0, 1.0)))


@case("kohya/negative alpha")
def _(file: TruthFile) -> TruthFile:
    return file.add(names.bfl(file.size), KOHYA, plain(alphas=(-2.0, 1.0), keep=in_blocks))


@case("kohya/split q, k, v stored as a block diagonal")
def _(file: TruthFile) -> TruthFile:
    d = file.size.width

    def draw(random: Generator, module: Module, n: int) -> Weights | None:
        if module.path.endswith(".qkv"):
            return block_diagonal(random, (d, d, d), d, rank=2, alpha=3.0)
        if module.path.endswith("linear1"):
            return block_diagonal(random, (d, d, d, 4 * d), d, rank=2, alpha=4.0)
        return None

    return file.add(names.bfl(file.size), KOHYA, draw)


for _dtype in (torch.float16, torch.bfloat16):

    @case(f"kohya/{str(_dtype).removeprefix('torch.')}")
    def _(file: TruthFile, dtype: torch.dtype = _dtype) -> TruthFile:
        draw = plain(alphas=(1.0, 5.0), keep=in_blocks, dtype=dtype)
        return file.add(names.bfl(file.size), KOHYA, draw)


@case("kohya/ranks up to 128")
def _(file: TruthFile) -> TruthFile:
    draw = plain((1, 2, 128, 33), (1.0, 128.0), keep=in_blocks)
    return file.add(names.bfl(file.size), KOHYA, draw)


# ---------------------------------------------------------------- diffusers and PEFT


@case("diffusers/transformer prefix")
def _(file: TruthFile) -> TruthFile:
    text = Spelling("text_encoder.")
    file.add(names.clip(), text, plain((4,)), text="clip")
    return file.add(names.diffusers(file.size), Spelling("transformer."), plain())


@case("diffusers/no prefix")
def _(file: TruthFile) -> TruthFile:
    return file.add(names.diffusers(file.size), Spelling(), plain())


@case("diffusers/inside the blocks only, one rank")
def _(file: TruthFile) -> TruthFile:
    draw = plain((4,), keep=in_blocks)
    return file.add(names.diffusers(file.size), Spelling("transformer."), draw)


@case("diffusers/named adapter")
def _(file: TruthFile) -> TruthFile:
    spelling = Spelling("transformer.", A="lora_A.style.weight", B="lora_B.style.weight")
    return file.add(names.diffusers(file.size), spelling, plain())


@case("diffusers/alpha tensors")
def _(file: TruthFile) -> TruthFile:
    spelling = Spelling("transformer.")
    return file.add(names.diffusers(file.size), spelling, plain(alphas=ALPHAS, keep=in_blocks))


@case("diffusers/only attention, no proj_mlp")
def _(file: TruthFile) -> TruthFile:
    draw = plain((4,), keep=lambda module: ".attn." in module.path)
    return file.add(names.diffusers(file.size), Spelling("transformer."), draw)


@case("diffusers/scale and shift of norm_out")
def _(file: TruthFile) -> TruthFile:
    kept = ("norm_out.linear", "proj_out", "transformer_blocks.0.attn.to_out.0")
    draw = plain((4,), keep=lambda module: module.path in kept)
    return file.add(names.diffusers(file.size), Spelling("transformer."), draw)


for _letters in itertools.chain.from_iterable(
    itertools.combinations("qkv", count) for count in (1, 2, 3)
):

    @case(f"diffusers/only {', '.join(_letters)}, ranks differ")
    def _(file: TruthFile, letters: tuple[str, ...] = _letters) -> TruthFile:
        def draw(random: Generator, module: Module, n: int) -> Weights | None:
            last = module.path.rsplit(".", 1)[-1]
            kept = last in {f"to_{x}" for x in letters} | {f"add_{x}_proj" for x in letters}
            if not kept and not (last == "proj_mlp" and module.layer.startswith("single_blocks.1")):
                return None
            rank = {"q": 2, "k": 5, "v": 3}.get(last.removeprefix("to_"), 4)
            return lora(random, module.outputs, module.inputs, rank=rank)

        return file.add(names.diffusers(file.size), Spelling("transformer."), draw)


def patterned(file: TruthFile, spelling: Spelling, root: bool = False) -> dict[str, Any]:
    """Add modules whose alpha is in a PEFT configuration, which is returned."""
    by_name = {"attn.to_k": 3.0, "transformer_blocks.0.ff.net.2": 5.0}
    ranks: dict[str, int] = {}

    def draw(random: Generator, module: Module, n: int) -> Weights:
        rank = 7 if module.path.endswith("attn.to_k") else 4
        if rank != 4:
            ranks[module.path] = rank
        alpha = next(
            (
                value
                for name, value in by_name.items()
                if module.path == name or module.path.endswith("." + name)
            ),
            2.0,
        )
        scale = alpha / (rank**0.5 if root else rank)
        return lora(random, module.outputs, module.inputs, rank=rank, scale=scale)

    file.add(names.diffusers(file.size), spelling, draw)
    return {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 2.0,
        "rank_pattern": ranks,
        "alpha_pattern": by_name,
        "use_rslora": root,
        "target_modules": sorted(module.path for module in names.diffusers(file.size)),
    }


for _root in (False, True):

    @case("diffusers/header with alpha and patterns" + (", rank-stabilized" if _root else ""))
    def _(file: TruthFile, root: bool = _root) -> TruthFile:
        config = patterned(file, Spelling("transformer."), root)
        entries = {f"transformer.{name}": value for name, value in config.items()}
        file.metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(entries)}
        return file


@case("peft/adapter_config.json beside the file")
def _(file: TruthFile) -> TruthFile:
    config = patterned(file, Spelling("base_model.model."))
    file.stem, file.beside = "adapter_model", {"adapter_config.json": json.dumps(config)}
    return file


@case("peft/wrapped pipeline, named default")
def _(file: TruthFile) -> TruthFile:
    spelling = Spelling(
        "base_model.model.transformer.", A="lora_A.default.weight", B="lora_B.default.weight"
    )
    return file.add(names.diffusers(file.size), spelling, plain())


@case("peft/bias of the up projection, alpha tensors")
def _(file: TruthFile) -> TruthFile:
    draw = plain((4, 2), (2.0, 8.0), bias=True)
    return file.add(names.diffusers(file.size), Spelling("transformer."), draw)


# ---------------------------------------------------------------- reference names


@case("ai-toolkit/diffusion_model prefix")
def _(file: TruthFile) -> TruthFile:
    file.metadata = {"software": json.dumps({"name": "ai-toolkit"})}
    return file.add(names.bfl(file.size), Spelling("diffusion_model."), plain())


@case("comfyui/down and up, alphas, text encoders")
def _(file: TruthFile) -> TruthFile:
    prefix = "text_encoders.{}.transformer."
    for name, modules, which in (("clip_l", names.clip(), "clip"), ("t5xxl", names.t5(), "t5")):
        spelling = Spelling(prefix.format(name), A=DOWN_UP.A, B=DOWN_UP.B)
        file.add(modules, spelling, plain((8,), (1.0,)), text=which)
    spelling = Spelling("diffusion_model.", A=DOWN_UP.A, B=DOWN_UP.B)
    return file.add(names.bfl(file.size), spelling, plain(alphas=ALPHAS))


@case("fal/every layer of every block, and the last")
def _(file: TruthFile) -> TruthFile:
    draw = plain((4,), keep=lambda module: in_blocks(module) or module.path == "final_layer.linear")
    return file.add(names.bfl(file.size), Spelling("base_model.model."), draw)


@case("fal/some blocks, all in and out layers")
def _(file: TruthFile) -> TruthFile:
    return file.add(names.bfl(file.size), Spelling("base_model.model."), plain((4,)))


@case("xlabs/double blocks")
def _(file: TruthFile) -> TruthFile:
    spelling = Spelling(A="down.weight", B="up.weight")
    draw = plain(keep=lambda module: module.path.startswith("double"))
    return file.add(names.xlabs(file.size), spelling, draw)


@case("xlabs/double and single blocks")
def _(file: TruthFile) -> TruthFile:
    return file.add(names.xlabs(file.size), Spelling(A="down.weight", B="up.weight"), plain())


@case("onetrainer/legacy")
def _(file: TruthFile) -> TruthFile:
    for prefix, modules, which in (
        ("lora_te1_", names.clip(), "clip"),
        ("lora_te2_", names.t5(), "t5"),
    ):
        spelling = Spelling(prefix, "_", DOWN_UP.A, DOWN_UP.B)
        file.add(modules, spelling, plain((4,), (1.0,)), text=which)
    spelling = Spelling("lora_transformer_", "_", DOWN_UP.A, DOWN_UP.B)
    return file.add(names.diffusers(file.size), spelling, plain(alphas=ALPHAS))


@case("onetrainer/legacy, inside the blocks only")
def _(file: TruthFile) -> TruthFile:
    spelling = Spelling("lora_transformer_", "_", DOWN_UP.A, DOWN_UP.B)
    return file.add(names.diffusers(file.size), spelling, plain(alphas=ALPHAS, keep=in_blocks))


@case("onetrainer/reference names")
def _(file: TruthFile) -> TruthFile:
    spelling = Spelling("transformer.", A=DOWN_UP.A, B=DOWN_UP.B)
    return file.add(names.onetrainer_bfl(file.size), spelling, plain(alphas=ALPHAS))


@case("diffsynth/open-source names")
def _(file: TruthFile) -> TruthFile:
    return file.add(names.canonical(file.size), Spelling(), plain())


@case("diffsynth/as trained, .default.")
def _(file: TruthFile) -> TruthFile:
    spelling = Spelling(A="lora_A.default.weight", B="lora_B.default.weight")
    return file.add(names.canonical(file.size), spelling, plain())
