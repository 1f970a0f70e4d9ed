"""What a picture is asked for with, checked before anything heavy is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar, overload

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, model_validator

from autolora import schema
from autolora.config import (
    SIZE_MULTIPLE,
    PipelineConfig,
    guidance_problem,
    rounded_size,
    size_problem,
    steps_problem,
    top_k_problem,
)
from autolora.errors import GenerationError, Message, shown
from autolora.images import GivenImages
from autolora.prompt_syntax import parse_prompt, plain_text
from autolora.schema import also
from autolora.unit import LoRAUnit, Units, check_steps, check_strength

MAX_SEED = 2**63 - 1
MAX_BATCH = 16
MAX_NAMES = 64
"""Most pictures that are drawn at once."""


Asked = TypeVar("Asked", bound="GenerateRequest")
Names = Annotated[tuple[str, ...], Strict(False)]


class GenerateRequest(BaseModel):
    """A request, the same for Python, shell, JSON lines, HTTP, console, styles and PNG.

    None stands for the base model's configured value. Some fields have a second name, by which one
    face or another has always known them; ``size`` (``"128x96"`` or a pair) is width and height.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompt: str = Field(
        description="What the picture shall show; `<lora:name:0.8>` takes a LoRA as asked.",
        examples=["a neon elephant on a blue background"],
    )
    negative_prompt: Annotated[str, also("negative_prompt", "negative")] = Field(
        default="", description="What the picture shall not show."
    )
    seed: int = Field(default=0, description="Seed of the noise, of the first of several pictures.")
    count: int = Field(default=1, description="How many pictures, their seeds counting up.")
    steps: int | None = Field(default=None, description="Denoising steps.")
    width: int | None = Field(default=None, description="Pixels.")
    height: int | None = Field(default=None, description="Pixels.")
    guidance: float | None = Field(default=None, description="Guidance scale.")
    strategy: str | None = Field(default=None, description="How LoRAs are fused, such as `gated`.")
    loras: Annotated[Units, also("loras", "adapters", "pinned")] = Field(
        default=(), description="LoRAs that take part in any case, as names, `name:0.8`, or units."
    )
    retrieve: Annotated[bool, also("retrieve", "automatic")] = Field(
        default=True, description="Let the search add LoRAs that fit."
    )
    top_k: int | None = Field(default=None, description="Most LoRAs in all.")
    drop: Annotated[Names, also("drop", "dropped")] = Field(
        default=(), description="LoRAs that do not take part although they fit."
    )
    strengths: dict[str, float] = Field(
        default_factory=dict, description="Strengths, by name, of LoRAs that are found."
    )
    use_triggers: Annotated[bool, also("use_triggers", "triggers")] = Field(
        default=True, description="Add trigger words to the prompt."
    )
    text_encoders: bool | None = Field(
        default=None, description="Apply the text encoder parts of LoRAs too."
    )
    style: str = Field(default="", description="Name of a style.")
    image: Any = Field(default=None, description="Picture to redraw, or its file.")
    strength: float | None = Field(
        default=None, description="Part of that picture that is redrawn, above 0 and at most 1."
    )
    mask: Any = Field(default=None, description="Picture or file, white where it is redrawn.")
    control: Any = Field(
        default=(), description="Pictures that guide, such as `canny=edges.png:0.8`."
    )
    inputs: dict[str, Any] = Field(
        default_factory=dict, description="Further inputs of the pipeline, by its names."
    )
    compare: bool = Field(
        default=False,
        description="Draw the fused picture, then with each LoRA alone, then without.",
    )

    @model_validator(mode="before")
    @classmethod
    def _sized(cls, raw: Any) -> Any:
        """Take a size apart."""
        if not isinstance(raw, Mapping):
            return raw
        values = dict(raw)
        size = values.pop("size", None)
        if size is not None:
            if values.keys() & {"width", "height"}:
                raise ValueError("size is width and height; give one or the others")
            values["width"], values["height"] = read_size(size)
        return values

    @model_validator(mode="after")
    def _checked(self) -> GenerateRequest:
        """Check what does not depend on the base model."""
        for name, strength in self.strengths.items():
            check_strength(name, strength)
        if len(self.drop) > MAX_NAMES:
            raise GenerationError("At most {} adapters can be left out.", MAX_NAMES, where="drop")
        return self

    def images(self) -> GivenImages:
        """The pictures to start from.

        Raises:
            GenerationError: They do not go together.
        """
        names = ("image", "strength", "mask", "control", "inputs")
        return GivenImages.of({name: getattr(self, name) for name in names})[0]

    def changed(self: Asked, **changes: Any) -> Asked:
        """Return the request with other values; they are checked.

        Raises:
            GenerationError: A value is not possible.
        """
        return read_request({**self.fields(), **changes}, type(self))

    def fields(self) -> dict[str, Any]:
        """The values that were given, by field."""
        return {name: getattr(self, name) for name in self.model_fields_set}

    def to_dict(self) -> dict[str, Any]:
        """Return what was given as plain data for JSON; `read_request` reads it back."""
        values = self.fields()
        if "loras" in values:
            values["loras"] = [unit.to_dict() for unit in self.loras]
        if "drop" in values:
            values["drop"] = list(self.drop)
        return values


