"""Puts the chosen adapters into the base model, until they are detached or for one picture.

Notes on approximation and rounding error go into the picture's report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from autolora.config import PipelineConfig
from autolora.errors import shown
from autolora.generate.report import UsedAdapter
from autolora.generate.reproduce import data_sha256
from autolora.unit import Steps, acts_in

if TYPE_CHECKING:
    from torch import nn

    from autolora.fusion import Adapter, AttachReport, GateBank, Strategy
    from autolora.lora import LoRA
    from autolora.lora.pool import AdapterCache
    from autolora.retrieval import Hit

ROUNDING_WORTH_SAYING = 0.05
"""Mean share of the adapters' change that merging may lose before a note says so."""

APPROXIMATION_WORTH_SAYING = 1e-4
"""Relative error of a layer up to which a low-rank form counts as the layer itself."""

QUIET = "quiet: the prompt does not ask for it"
"""What a report says of an adapter that a strategy silences."""

_ENCODER_NAMES = {"clip": "CLIP", "t5": "T5"}


@dataclass
class Chosen:
    """An adapter that is going to take part.

    Attributes:
        lora: The adapter.
        strength: Its strength.
        why: Why it was taken.
        score: Score of the search; None where it was asked for by name.
        hit: What the search said; None where it was asked for by name.
        triggers: Trigger words of it that were added to the prompt.
        steps: Steps in which it acts; None is all.
        text_encoder: Strength of its part for text encoders; None is `strength` where these are
            changed at all.
        patterns: What its layers were narrowed down by; empty is nothing.
        optional: Whether a strategy may silence it, since nobody asked for it by name.
        relevance: How much the prompt asks for it; None where that was not looked at.
        quiet: Whether it is silent, since the prompt does not ask for it.
    """

    lora: LoRA
    strength: float
    why: str
    score: float | None = None
    hit: Hit | None = None
    triggers: list[str] = field(default_factory=list)
    steps: Steps | None = None
    text_encoder: float | None = None
    patterns: tuple[str, ...] = ()
    optional: bool = False
    relevance: float | None = None
    quiet: bool = False

    @property
    def acting(self) -> float:
        """The strength that it acts at."""
        return 0.0 if self.quiet else self.strength

    def text_strength(self, usual: bool) -> float:
        """Strength on text encoders, by whether the picture has adapters act on these."""
        if self.quiet:
            return 0.0
        if self.text_encoder is not None:
            return self.text_encoder
        return self.strength if usual else 0.0

    def to_report(self) -> UsedAdapter:
        """Return what the report says of it before the picture is made."""
        return UsedAdapter(
            name=self.lora.name,
            strength=self.strength,
            why=f"{self.why}; {QUIET}" if self.quiet else self.why,
            score=None if self.score is None else round(self.score, 4),
            sha256=self.lora.sha256,
            triggers=self.triggers,
            channels={}
            if self.hit is None
            else {name: round(value, 4) for name, value in self.hit.channels.items()},
            data_sha256="" if self.lora.path is None else data_sha256(self.lora.path),
            steps=list(self.steps or ()),
            text_encoder=self.text_encoder,
            patterns=list(self.patterns),
            relevance=None if self.relevance is None else round(self.relevance, 2),
            quiet=self.quiet,
        )


def by_step(
    module: nn.Module, chosen: Sequence[Chosen], steps: int
) -> Callable[[int, int], None] | None:
    """Let adapters act in their steps only.

    Args:
        module: The model that they are attached to.
        chosen: The adapters.
        steps: Denoising steps of a picture.

    Returns:
        What to call before the first step and after each one with the steps that are done, and how
        many there are in all pictures; None where all adapters act in all steps.
    """
    from autolora.fusion import set_strengths

    if all(entry.steps is None for entry in chosen):
        return None
    usual = {entry.lora.name: entry.acting for entry in chosen}
    limits = {entry.lora.name: entry.steps for entry in chosen}
    acting = dict(usual)

    def follow(done: int, total: int) -> None:
        step = done % steps + 1
        wanted = {n: s if acts_in(limits[n], step) else 0.0 for n, s in usual.items()}
        if done < total and wanted != acting:
            set_strengths(module, wanted)
            acting.update(wanted)

    return follow


def approximation_notes(lora: LoRA, errors: Mapping[str, float]) -> list[str]:
    """Say which of an adapter's changes act approximately or not at all while it is not merged.

    Args:
        lora: The adapter.
        errors: Relative error of each layer that was approximated.
    """
    notes = []
    lossy = [error for error in errors.values() if error > APPROXIMATION_WORTH_SAYING]
    if lossy:
        mean, most = sum(lossy) / len(lossy), max(lossy)
        notes.append(
            f"{shown(lora.name)} is not low-rank in {len(lossy)} layers, which are approximated "
            f"(relative error {mean:.2g} on average, {most:.2g} at most); the strategy merged is "
            "exact."
        )
    merged_only = len(lora.norms) + len(lora.bias_layers)
    if merged_only:
        notes.append(
            f"{shown(lora.name)} also changes {merged_only} biases or normalization weights, which "
            "act with the strategy merged only."
        )
    return notes


