"""What a generation gives back: the picture, and the facts about how it was made.

The facts travel with the picture, in two PNG text chunks: ``parameters``, as A1111 writes it, so
that other programs can read prompt and LoRAs, and ``autolora``, the whole report as JSON.
Nothing here needs torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autolora.errors import GenerationError, shown

if TYPE_CHECKING:
    from PIL.Image import Image

CHUNK = "autolora"
A1111_CHUNK = "parameters"


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
    """

    name: str
    strength: float
    why: str
    score: float | None = None
    sha256: str = ""
    layers: int = 0
    triggers: list[str] = field(default_factory=list)
    gate: float | None = None


@dataclass
class Report:
    """Everything that is needed to understand a picture and to make it again.

    Attributes:
        prompt: The prompt as it was typed.
        used_prompt: What the model read: without tags, with trigger words.
        negative_prompt: What the picture shall not show.
        model: Name of the base model's configuration.
        strategy: How the adapters were fused.
        seed: Seed of the noise.
        steps: Denoising steps.
        width: Pixels.
        height: Pixels.
        guidance: Guidance scale.
        sigma_shift: Shift of the noise schedule; None is the default.
        adapters: What took part, in order.
        notes: What a user should know, one sentence each, such as files that were left out.
        timings: Seconds by part: ``retrieve``, ``load`` (of the base model, about 0 once it is
            loaded), ``attach``, ``encode``, ``denoise``, ``decode``, and ``total``.
        versions: Of the programs involved.
    """

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
    adapters: list[UsedAdapter] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON."""
        return asdict(self)

    def a1111(self) -> str:
        """Return the report as A1111 writes generation parameters."""
        tags = "".join(f" <lora:{lora.name}:{lora.strength:g}>" for lora in self.adapters)
        facts = {
            "Steps": self.steps,
            "Sampler": "Euler",
            "CFG scale": f"{self.guidance:g}",
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}",
            "Model": self.model,
            "Lora hashes": self._lora_hashes(),
            "Version": f"AutoLoRA {self.versions.get('autolora', '')}".strip(),
        }
        lines = [self.used_prompt.replace("\n", " ") + tags]
        if self.negative_prompt:
            lines.append("Negative prompt: " + self.negative_prompt.replace("\n", " "))
        lines.append(", ".join(f"{key}: {value}" for key, value in facts.items() if value != ""))
        return "\n".join(lines)

    def _lora_hashes(self) -> str:
        pairs = [f"{lora.name}: {lora.sha256[:10]}" for lora in self.adapters if lora.sha256]
        return f'"{", ".join(pairs)}"' if pairs else ""


@dataclass
class Output:
    """A picture and how it came about.

    Attributes:
        image: The picture.
        hits: What the search took, best first; without what was asked for by name.
        prompt: What the model read.
        report: All facts.
    """

    image: Image
    hits: list[Any]
    prompt: str
    report: Report

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
        from PIL.PngImagePlugin import PngInfo

        target = check_png_name(Path(path))
        chunks = PngInfo()
        chunks.add_text(A1111_CHUNK, self.report.a1111())
        chunks.add_text(CHUNK, json.dumps(self.report.to_dict(), ensure_ascii=True))
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=target.parent, suffix=".part")
            try:
                with os.fdopen(handle, "wb") as file:
                    self.image.save(file, format="PNG", pnginfo=chunks)
                os.chmod(temporary, 0o644)  # mkstemp makes the file private to its owner
                return _place(Path(temporary), target, overwrite)
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
        except OSError as error:
            raise GenerationError(
                f"{shown(target)} cannot be written: {shown(error.strerror or error)}."
            ) from error


def check_png_name(path: Path) -> Path:
    """Make sure that a picture can have this name.

    Raises:
        GenerationError: It does not end in .png, or is a folder.
    """
    if path.suffix.lower() != ".png":
        raise GenerationError(f"{shown(path)} must end in .png; pictures are saved as PNG.")
    if os.path.isdir(path):
        raise GenerationError(f"{shown(path)} is a folder; name a file in it.")
    return path


def read_report(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the report back from a picture.

    Args:
        path: A PNG file that `Output.save` wrote.

    Returns:
        The report as plain data.

    Raises:
        GenerationError: The file cannot be read or has no report.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            text = image.info.get(CHUNK)
        report = json.loads(text) if isinstance(text, str) else None
    except (OSError, ValueError) as error:
        raise GenerationError(
            f"{shown(path)} cannot be read as a picture: {shown(error)}."
        ) from error
    if not isinstance(report, dict):
        raise GenerationError(f"{shown(path)} holds no report; it was not made by AutoLoRA.")
    return report


def _place(temporary: Path, target: Path, overwrite: bool) -> Path:
    """Give a finished file its name; a hard link never replaces what is there."""
    if overwrite:
        os.replace(temporary, target)
        return target
    for candidate in _free_names(target):
        try:
            os.link(temporary, candidate)
            return candidate
        except FileExistsError:
            continue
        except OSError:
            # A file system without hard links.
            if not candidate.exists():
                os.replace(temporary, candidate)
                return candidate
    raise AssertionError("names do not run out")


def _free_names(target: Path) -> Iterator[Path]:
    yield target
    number = 2
    while True:
        yield target.with_name(f"{target.stem}-{number}{target.suffix}")
        number += 1