def _seed_of_line(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"must be a whole number or text, not {shown(repr(value), 60)}")
    return value


class LineRequest(GenerateRequest):
    """A line of JSON for the shell: seeds may be ranges, and it says where pictures go."""

    seed: Annotated[Any, BeforeValidator(_seed_of_line)] = 0
    batch: int = Field(default=1, description="How many pictures to draw at once.")
    out: str | None = Field(default=None, description="PNG file, or folder ending in /.")


@overload
def read_request(raw: Any) -> GenerateRequest: ...


@overload
def read_request(raw: Any, kind: type[Asked]) -> Asked: ...


def read_request(raw: Any, kind: type[Any] = GenerateRequest) -> Any:
    """Read a request from plain data, whichever face they come from.

    Args:
        raw: Fields by name.
        kind: The face's kind of request.

    Raises:
        GenerationError: A key is unknown or a value not possible; all of them are named.
    """
    try:
        return schema.read(kind, raw)
    except schema.Invalid as error:
        raise request_error(error.problems) from None


def request_error(problems: Sequence[schema.Problem]) -> GenerationError:
    """Make the sentence of what is wrong with a request."""
    sentence = "; ".join(map(str, problems))
    if not (problems[0].where and sentence.startswith(problems[0].where)):
        sentence = sentence[0].upper() + sentence[1:]
    return GenerationError(f"{sentence}.", where=problems[0].where)


def read_size(size: Any) -> tuple[int, int]:
    """Read a size: ``WIDTHxHEIGHT``, or a pair of pixels.

    Raises:
        GenerationError: It is neither.
    """
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return size[0], size[1]
    if not isinstance(size, str):
        raise ValueError(f"size must be text such as 128x96, not {shown(repr(size), 60)}")
    return parse_size(size)


@dataclass(frozen=True)
class Request:
    """One picture to make; every value is known to be possible.

    Attributes:
        typed: The prompt as it was typed.
        prompt: The prompt without tags.
        tags: The adapters that its tags ask for.
        negative_prompt: What the picture should not show.
        seed: Seed of the noise.
        steps: Denoising steps.
        width: Pixels.
        height: Pixels.
        guidance: Guidance scale.
        sigma_shift: Shift of the noise schedule; None is the default.
        top_k: Most adapters to take.
        true_cfg: Scale of classifier-free guidance beside embedded guidance; 1 is off.
        notes: Where this is not quite what was asked for, one sentence each.
        images: Pictures to start from.
    """

    typed: str
    prompt: str
    tags: tuple[LoRAUnit, ...]
    negative_prompt: str
    seed: int
    steps: int
    width: int
    height: int
    guidance: float
    sigma_shift: float | None
    top_k: int
    true_cfg: float = 1.0
    notes: tuple[str, ...] = ()
    images: GivenImages = field(default_factory=GivenImages)


