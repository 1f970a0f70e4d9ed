"""Files of LoKr, LoHa, DoRA and whole weight changes."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Generator

from tests.lora.truth import layers as names
from tests.lora.truth.cases import ALPHAS, case, plain
from tests.lora.truth.files import DOWN_UP, KOHYA, Draw, Spelling, TruthFile
from tests.lora.truth.layers import Module, Size
from tests.lora.truth.weights import Weights, dora, full, loha, lokr, lora, only_bias

Names = Callable[[Size], list[Module]]
LYCORIS_SPELLINGS: dict[str, tuple[Names, Spelling]] = {
    "lycoris_": (names.diffusers, Spelling("lycoris_", "_", DOWN_UP.A, DOWN_UP.B)),
    "lora_unet_": (names.bfl, KOHYA),
    "diffusion_model.": (names.bfl, Spelling("diffusion_model.")),
    "transformer.": (names.diffusers, Spelling("transformer.")),
    "no prefix": (names.diffusers, Spelling()),
}
LOKR_KINDS = {
    "full": "both sides full, an alpha that does not count",
    "w1": "first side factored",
    "w2": "second side factored",
    "both": "both sides factored",
    "tucker": "second side with a core",
}


def kronecker(**options: Any) -> Draw:
    def draw(random: Generator, module: Module, n: int) -> Weights:
        return lokr(random, module.outputs, module.inputs, **options)

    return draw


def hadamard(**options: Any) -> Draw:
    def draw(random: Generator, module: Module, n: int) -> Weights:
        return loha(random, module.outputs, module.inputs, **options)

    return draw


for _prefix, (_names, _spelling) in LYCORIS_SPELLINGS.items():

    @case(f"lokr/{_prefix}")
    def _(file: TruthFile, listed: Names = _names, spelling: Spelling = _spelling) -> TruthFile:
        return file.add(listed(file.size), spelling, kronecker(kind="w2", rank=2, alpha=3.0))

    @case(f"loha/{_prefix}")
    def _(file: TruthFile, listed: Names = _names, spelling: Spelling = _spelling) -> TruthFile:
        return file.add(listed(file.size), spelling, hadamard(rank=3, alpha=2.0))


for _kind, _about in LOKR_KINDS.items():

    @case(f"lokr/{_about}")
    def _(file: TruthFile, kind: str = _kind) -> TruthFile:
        alpha = 9999.0 if kind == "full" else 1.0
        return file.add(names.bfl(file.size), KOHYA, kronecker(kind=kind, rank=2, alpha=alpha))


@case("lokr/no alpha, bfloat16")
def _(file: TruthFile) -> TruthFile:
    draw = kronecker(kind="both", alpha=None, dtype=torch.bfloat16)
    return file.add(names.bfl(file.size), KOHYA, draw)


@case("loha/cores")
def _(file: TruthFile) -> TruthFile:
    return file.add(names.bfl(file.size), KOHYA, hadamard(tucker=True, alpha=0.5))


@case("loha/no alpha, float16")
def _(file: TruthFile) -> TruthFile:
    draw = hadamard(alpha=None, dtype=torch.float16)
    return file.add(names.bfl(file.size), KOHYA, draw)


def configured(file: TruthFile, kind: str, draw: Draw, alpha: float, rank: int) -> TruthFile:
    """PEFT's own folder: alpha stands in the configuration and counts for whole matrices too.

    Ranks are such that PEFT itself stores the second side of a LoKr as two factors, or whole.
    """

    def scaled(random: Generator, module: Module, n: int) -> Weights | None:
        weights = draw(random, module, n)
        if weights is None or weights.product is None:
            return weights
        product = weights.product
        return replace(weights, product=lambda: alpha / rank * product())

    file.add(names.diffusers(file.size), Spelling("base_model.model."), scaled)
    targets = sorted(module.path for module in names.diffusers(file.size))
    config = {"peft_type": kind, "r": rank, "alpha": alpha, "target_modules": targets}
    file.stem, file.beside = "adapter_model", {"adapter_config.json": json.dumps(config)}
    return file


@case("lokr/PEFT, second side factored, adapter_config.json")
def _(file: TruthFile) -> TruthFile:
    return configured(file, "LOKR", kronecker(kind="w2", alpha=None, square=True), 3.0, 2)


@case("lokr/PEFT, both sides full, adapter_config.json")
def _(file: TruthFile) -> TruthFile:
    return configured(file, "LOKR", kronecker(kind="full", alpha=None, square=True), 3.0, 64)


@case("loha/PEFT, adapter_config.json")
def _(file: TruthFile) -> TruthFile:
    return configured(file, "LOHA", hadamard(rank=3, alpha=None), 2.0, 3)


@case("mixed/LoRA, LoKr, LoHa and diffs in one file")
def _(file: TruthFile) -> TruthFile:
    def draw(random: Generator, module: Module, n: int) -> Weights:
        kinds = (lora, lokr, loha, full)
        return kinds[n % 4](random, module.outputs, module.inputs)

    return file.add(names.bfl(file.size), KOHYA, draw)


# ---------------------------------------------------------------- DoRA and full changes


def decomposed(file: TruthFile, axis: int, flat: bool, inner: Draw) -> Draw:
    """DoRA around other weights."""

    def draw(random: Generator, module: Module, n: int) -> Weights | None:
        weights = inner(random, module, n)
        if weights is None:
            return None
        return dora(random, weights, file.module_base(module), axis, flat)

    return draw


ONETRAINER = Spelling("lora_transformer_", "_", DOWN_UP.A, DOWN_UP.B)
DORA_SPELLINGS: dict[str, tuple[Names, Spelling, int, bool]] = {
    "kohya dora_scale by input": (names.bfl, KOHYA, 0, False),
    "kohya dora_scale by output": (names.bfl, KOHYA, 1, False),
    "OneTrainer dora_scale by input": (names.diffusers, ONETRAINER, 0, False),
    "OneTrainer dora_scale by output": (names.diffusers, ONETRAINER, 1, False),
    "PEFT lora_magnitude_vector": (
        names.diffusers,
        Spelling("transformer.", magnitude="lora_magnitude_vector"),
        1,
        True,
    ),
    "PEFT lora_magnitude_vector.weight": (
        names.diffusers,
        Spelling("transformer.", magnitude="lora_magnitude_vector.weight"),
        1,
        True,
    ),
    "PEFT lora_magnitude_vector.default.weight": (
        names.diffusers,
        Spelling(
            "base_model.model.",
            A="lora_A.default.weight",
            B="lora_B.default.weight",
            magnitude="lora_magnitude_vector.default.weight",
        ),
        1,
        True,
    ),
    "ai-toolkit magnitude": (
        names.bfl,
        Spelling("diffusion_model.", magnitude="magnitude"),
        1,
        True,
    ),
    "ai-toolkit magnitude, split names": (
        names.diffusers,
        Spelling("transformer.", magnitude="magnitude"),
        1,
        True,
    ),
}

for _about, (_names, _spelling, _axis, _flat) in DORA_SPELLINGS.items():

    @case(f"dora/{_about}")
    def _(
        file: TruthFile,
        listed: Names = _names,
        spelling: Spelling = _spelling,
        axis: int = _axis,
        flat: bool = _flat,
    ) -> TruthFile:
        alphas = ALPHAS if spelling.joint == "_" else (None,)
        draw = decomposed(file, axis, flat, plain((4, 2), alphas))
        return file.add(listed(file.size), spelling, draw)


@case("dora/around LoKr")
def _(file: TruthFile) -> TruthFile:
    draw = decomposed(file, 0, False, kronecker(kind="w2", alpha=3.0))
    return file.add(names.bfl(file.size), KOHYA, draw)


@case("dora/around LoHa, split names")
def _(file: TruthFile) -> TruthFile:
    spelling = LYCORIS_SPELLINGS["lycoris_"][1]
    draw = decomposed(file, 1, False, hadamard(rank=2, alpha=1.0))
    return file.add(names.diffusers(file.size), spelling, draw)


@case("dora/in every other module")
def _(file: TruthFile) -> TruthFile:
    with_norm = decomposed(file, 1, True, plain((4,)))

    def draw(random: Generator, module: Module, n: int) -> Weights | None:
        return (with_norm if n % 2 else plain((4,)))(random, module, n)

    spelling = Spelling("transformer.", magnitude="lora_magnitude_vector")
    return file.add(names.diffusers(file.size), spelling, draw)


def whole(random: Generator, module: Module, n: int) -> Weights:
    return full(random, module.outputs, module.inputs, bias=n % 2 == 0)


for _prefix in ("lora_unet_", "diffusion_model.", "transformer."):

    @case(f"full/diff and diff_b, {_prefix}")
    def _(file: TruthFile, prefix: str = _prefix) -> TruthFile:
        listed, spelling = LYCORIS_SPELLINGS[prefix]
        return file.add(listed(file.size), spelling, whole)


NORM_SPELLINGS = {
    "diffusion_model. diff": ("bfl", Spelling("diffusion_model."), "diff"),
    "lora_unet_ w_norm": ("bfl", KOHYA, "w_norm"),
    "transformer. diff": ("diffusers", Spelling("transformer."), "diff"),
}

for _about, (_code, _spelling, _suffix) in NORM_SPELLINGS.items():

    @case(f"full/normalization of queries and keys, {_about}")
    def _(
        file: TruthFile, code: str = _code, spelling: Spelling = _spelling, suffix: str = _suffix
    ) -> TruthFile:
        listed = names.bfl if code == "bfl" else names.diffusers
        file.add(listed(file.size), spelling, plain((4,)))
        return file.add_norms(names.norms(file.size, code), spelling, suffix)


@case("full/bias of some layers only, in parts")
def _(file: TruthFile) -> TruthFile:
    def draw(random: Generator, module: Module, n: int) -> Weights | None:
        if n % 3 == 0:
            return only_bias(random, module.outputs)
        return lora(random, module.outputs, module.inputs) if n % 3 == 1 else None

    return file.add(names.diffusers(file.size), Spelling("transformer."), draw)