def rounding_note(rounding: Mapping[str, float]) -> str | None:
    """Say how much of the adapters the rounding of merged weights lost, where it is worth it.

    Args:
        rounding: By layer, as `autolora.fusion.MergeReport` says.
    """
    mean = sum(rounding.values()) / len(rounding) if rounding else 0.0
    if mean < ROUNDING_WORTH_SAYING:
        return None
    return (
        f"Rounding the merged weights to the base model's storage is an error of {mean:.0%} of "
        "what the adapters add, on average over the layers; un-merged strategies add it exactly."
    )


def text_note(name: str, which: str, layers: int, fits: bool) -> str:
    """Say what became of an adapter's part for a text encoder."""
    encoder = _ENCODER_NAMES.get(which, which)
    if fits:
        return f"{shown(name)} also acts on the text encoder {encoder} ({layers} layers)."
    return f"This base model has no {encoder}; that part of {shown(name)} is left out."


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

    def _denoiser(self) -> nn.Module:
        base = self._base()
        model: nn.Module = base.family.model(base)
        return model

    def attach(self, chosen: Sequence[Chosen], strategy: str) -> AttachReport:
        """Attach adapters in place of those that are; layers that stay the same are not touched.

        Raises:
            AutoLoRAError: Something does not fit; what was attached before then stays.
        """
        from autolora.fusion import switch

        notes: list[str] = []
        pairs = self._pairs(chosen, strategy, notes)
        ready = self._ready(chosen, pairs, strategy)
        report = switch(self._denoiser(), pairs, ready, self._gates())
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
            set_strengths(self._denoiser(), strengths)
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
            remove(self._denoiser(), name)
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
        if restore(base.family.model(base)):
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
            chosen: All that should act.
            strategy: How they are fused.
            notes: What a user should know is added here.
            text_encoders: Whether they also act on the text encoders.

        Raises:
            AutoLoRAError: Something does not fit.
        """
        from autolora.fusion import attached, get_strategy, stepping

        dit = self._denoiser()
        with ExitStack() as stack:
            if self._is_attached(chosen, strategy):
                report = self._in_place()
                notes += self._notes
            else:
                pairs = self._pairs(chosen, strategy, notes)
                ready = self._ready(chosen, pairs, strategy)
                report = stack.enter_context(attached(dit, pairs, ready, self._gates()))
            stack.enter_context(stepping(self._base(), dit, get_strategy(strategy)))
            if note := rounding_note(report.rounding):
                notes.append(note)
            if text_encoders or any(entry.text_encoder for entry in chosen):
                self._enter_text_encoders(stack, chosen, notes, text_encoders)
            yield report

    def _is_attached(self, chosen: Sequence[Chosen], strategy: str) -> bool:
        """Tell whether this is just what stays attached, in all steps."""
        if any(entry.steps is not None for entry in chosen):
            return False
        wanted = {entry.lora.name: (id(entry.lora), entry.acting) for entry in chosen}
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
            return [(entry.lora, entry.acting) for entry in ordered]
        pairs: list[tuple[Adapter, float]] = []
        for entry in ordered:
            ready = self._prepare(entry.lora, self._denoiser())
            notes += approximation_notes(entry.lora, ready.errors)
            pairs.append((ready, entry.acting))
        return pairs

    def _ready(
        self, chosen: Sequence[Chosen], pairs: Sequence[tuple[Adapter, float]], name: str
    ) -> Strategy:
        """Make a strategy, with the passes that it wants to see before."""
        from autolora.fusion import get_strategy
        from autolora.generate.relevance import calibrate

        strategy = get_strategy(name)
        if strategy.calibrates and pairs:
            calibrate(self._base(), strategy, pairs, {e.lora.name: e.lora for e in chosen})
        return strategy

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
        self, stack: ExitStack, chosen: Sequence[Chosen], notes: list[str], usual: bool
    ) -> None:
        """Let the parts for text encoders act as a plain sum, where the base model has these."""
        from autolora.fusion import attached, linear_shapes

        base, found = self._base(), False
        for which, attribute in base.family.text_encoders.items():
            encoder: nn.Module | None = getattr(base, attribute)
            if encoder is None:  # of another model of the family
                continue
            layers = linear_shapes(encoder).keys()
            pairs: list[tuple[Adapter, float]] = []
            for entry in sorted(chosen, key=lambda entry: entry.lora.name):
                part = entry.lora.text_encoder(which)
                strength = entry.text_strength(usual)
                if part is None or not (usual or strength):
                    continue
                found, fits = True, not layers.isdisjoint(part.layers)
                notes.append(text_note(entry.lora.name, which, len(part.layers), fits))
                if fits:
                    pairs.append((self._prepare(part, encoder), strength))
            if pairs:
                stack.enter_context(attached(encoder, pairs, "sum"))
        if chosen and not found:
            notes.append("None of the adapters has a part for the text encoders.")
