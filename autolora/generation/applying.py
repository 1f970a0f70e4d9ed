"""Puts chosen adapters into the base model: until they are detached, or for one picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from autolora.flux.config import PipelineConfig
from autolora.generation.selecting import Chosen
from autolora.generation.telling import approximation_notes, rounding_note, text_note

if TYPE_CHECKING:
    from torch import nn

    from autolora.adapters import LoRA
    from autolora.adapters.cache import AdapterCache
    from autolora.fusion import Adapter, AttachReport, GateBank

TEXT_ENCODERS: Mapping[Literal["clip", "t5"], str] = {
    "clip": "text_encoder_1",
    "t5": "text_encoder_2",
}
"""What an adapter's parts for text encoders are called, and where DiffSynth has those."""


class Attachments:
    """The adapters that stay attached, and what is in force while a picture is made.

    Not safe to use from several threads; the pipeline's lock guards it.

    Attributes:
        chosen: What stays attached, in the order of asking.
        strategy: How those are fused.
    """

    def __init__(
        self,
        config: PipelineConfig,
        base: Callable[[], Any],
        gates: Callable[[], GateBank | None],
        cache: Callable[[], AdapterCache],
    ) -> None:
        """Remember where things are; nothing is loaded.

        Args:
            config: Says how adapters are prepared.
            base: Gives the DiffSynth pipeline.
            gates: Gives the trained gates.
            cache: Gives the adapters that are kept ready.
        """
        self.chosen: list[Chosen] = []
        self.strategy = config.strategy
        self._config = config
        self._base = base
        self._gates = gates
        self._cache = cache
        self._report: AttachReport | None = None
        self._notes: list[str] = []
        self._set_aside = False

    @property
    def strengths(self) -> dict[str, float]:
        """Strength by name of what stays attached."""
        return {entry.lora.name: entry.strength for entry in self.chosen}

    def attach(self, chosen: Sequence[Chosen], strategy: str) -> AttachReport:
        """Attach adapters in place of those that are; layers that stay the same are not touched.

        Raises:
            AutoLoRAError: Something does not fit; what was attached before then stays.
        """
        from autolora.fusion import switch

        notes: list[str] = []
        pairs = self._pairs(chosen, strategy, notes)
        report = switch(self._base().dit, pairs, strategy, self._gates())
        self.chosen, self.strategy = list(chosen), strategy
        self._report, self._notes, self._set_aside = report, notes, False
        return report

    def set_strengths(self, strengths: Mapping[str, float]) -> None:
        """Change strengths by name; the others keep theirs.

        Raises:
            FusionError: A name is not attached, or a strength is not finite; nothing is changed
                then.
        """
        from autolora.fusion import set_strengths
        from autolora.fusion.match import check_strengths

        check_strengths(list(self.strengths), strengths)
        changed = [
            replace(entry, strength=float(strengths.get(entry.lora.name, entry.strength)))
            for entry in self.chosen
        ]
        if self._merges:
            self._merge_anew(changed)
        elif changed:
            set_strengths(self._base().dit, strengths)
            self.chosen, self._report = changed, None

    def detach(self, name: str) -> None:
        """Take one adapter out; the others stay as they are.

        Raises:
            FusionError: It is not attached.
        """
        from autolora.fusion import remove
        from autolora.fusion.match import check_attached

        check_attached(list(self.strengths), name)
        rest = [entry for entry in self.chosen if entry.lora.name != name]
        if self._merges:
            self._merge_anew(rest)
        else:
            remove(self._base().dit, name)
            self.chosen, self._report = rest, None

    @property
    def _merges(self) -> bool:
        from autolora.fusion import get_strategy

        return get_strategy(self.strategy).merges

    def _merge_anew(self, chosen: list[Chosen]) -> None:
        """Merge other strengths or fewer adapters: now, or when needed if they are set aside."""
        if self._set_aside:
            self.chosen = chosen
        else:
            self.attach(chosen, self.strategy)

    def clear(self, dit: nn.Module | None) -> None:
        """Take all adapters out.

        Args:
            dit: The transformer, where it is loaded.
        """
        from autolora.fusion import detach

        self.chosen, self._report, self._set_aside = [], None, False
        if dit is not None:
            detach(dit)

    def bare_base(self) -> Any:
        """Return the DiffSynth pipeline with its own weights; merged adapters are put aside.

        They are merged again when they are next needed. What is attached un-merged stays, as it
        can be stepped around at no cost.
        """
        from autolora.fusion import restore

        base = self._base()
        if restore(base.dit):
            self._set_aside = True
        return base

    @contextmanager
    def in_force(
        self,
        chosen: Sequence[Chosen],
        strategy: str,
        notes: list[str],
        text_encoders: bool = False,
    ) -> Iterator[AttachReport]:
        """Let adapters act for the length of a ``with`` block; afterwards all is as before.

        Args:
            chosen: All that shall act.
            strategy: How they are fused.
            notes: What a user should know is added here.
            text_encoders: Whether they also act on the text encoders.

        Raises:
            AutoLoRAError: Something does not fit.
        """
        from autolora.fusion import attached

        dit = self._base().dit
        with ExitStack() as stack:
            if self._is_attached(chosen, strategy):
                report = self._in_place()
                notes += self._notes
            else:
                pairs = self._pairs(chosen, strategy, notes)
                report = stack.enter_context(attached(dit, pairs, strategy, self._gates()))
            if note := rounding_note(report.rounding):
                notes.append(note)
            if text_encoders:
                self._enter_text_encoders(stack, chosen, notes)
            yield report

    def _is_attached(self, chosen: Sequence[Chosen], strategy: str) -> bool:
        """Tell whether this is just what stays attached."""
        wanted = {entry.lora.name: (id(entry.lora), entry.strength) for entry in chosen}
        present = {entry.lora.name: (id(entry.lora), entry.strength) for entry in self.chosen}
        return bool(chosen) and wanted == present and strategy == self.strategy

    def _in_place(self) -> AttachReport:
        if self._report is None or self._set_aside:
            return self.attach(self.chosen, self.strategy)
        return self._report

    def _pairs(
        self, chosen: Sequence[Chosen], strategy: str, notes: list[str]
    ) -> list[tuple[Adapter, float]]:
        """Pairs to attach, by name, so that the order of asking cannot change a picture's bytes."""
        from autolora.fusion import get_strategy

        ordered = sorted(chosen, key=lambda entry: entry.lora.name)
        if get_strategy(strategy).merges:
            return [(entry.lora, entry.strength) for entry in ordered]
        pairs: list[tuple[Adapter, float]] = []
        for entry in ordered:
            ready = self._prepare(entry.lora, self._base().dit)
            notes += approximation_notes(entry.lora, ready.errors)
            pairs.append((ready, entry.strength))
        return pairs

    def _prepare(self, lora: LoRA, module: nn.Module) -> Any:
        import torch

        from autolora.fusion import base_weight

        settings = self._config.adapters
        return self._cache().prepare(
            lora,
            settings.approximate_rank,
            base=lambda layer: base_weight(module, layer),
            device=torch.device(self._base().device) if settings.pin else None,
        )

    def _enter_text_encoders(
        self, stack: ExitStack, chosen: Sequence[Chosen], notes: list[str]
    ) -> None:
        """Let the parts for text encoders act as a plain sum, where the base model has these."""
        from autolora.fusion import attached, linear_shapes

        base, found = self._base(), False
        for which, attribute in TEXT_ENCODERS.items():
            encoder: nn.Module = getattr(base, attribute)
            layers = linear_shapes(encoder).keys()
            pairs: list[tuple[Adapter, float]] = []
            for entry in sorted(chosen, key=lambda entry: entry.lora.name):
                part = entry.lora.text_encoder(which)
                if part is None:
                    continue
                found, fits = True, not layers.isdisjoint(part.layers)
                notes.append(text_note(entry.lora.name, which, len(part.layers), fits))
                if fits:
                    pairs.append((self._prepare(part, encoder), entry.strength))
            if pairs:
                stack.enter_context(attached(encoder, pairs, "sum"))
        if chosen and not found:
            notes.append("None of the adapters has a part for the text encoders.")
