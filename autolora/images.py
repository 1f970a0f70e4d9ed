"""Pictures that a generation starts from: a picture to redraw, a mask, and pictures that control.

They are read, checked and brought to the size of the request here, whatever face they come from;
only the base model's family knows what its pipeline calls them. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autolora.errors import GenerationError, shown

if TYPE_CHECKING:
    from PIL.Image import Image

DEFAULT_STRENGTH = 0.6
"""How much of a picture is redrawn where nothing else is said: 0 nothing, 1 everything."""
MAX_PIXELS = 8192 * 8192
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
"""Modes that have an RGB picture in them; others hold depths, floats or inks."""
PROPORTION = 0.02
"""How far the proportions of a picture and a size may be apart, as a part of the ratio."""
_CONTROL = re.compile(r"(?P<kind>[\w.-]+)=(?P<file>.+?)(?::(?P<scale>[0-9]*\.?[0-9]+))?")


@dataclass(frozen=True)
class Control:
    """A picture that guides through a ControlNet.

    Attributes:
        kind: Name of the ControlNet in the configuration, such as ``canny``.
        image: The picture, or its file.
        scale: How strongly it guides.
    """

    kind: str
    image: Image | Path
    scale: float = 1.0


@dataclass(frozen=True)
class GivenImages:
    """What a request has beside its prompt.

    Attributes:
        image: Picture to redraw.
        strength: Part of it that is redrawn, in (0, 1]; None is `DEFAULT_STRENGTH`.
        mask: White where it is redrawn.
        control: Pictures that guide.
        inputs: Further inputs by the pipeline's own names.
    """

    image: Image | Path | None = None
    strength: float | None = None
    mask: Image | Path | None = None
    control: tuple[Control, ...] = ()
    inputs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check what needs no file.

        Raises:
            GenerationError: A strength or mask without a picture, or a number out of range.
        """
        if self.strength is not None and not 0 < self.strength <= 1:
            raise GenerationError(
                f"Strength must be above 0 and at most 1, not {self.strength}: the part of the "
                "picture that is redrawn."
            )
        if self.image is None:
            for what, value in (("A mask", self.mask), ("A strength", self.strength)):
                if value is not None:
                    raise GenerationError(f"{what} goes with a picture to redraw; give one, too.")
        for control in self.control:
            if not 0 <= control.scale <= 10:
                raise GenerationError(
                    f"The scale of {shown(control.kind, 40)} must be between 0 and 10, not "
                    f"{control.scale}."
                )

    def __bool__(self) -> bool:
        return self.image is not None or bool(self.control) or bool(self.inputs)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> tuple[GivenImages, dict[str, Any]]:
        """Read the options of a call that are about pictures.

        Args:
            options: Options by name; ``image``, ``strength``, ``mask``, ``control`` and ``inputs``
                are read. A control may be text, as `parse_control` reads it.

        Returns:
            The pictures, and the other options.

        Raises:
            GenerationError: They do not go together.
        """
        names = ("image", "strength", "mask", "control", "inputs")
        found = {name: options[name] for name in names if options.get(name) is not None}
        asked = found.get("control", ())
        if isinstance(asked, str) or not all(isinstance(c, (str, Control)) for c in asked):
            raise GenerationError('control must be a list such as ["canny=edges.png:0.8"].')
        found["control"] = tuple(parse_control(c) if isinstance(c, str) else c for c in asked)
        return cls(**found), {name: v for name, v in options.items() if name not in names}

    def size(self, multiple: int, asked: tuple[int, int] | None) -> tuple[int, int] | None:
        """Size of the result that follows from the picture to redraw.

        Args:
            multiple: What both sides are multiples of.
            asked: Width and height that were asked for; None where nothing was.

        Returns:
            Width and height; None without a picture, or if its size is not needed.

        Raises:
            GenerationError: The file cannot be read, or the proportions differ from what was asked.
        """
        if self.image is None:
            return asked
        width, height = read_image(self.image, "The picture").size
        if asked is None:
            wide, high = (max(round(side / multiple), 1) * multiple for side in (width, height))
            return wide, high
        if abs(width * asked[1] / (height * asked[0]) - 1) > PROPORTION:
            raise GenerationError(
                f"The picture is {width}x{height}, which is not the shape of {asked[0]}x{asked[1]};"
                " crop it, or leave the size out to keep the picture's."
            )
        return asked

    def facts(self) -> dict[str, Any]:
        """What a report says of the pictures: a digest of each, and the numbers."""
        found: dict[str, Any] = {}
        if self.image is not None:
            found["image"] = digest(self.image, "The picture")
            found["strength"] = self.strength or DEFAULT_STRENGTH
        if self.mask is not None:
            found["mask"] = digest(self.mask, "The mask")
        if self.control:
            found["control"] = [
                {"kind": c.kind, "scale": c.scale, "image": digest(c.image, "The control picture")}
                for c in self.control
            ]
        if self.inputs:
            found["inputs"] = sorted(self.inputs)
        return found

    def named(self, pipe: Any, width: int, height: int) -> dict[str, Any]:
        """Inputs by the pipeline's own names, at the size of the result.

        Args:
            pipe: What `autolora.families.load.load_pipeline` gave.
            width: Pixels.
            height: Pixels.

        Raises:
            GenerationError: The pipeline does not take one of them, or a file cannot be read.
        """
        family = pipe.family
        names, found = family.images(pipe), dict(self.inputs)
        size = (width, height)
        if self.image is not None:
            picture = read_image(self.image, "The picture")
            found[_taken(names.image, family, "a picture")] = fitted(picture, size)
            if names.takes_strength:
                found["denoising_strength"] = self.strength or DEFAULT_STRENGTH
            if self.mask is not None:
                mask = read_image(self.mask, "The mask")
                if mask.size != picture.size:
                    raise GenerationError(
                        f"The mask is {mask.width}x{mask.height} and the picture {picture.width}x"
                        f"{picture.height}; they must have one size."
                    )
                name = _taken(names.mask, family, "a mask")
                found[name] = fitted(mask.convert("L"), size).convert("RGB")
        if self.control:
            name = _taken(names.control, family, "control pictures")
            found[name] = [self._control(pipe, control, size) for control in self.control]
        return found

    def _control(self, pipe: Any, control: Control, size: tuple[int, int]) -> Any:
        from diffsynth.utils.controlnet import ControlNetInput

        kinds: tuple[str, ...] = getattr(pipe, "controlnets", ())
        if control.kind not in kinds:
            there = f"has {', '.join(kinds)}" if kinds else "has none"
            raise GenerationError(
                f"There is no ControlNet {shown(control.kind, 40)!r}: this base model {there}; "
                "name one below `checkpoint: controlnets:` in its configuration."
            )
        picture = fitted(read_image(control.image, "The control picture"), size)
        return ControlNetInput(kinds.index(control.kind), control.scale, image=picture)


