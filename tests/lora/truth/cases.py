"""Cases: a format and variant each, with the ways to deal weights to modules."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Generator

from tests.lora.truth.files import Draw, TruthFile
from tests.lora.truth.layers import SMALL, Module, Size
from tests.lora.truth.weights import Weights, lora

Build = Callable[[TruthFile], TruthFile]


@dataclass(frozen=True)
class Case:
    """One format and variant.

    Attributes:
        name: ``format/variant``.
        build: Fills an empty file.
    """

    name: str
    build: Build

    def make(self, size: Size = SMALL, seed: int = 0) -> TruthFile:
        """Draw a file of this case."""
        return self.build(TruthFile(size, Generator().manual_seed(seed)))


CASES: dict[str, Case] = {}


def case(name: str) -> Callable[[Build], Build]:
    def register(build: Build) -> Build:
        assert name not in CASES
        CASES[name] = Case(name, build)
        return build

    return register


RANKS = (1, 4, 3, 16)
ALPHAS = (8.0, 1.0, 0.5, 16.0, 7.0)


def plain(
    ranks: tuple[int, ...] = RANKS,
    alphas: tuple[float | None, ...] = (None,),
    keep: Callable[[Module], bool] = lambda module: True,
    **options: Any,
) -> Draw:
    """Factors for every module that is kept, ranks and alphas dealt in turn."""

    def draw(random: Generator, module: Module, n: int) -> Weights | None:
        if not keep(module):
            return None
        rank, alpha = ranks[n % len(ranks)], alphas[n % len(alphas)]
        return lora(random, module.outputs, module.inputs, rank=rank, alpha=alpha, **options)

    return draw


def in_blocks(module: Module) -> bool:
    return "blocks." in module.layer