def make_request(config: PipelineConfig, prompt: str, **fields: Any) -> Request:
    """Check a request and fill in the model's defaults; see `settle`.

    Args:
        config: The base model's configuration.
        prompt: The prompt, with or without tags.
        **fields: Further fields of `GenerateRequest`; None is as if it was not given.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    return settle(config, read_request({"prompt": prompt, **given}))


def settle(config: PipelineConfig, asked: GenerateRequest) -> Request:
    """Fill in a base model's defaults, and check all values for it.

    Args:
        config: The base model's configuration.
        asked: The request.

    Returns:
        The request.

    Raises:
        GenerationError: A value is not possible.
    """
    parsed = parse_prompt(asked.prompt)
    negative, negative_notes = plain_text(asked.negative_prompt, "The negative prompt")
    images = asked.images()
    width = config.width if asked.width is None else asked.width
    height = config.height if asked.height is None else asked.height
    free = asked.width is None and asked.height is None
    width, height = images.size(SIZE_MULTIPLE, None if free else (width, height)) or (width, height)
    rounded = rounded_size(width, height)
    notes = (*parsed.notes, *negative_notes)
    if (width, height) != rounded:
        said = f"The size {width}x{height} was rounded up to {rounded[0]}x{rounded[1]}."
        notes = (*notes, said)
    request = Request(
        typed=asked.prompt,
        prompt=parsed.text,
        tags=parsed.loras,
        negative_prompt=negative,
        seed=asked.seed,
        steps=config.steps if asked.steps is None else asked.steps,
        width=rounded[0],
        height=rounded[1],
        guidance=config.guidance if asked.guidance is None else float(asked.guidance),
        sigma_shift=config.sigma_shift,
        top_k=config.top_k if asked.top_k is None else asked.top_k,
        true_cfg=config.true_cfg,
        notes=notes,
        images=images,
    )
    for problem in (
        steps_problem(request.steps),
        size_problem(width, height),
        guidance_problem(request.guidance),
        top_k_problem(request.top_k),
        _seed_problem(request.seed),
    ):
        if problem:
            raise GenerationError(problem.sentence())
    check_steps(asked.loras, request.steps)
    return request


def parse_size(text: str) -> tuple[int, int]:
    """Read ``WIDTHxHEIGHT`` in pixels, or one number for a square.

    Raises:
        GenerationError: It is neither.
    """
    match = re.fullmatch(r"\s*([0-9]{1,6})(?:\s*[xX]\s*([0-9]{1,6}))?\s*", text)
    if match is None:
        raise GenerationError(
            "Size {} is not understood; write WIDTHxHEIGHT, such as 128x128.",
            repr(shown(text, 40)),
            where="size",
        )
    width, height = match.groups()
    return int(width), int(height or width)


def check_batch(batch: int) -> int:
    """Make sure that so many pictures can be drawn at once.

    Raises:
        GenerationError: They cannot.
    """
    if 1 <= batch <= MAX_BATCH:
        return batch
    raise GenerationError(f"Batch must be between 1 and {MAX_BATCH}, not {batch}.")


def check_seed(seed: int) -> None:
    """Make sure that a seed can be used.

    Raises:
        GenerationError: It cannot.
    """
    if problem := _seed_problem(seed):
        raise GenerationError(problem.sentence(), where="seed")


def _seed_problem(seed: int) -> Message | None:
    if isinstance(seed, int) and 0 <= seed <= MAX_SEED:
        return None
    return Message("seed must be a whole number between 0 and {}, not {}", MAX_SEED, seed)
