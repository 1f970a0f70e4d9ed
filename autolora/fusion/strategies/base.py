"""What a strategy is, and the list of them.

A strategy says how several adapters act together. It is one class in one file, decorated with
`register`, and overrides as little as it needs:

==================  =================================================================
`Strategy.gate`     a learned gate per layer
`Strategy.begin`    the names of all adapters, before layers are fused
`Strategy.shape`    other factors and strengths in a layer (averages, projections)
`Strategy.prepare`  passes of the model with one adapter at a time (calibration)
`Strategy.choose`   which adapters a prompt asks for, by their responses to its words
`Strategy.predict`  what happens in a step: schedules, several passes
``merges``          the weights themselves change (`autolora.fusion.merge`)
==================  =================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from autolora.errors import FusionError
from autolora.fusion.adapter import Adapter
from autolora.fusion.conv import fused_type
from autolora.fusion.gate import Gate, GateBank
from autolora.fusion.linear import FusedLinear
from autolora.fusion.packed import Factors


@dataclass(frozen=True)
class Response:
    """How an adapter answers to a prompt; see `autolora.generate.relevance`.

    Attributes:
        words: Standard score of its response to each word of the prompt, over neutral prompts.
        named: Whether the prompt has its name or a trigger word of it, or the search is sure.
    """

    words: tuple[float, ...]
    named: bool = False

    @property
    def value(self) -> float:
        """The relevance: the score at the word that it answers to most."""
        return max(self.words)


@dataclass
class Step:
    """One call of the model in one denoising step.

    Attributes:
        number: Of the step, from 0.
        steps: Denoising steps in all.
        names: The attached adapters, in order.
        strengths: Their strengths by name.
        run: Makes a pass with these strengths and returns the model's output ``[B, C, h, w]``.
        layers: The attached layers, where strengths can be set one by one; they are put back.
    """

    number: int
    steps: int
    names: tuple[str, ...]
    strengths: Mapping[str, float]
    run: Callable[[Mapping[str, float]], Tensor]
    layers: Mapping[str, FusedLinear]

    def only(self, name: str | None) -> Tensor:
        """Make a pass with one adapter at its strength, or with none."""
        return self.run({n: s if n == name else 0.0 for n, s in self.strengths.items()})


Run = Callable[[Adapter], None]
"""Makes one pass of the model with an adapter attached, under a text of its own."""


class Strategy:
    """How the adapters of one layer are combined.

    A subclass gives `name` and `summary`, and overrides what the module's table says. One object
    serves one attachment: what `begin` and `prepare` find out may be kept in it.
    """

    name: ClassVar[str]
    """The name that users choose it by."""
    summary: ClassVar[str]
    """One line for lists of choices."""
    uses_gates: ClassVar[bool] = False
    """Whether it looks at the gates."""
    merges: ClassVar[bool] = False
    """Whether weights are changed (`autolora.fusion.merge`) and no layer is wrapped."""

    shapes: ClassVar[bool] = False
    """Whether `shape` does anything."""
    calibrates: ClassVar[bool] = False
    """Whether `prepare` must have run before anything is attached."""
    chooses: ClassVar[bool] = False
    """Whether `choose` may silence adapters that a prompt does not ask for."""
    by_step: ClassVar[bool] = False
    """Whether `predict` does anything; `autolora.fusion.stepping` must then be entered."""

    def begin(self, names: Sequence[str]) -> None:
        """Learn the names of all adapters, before layers are fused and whenever they change."""

    def shape(
        self,
        layer: str,
        names: Sequence[str],
        factors: Sequence[Factors],
        strengths: Sequence[float],
    ) -> tuple[list[Factors], list[float]]:
        """Return what is added in a layer in place of the adapters themselves.

        Args:
            layer: Canonical name of the layer.
            names: The adapters that act in it; those of strength 0 are left out.
            factors: ``(A [r, in], B [out, r])`` of each.
            strengths: Of each, not 0.

        Returns:
            Any number of factors with their strengths.
        """
        return list(factors), list(strengths)

    def prepare(
        self, module: nn.Module, adapters: Sequence[tuple[Adapter, float]], run: Run
    ) -> None:
        """Calibrate: make passes of the model and keep what `shape` needs.

        Args:
            module: The model, with nothing attached to it.
            adapters: What is going to be attached.
            run: Makes one pass with one adapter attached, under a text of that adapter's own.
        """

    def choose(self, responses: Mapping[str, Response | None]) -> dict[str, bool]:
        """Decide by adapter whether it acts in a picture.

        Args:
            responses: How each answers to the prompt's words; None where that cannot be known.
        """
        return dict.fromkeys(responses, True)

    def predict(self, step: Step) -> Tensor:
        """Return what the model says in one step.

        Args:
            step: Makes passes of the model with any strengths, as often as is needed.
        """
        return step.run(step.strengths)

    def gate(self, layer: str, gates: GateBank | None) -> Gate | None:
        """Return the gate that a layer's adapters go through; None is the plain sum."""
        return None

    def fuse(
        self,
        layer: str,
        base: nn.Module,
        names: Sequence[str],
        factors: Sequence[Factors],
        strengths: Sequence[float],
        gates: GateBank | None,
    ) -> FusedLinear:
        """Put the adapters around one layer.

        Args:
            layer: Canonical name of the layer.
            base: The layer itself; stays unchanged.
            names: The adapters that have factors for this layer.
            factors: ``(A [r, in], B [out, r])`` of each.
            strengths: Of each.
            gates: The model's gates, where there are any.

        Raises:
            FusionError: A shape does not fit.
        """
        if self.shapes:
            if fused_type(base) is not FusedLinear:
                raise FusionError(f"the strategy {self.name} is for linear layers alone")
            return ShapedLinear(layer, self, base, names, factors, strengths)
        return fused_type(base)(base, factors, self.gate(layer, gates), strengths, names)

    def updates(self, layer: str, fused: FusedLinear, gates: GateBank | None) -> bool:
        """Tell whether other adapters in this very layer make what `fuse` would make anew."""
        if self.shapes:
            return False
        return type(fused) is fused_type(fused.base) and fused.gate is self.gate(layer, gates)


