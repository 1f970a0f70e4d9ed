"""The result of a generation: the picture, and the report of how it was made.

The report travels with the picture in two PNG text chunks: ``parameters``, as A1111 writes it, so
that other programs can read prompt and LoRAs, and ``autolora``, the report as JSON, from which
`autolora.generate.reproduce` makes the picture again. Nothing here needs torch.

LoRAs appear twice in ``parameters``: as ``<lora:name:strength>`` after the prompt, and with hashes
in the setting ``Lora hashes``: 12 digits of the SHA-256 of a safetensors file's data, which stays
the same when somebody edits its header, and which Civitai knows as AutoV3.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autolora import schema
from autolora.errors import GenerationError, shown
from autolora.generate.picture_texts import PARAMETERS_CHUNK, read_texts
from autolora.generate.png import encode_png, write_png
from autolora.infotext import NEGATIVE, guard, quote
from autolora.lora.names import parameter_name
from autolora.unit import LoRAUnit, read_units

if TYPE_CHECKING:
    from PIL.Image import Image

LORA_HASH_DIGITS = 12
MODEL_HASH_DIGITS = 10


def write_parameters(report: Report) -> str:
    """Write a report as A1111 writes generation parameters.

    Args:
        report: The facts of a picture.

    Returns:
        The text, in at least two lines.
    """
    tags = "".join(
        f" <lora:{parameter_name(lora.name)}:{lora.strength:g}>" for lora in _acting(report)
    )
    # A model with embedded guidance has the usual scale beside it, 1 where it is turned off.
    embedded = report.true_cfg is not None
    base = report.base
    settings = {
        "Steps": report.steps,
        "Sampler": "Euler",
        "Schedule type": "Simple",
        "CFG scale": f"{report.true_cfg if embedded else report.guidance:g}",
        "Distilled CFG Scale": f"{report.guidance:g}" if embedded else None,
        "Seed": report.seed,
        "Size": f"{report.width}x{report.height}",
        "Model hash": None if base is None else base.checkpoint_sha256[:MODEL_HASH_DIGITS] or None,
        "Model": report.model,
        "RNG": "CPU",
        "Lora hashes": _lora_hashes(report),
        "Version": f"AutoLoRA {report.versions.get('autolora', '')}".strip(),
    }
    lines = [guard(report.used_prompt) + tags]
    if report.negative_prompt:
        lines.append(f"{NEGATIVE} {guard(report.negative_prompt)}")
    known = ((name, value) for name, value in settings.items() if value is not None)
    lines.append(", ".join(f"{name}: {quote(str(value))}" for name, value in known))
    return "\n".join(lines)


def _acting(report: Report) -> list[UsedAdapter]:
    return [used for used in report.adapters if not used.quiet]


def _lora_hashes(report: Report) -> str | None:
    pairs = [
        f"{parameter_name(lora.name)}: {lora.data_sha256[:LORA_HASH_DIGITS]}"
        for lora in _acting(report)
        if lora.data_sha256
    ]
    return ", ".join(pairs) or None


CHUNK = "autolora"
VERSION = 1
"""Of the JSON in pictures; raised when an older program would misread it."""


@dataclass
class UsedAdapter:
    """An adapter that took part in a picture.

    Attributes:
        name: Its name in the pool.
        strength: Its strength.
        why: Why it was taken.
        score: Score of the search in [0, 1]; None where it was asked for by name.
        sha256: Hash of its file.
        layers: How many layers it changed.
        triggers: Trigger words of it that were added to the prompt.
        gate: Mean over layers, steps and channels of how far its gates were open, 1 as the plain
            sum; None where it was not recorded.
        channels: What each channel of the search gave, in [0, 1].
        data_sha256: Hash of its file's tensor data alone, as A1111 and Civitai (AutoV3) know it.
        steps: First and last step in which it acted, None as the last for the end; empty for all.
        text_encoder: Strength of its part for text encoders, where that was asked for.
        patterns: What its layers were narrowed down by; empty for nothing.
        relevance: How much the prompt asks for it, in standard deviations over neutral prompts;
            None where that was not looked at.
        quiet: Whether the strategy silenced it, since the prompt does not ask for it.
    """

    __pydantic_config__ = schema.RECORDED

    name: str
    strength: float
    why: str
    score: float | None = None
    sha256: str = ""
    layers: int = 0
    triggers: list[str] = field(default_factory=list)
    gate: float | None = None
    channels: dict[str, float] = field(default_factory=dict)
    data_sha256: str = ""
    steps: list[int | None] = field(default_factory=list)
    text_encoder: float | None = None
    patterns: list[str] = field(default_factory=list)
    relevance: float | None = None
    quiet: bool = False

    def to_unit(self) -> LoRAUnit:
        """Return what asks for it again, in the same way.

        Raises:
            GenerationError: It is damaged.
        """
        fields = {"name": self.name, "strength": self.strength, "steps": self.steps or None}
        more = {"text_encoder": self.text_encoder, "layers": self.patterns}
        return read_units([{**fields, **more}])[0]


@dataclass
class BaseModel:
    """Identity of the base model: everything its output depends on.

    Attributes:
        kind: Family of the base model.
        storage: What its linear layers are kept in.
        compute: What they compute in.
        device: Where it ran, such as ``cpu`` or the name of a card.
        threads: Threads that torch computed with on a CPU; 0 elsewhere.
        files: Fingerprints of its files, and of the gates', by part; see
            `autolora.generate.reproduce`.
    """

    __pydantic_config__ = schema.RECORDED

    kind: str
    storage: str
    compute: str
    device: str
    threads: int = 0
    files: dict[str, str] = field(default_factory=dict)

    @property
    def checkpoint_sha256(self) -> str:
        """Hash of the transformer's file; empty where only parts of a large file were hashed."""
        return self.files.get("transformer", "").partition("sha256:")[2]