def parse_control(text: str) -> Control:
    """Read ``TYPE=FILE`` or ``TYPE=FILE:SCALE``.

    Raises:
        GenerationError: It is neither.
    """
    match = _CONTROL.fullmatch(text.strip())
    if match is None:
        raise GenerationError(
            f"Control {shown(text, 80)!r} is not understood; write TYPE=FILE:SCALE, such as "
            "canny=edges.png:0.8."
        )
    return Control(match["kind"], Path(match["file"]), float(match["scale"] or 1.0))


def read_image(source: Image | Path | str | BytesIO, what: str) -> Image:
    """Read a picture as RGB; transparent parts become white.

    Args:
        source: A picture, its file, or the bytes of one.
        what: What a message calls it.

    Raises:
        GenerationError: The file cannot be read, is no picture, far too large, or of a mode that
            has no RGB picture in it.
    """
    from PIL import Image as images

    image = source
    name = "" if isinstance(source, BytesIO) else f" {shown(source)}"
    if not isinstance(image, images.Image):
        try:
            with images.open(image) as opened:
                if opened.width * opened.height > MAX_PIXELS:
                    raise GenerationError(
                        f"{what}{name} is {opened.width}x{opened.height} pixels; at most "
                        f"{MAX_PIXELS:,} are read."
                    )
                opened.load()
                image = opened
        except (OSError, ValueError, SyntaxError, images.DecompressionBombError) as error:
            reason = shown(" ".join(str(error).split()) or type(error).__name__)
            raise GenerationError(f"{what}{name} cannot be read: {reason}.") from error
    if image.mode not in MODES:
        raise GenerationError(
            f"{what} is of mode {image.mode}, which has no RGB picture in it; save it as RGB."
        )
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        opaque = image.convert("RGBA")
        white = images.new("RGBA", image.size, "white")
        return images.alpha_composite(white, opaque).convert("RGB")
    return image.convert("RGB")


def fitted(image: Image, size: tuple[int, int]) -> Image:
    """Bring a picture to a size."""
    from PIL import Image as images

    return image if image.size == size else image.resize(size, images.Resampling.LANCZOS)


def digest(source: Image | Path, what: str) -> str:
    """Identify a picture by its pixels: ``WIDTHxHEIGHT`` and a hash."""
    image = read_image(source, what)
    return f"{image.width}x{image.height} {hashlib.sha256(image.tobytes()).hexdigest()}"


def _taken(name: str | None, family: Any, what: str) -> str:
    if name is None:
        raise GenerationError(f"{family.title} does not take {what}.")
    return name