class ShapedLinear(FusedLinear):
    """A layer that adds what a strategy makes of its adapters.

    From outside it holds the adapters themselves: another strength, or one adapter less, shapes
    the rest anew.
    """

    def __init__(
        self,
        layer: str,
        strategy: Strategy,
        base: nn.Module,
        names: Sequence[str],
        factors: Sequence[Factors],
        strengths: Sequence[float],
    ) -> None:
        self.__dict__.update(_layer=layer, _strategy=strategy)  # before the first `_take`
        super().__init__(base, factors, None, strengths, names)

    @property
    def strategy(self) -> Strategy:
        """What shapes this layer."""
        strategy: Strategy = self.__dict__["_strategy"]
        return strategy

    def _take(
        self, names: tuple[str, ...], factors: tuple[Factors, ...], values: tuple[float, ...]
    ) -> None:
        super()._take(names, factors, values)
        live = self._live
        shaped, strengths = self.strategy.shape(
            self.__dict__["_layer"],
            [names[i] for i in live],
            [factors[i] for i in live],
            [values[i] for i in live],
        )
        self._packed.set(shaped, strengths)


_STRATEGIES: dict[str, type[Strategy]] = {}


def register(strategy: type[Strategy]) -> type[Strategy]:
    """Make a strategy available by its name."""
    _STRATEGIES[strategy.name] = strategy
    return strategy


def strategy_names() -> tuple[str, ...]:
    """Return the names of all strategies, the default first, rivals of ours last."""
    ours = [name for name in ("autolora", "gated", "sum", "merged") if name in _STRATEGIES]
    return (*ours, *sorted(set(_STRATEGIES) - set(ours)))


def get_strategy(name: str | Strategy) -> Strategy:
    """Return the strategy of that name; a strategy object is returned unchanged.

    Raises:
        FusionError: There is none; the message lists the choices.
    """
    if isinstance(name, Strategy):
        return name
    if name not in _STRATEGIES:
        raise FusionError(f"unknown strategy {name!r}; choose one of {', '.join(strategy_names())}")
    return _STRATEGIES[name]()