@dataclass
class Report:
    """Everything that is needed to understand a picture and to make it again.

    Attributes:
        prompt: The prompt as it was typed.
        used_prompt: What the model read: without tags, with trigger words.
        negative_prompt: What the picture should not show.
        model: Name of the base model's configuration.
        strategy: How the adapters were fused.
        seed: Seed of the noise.
        steps: Denoising steps.
        width: Pixels.
        height: Pixels.
        guidance: Guidance scale.
        sigma_shift: Shift of the noise schedule; None is the default.
        true_cfg: Scale of classifier-free guidance where `guidance` is embedded; None where
            `guidance` itself is classifier-free.
        text_encoders: Whether the adapters' text encoder parts were applied.
        batch: Seeds of the pictures that were drawn at once, this one's among them, in order: its
            last bits depend on them. Empty where it was drawn alone.
        adapters: What took part, in order.
        base: What the base model was.
        notes: What a user should know, one sentence each, such as files that were left out.
        timings: Seconds by part: ``retrieve``, ``load`` (of the base model, about 0 once it is
            loaded), ``attach``, ``encode``, ``denoise``, ``decode``, and ``total``. Not in
            pictures, so that the same request gives the same file.
        versions: Of the programs involved.
        images: Digests of the pictures that it started from, with their numbers.
    """

    __pydantic_config__ = schema.RECORDED

    prompt: str
    used_prompt: str
    negative_prompt: str
    model: str
    strategy: str
    seed: int
    steps: int
    width: int
    height: int
    guidance: float
    sigma_shift: float | None = None
    true_cfg: float | None = None
    text_encoders: bool = False
    batch: list[int] = field(default_factory=list)
    adapters: list[UsedAdapter] = field(default_factory=list)
    base: BaseModel | None = None
    notes: list[str] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    images: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON."""
        data = asdict(self)
        if not self.images:  # as all pictures were before any could start from one
            del data["images"]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """Read a report from plain data, such as `to_dict` gives.

        Args:
            data: The data; keys that are not known are passed over.

        Raises:
            GenerationError: A value is missing, or is not of the kind that it must be.
        """
        try:
            return schema.read(cls, data)
        except schema.Invalid as error:
            raise _damaged(error.problems[0]) from None

    def a1111(self) -> str:
        """Return the report as A1111 writes generation parameters."""
        return write_parameters(self)

    def texts(self) -> dict[str, str]:
        """Return the text chunks of a picture, by keyword."""
        facts = {"version": VERSION, **self.to_dict()}
        del facts["timings"]
        for used in facts["adapters"]:
            # What few adapters have is written where they have it.
            for name in ("steps", "text_encoder", "patterns", "relevance", "quiet"):
                if used[name] is False or (not used[name] and used[name] != 0):
                    del used[name]
        return {PARAMETERS_CHUNK: self.a1111(), CHUNK: json.dumps(facts, ensure_ascii=True)}


@dataclass
class Output:
    """A picture and how it came about.

    Attributes:
        image: The picture.
        hits: What the search took, best first; without what was asked for by name.
        prompt: What the model read.
        report: All facts.
        gates: Gates by adapter, layer and step (`autolora.fusion.record.GateMap`); None where no
            gates took part.
    """

    image: Image
    hits: list[Any]
    prompt: str
    report: Report
    gates: Any = None

    def png(self) -> bytes:
        """Return the picture as a PNG file with its report inside."""
        file = io.BytesIO()
        encode_png(self.image, self.report.texts(), file)
        return file.getvalue()

    def save(self, path: str | os.PathLike[str], overwrite: bool = True) -> Path:
        """Write the picture as PNG with its report inside.

        The file appears whole or not at all.

        Args:
            path: The file; its folder is made where it is missing.
            overwrite: Whether to replace a file that is there; otherwise the next free name
                ``stem-2.png``, ``stem-3.png``, ... is taken.

        Returns:
            The file that was written.

        Raises:
            GenerationError: The name does not end in .png, or the file cannot be written.
        """
        return write_png(self.image, self.report.texts(), Path(path), overwrite)


def read_report(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the report back from a picture.

    Args:
        path: A picture; those that `Output.save` wrote have one.

    Returns:
        The report as plain data; `Report.from_dict` takes it.

    Raises:
        GenerationError: The file cannot be read, has no report, or one of a newer program.
    """
    text = read_texts(path).get(CHUNK)
    try:
        report = None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        report = None
    if not isinstance(report, dict):
        raise GenerationError("{} holds no report; it was not made by AutoLoRA.", shown(path))
    version = report.pop("version", VERSION)
    if not isinstance(version, int) or version > VERSION:
        raise GenerationError(
            f"{shown(path)} holds a report of version {shown(version, 20)}, which a newer AutoLoRA "
            "wrote; update this one to read it."
        )
    return report


def _damaged(problem: schema.Problem) -> GenerationError:
    """Say what of a report is damaged."""
    what = str(problem)
    if problem.kind == "type" and problem.where and "must hold" not in what:
        what = f"{problem.where} is {shown(repr(problem.value), 60)}"
    return GenerationError(f"The report is damaged: {what}.", where=problem.where)
