"""What a picture is asked for with, checked before anything heavy is loaded.

Prompts: ``<lora:name:0.8>`` tags, trigger words, and names for files.

The tag is that of A1111 and Forge. Nothing here needs torch.
"""

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
from autolora.errors import GenerationError, shown
from autolora.images import GivenImages
from autolora.schema import also
from autolora.unit import (
    LoRAUnit,
    Units,
    check_steps,
    check_strength,
    merge_units,
    unit_of_text,
)
from autolora.unit import parse_lora as parse_lora

AskedLoRA = LoRAUnit
merge_asked = merge_units

MAX_PROMPT = 10_000
"""Most characters of a prompt."""
_TAG = re.compile(r"<lora:([^<>]*)>", re.IGNORECASE)
_SPACES = re.compile(r"\s+")


@dataclass(frozen=True)
class ParsedPrompt:
    """A prompt and what it asked for.

    Attributes:
        text: The prompt without tags.
        loras: What the tags asked for, in order.
    """

    text: str
    loras: tuple[LoRAUnit, ...]


def parse_prompt(prompt: str) -> ParsedPrompt:
    """Take the tags out of a prompt.

    Args:
        prompt: Text, with any number of ``<lora:name>`` or ``<lora:name:strength>``. Where there
            are two strengths, as A1111 allows, the second is the transformer's.

    Returns:
        The text and the adapters.

    Raises:
        GenerationError: The prompt is empty or far too long, or a tag is not understood.
    """
    if not isinstance(prompt, str) or not prompt.strip():
        raise GenerationError("The prompt is empty; say what the picture shall show.")
    check_text(prompt, "The prompt")
    loras = tuple(_parse_tag(match.group(1)) for match in _TAG.finditer(prompt))
    return ParsedPrompt(_tidy(_TAG.sub(" ", prompt)), loras)


def check_text(text: str, what: str) -> str:
    """Make sure that a text can be read by a text encoder.

    Args:
        text: A prompt or negative prompt.
        what: What a message calls it.

    Raises:
        GenerationError: It is far too long, or has bytes that are no UTF-8.
    """
    if len(text) > MAX_PROMPT:
        raise GenerationError(
            f"{what} has {len(text)} characters; at most {MAX_PROMPT} are possible."
        )
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise GenerationError(f"{what} is not valid text; save or type it as UTF-8.")
    return text


def _parse_tag(inside: str) -> LoRAUnit:
    parts = inside.split(":")
    if len(parts) > 3:
        raise GenerationError(
            f"The tag <lora:{shown(inside, 60)}> is not understood; write <lora:name:strength>."
        )
    unit = unit_of_text(parts[0], parts[-1] if len(parts) > 1 else None)
    # A prompt may come from anywhere, so that a tag names a LoRA of the pool and no file.
    return LoRAUnit(parts[0].strip(), unit.strength)


def add_triggers(text: str, triggers: Sequence[str]) -> tuple[str, list[str]]:
    """Add trigger words that a prompt does not have yet.

    A word counts as there when the prompt has it as whole words, in any case.

    Args:
        text: The prompt without tags.
        triggers: Words or phrases in the order to add them.

    Returns:
        The prompt with the missing ones after a comma, and those that were added.
    """
    added: list[str] = []
    for trigger in triggers:
        phrase = _tidy(_TAG.sub(" ", trigger)).strip(" ,")
        if phrase and not has_phrase(", ".join([text, *added]), phrase):
            added.append(phrase)
    return ", ".join(part for part in (text, *added) if part), added


def has_phrase(text: str, phrase: str) -> bool:
    """Tell whether a text has a phrase as whole words, in any case."""
    words = r"\s+".join(re.escape(word) for word in phrase.split())
    return re.search(rf"(?<!\w){words}(?!\w)", text, re.IGNORECASE) is not None


def slug(prompt: str, limit: int = 48) -> str:
    """Make a file name from a prompt: lower-case words of it joined by dashes."""
    text = _TAG.sub(" ", prompt).lower()
    words = re.sub(r"[^\w]+", "-", text).strip("-_")
    return words[:limit].strip("-_") or "picture"


def _tidy(text: str) -> str:
    """Join what the removed tags left apart."""
    joined = _SPACES.sub(" ", text)
    joined = re.sub(r" (?=[,.;])", "", joined)
    return re.sub(r"(,)(?:\s*,)+", r"\1", joined).strip(" ,")


MAX_SEED = 2**63 - 1
MAX_BATCH = 16
MAX_NAMES = 64
"""Most pictures that are drawn at once."""


Asked = TypeVar("Asked", bound="GenerateRequest")
Names = Annotated[tuple[str, ...], Strict(False)]


class GenerateRequest(BaseModel):
    """What is asked for, the same for Python, shell, JSON lines, HTTP, console, styles and PNG.

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
        """Check what hangs on no base model."""
        for name, strength in self.strengths.items():
            check_strength(name, strength)
        if len(self.drop) > MAX_NAMES:
            raise GenerationError(f"At most {MAX_NAMES} adapters can be left out.")
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
        negative_prompt: What the picture shall not show.
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
    """Check what is asked for and fill in the model's defaults; see `settle`.

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
        asked: What is asked for.

    Returns:
        The request.

    Raises:
        GenerationError: A value is not possible.
    """
    parsed: ParsedPrompt = parse_prompt(asked.prompt)
    images = asked.images()
    width = config.width if asked.width is None else asked.width
    height = config.height if asked.height is None else asked.height
    free = asked.width is None and asked.height is None
    width, height = images.size(SIZE_MULTIPLE, None if free else (width, height)) or (width, height)
    rounded = rounded_size(width, height)
    notes: tuple[str, ...] = ()
    if (width, height) != rounded:
        notes = (f"The size {width}x{height} was rounded up to {rounded[0]}x{rounded[1]}.",)
    request = Request(
        typed=asked.prompt,
        prompt=parsed.text,
        tags=parsed.loras,
        negative_prompt=check_text(asked.negative_prompt, "The negative prompt").strip(),
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
            raise GenerationError(problem[0].upper() + problem[1:] + ".")
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
            f"Size {shown(text, 40)!r} is not understood; write WIDTHxHEIGHT, such as 128x128."
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
        raise GenerationError(f"{problem[0].upper()}{problem[1:]}.", where="seed")


def _seed_problem(seed: int) -> str | None:
    if isinstance(seed, int) and 0 <= seed <= MAX_SEED:
        return None
    return f"seed must be a whole number between 0 and {MAX_SEED}, not {seed}"
