"""Requests and answers of the HTTP interface, as its documentation shows them."""

from __future__ import annotations

import base64
import io
import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field, model_validator

from autolora.errors import GenerationError, Message
from autolora.generate.report import Report
from autolora.images import Control, GivenImages, read_image
from autolora.prompt_syntax import escape, parse_prompt
from autolora.request import MAX_SEED, GenerateRequest, read_request
from autolora.unit import MAX_UNITS

if TYPE_CHECKING:
    from PIL.Image import Image

    from autolora.generate.foreign import Taken

MAX_STEPS = 50
MAX_PICTURES = 20
RANDOM_SEED = -1
RANDOM_SEEDS = 2**31


class ServerRequest(GenerateRequest):
    """A request to a server; everything but the prompt may be left out."""

    seed: int = Field(
        default=RANDOM_SEED, description="Seed of the first picture; -1 is a random one."
    )
    stream: bool = Field(
        default=False,
        description="Answer with one JSON object per line as the pictures come along.",
    )
    image: bool = Field(default=True, description="Put the PNG files into the answer, as base64.")
    init_image: Any = Field(
        default=None, description="Picture to redraw, as base64 or a `data:` URL."
    )
    mask: Any = Field(default=None, description="The same, white where it is redrawn.")
    control: Any = Field(
        default=(),
        description="Pictures that guide: a list of `{type, image, scale}`, images as base64.",
    )
    inputs: dict[str, Any] = Field(
        default_factory=dict,
        description="Further inputs of the pipeline, by its names; pictures as `data:` URLs.",
    )

    def images(self) -> GivenImages:
        """The pictures to start from; no text names a file, which would be the server's.

        Raises:
            GenerationError: One cannot be read, or they do not go together.
        """
        return GivenImages(
            sent_image(self.init_image, "init_image"),
            self.strength,
            sent_image(self.mask, "mask"),
            tuple(map(sent_control, self.control)) if self.control else (),
            {name: _sent_input(value, name) for name, value in self.inputs.items()},
        )

    def without_images(self) -> ServerRequest:
        """The request without its pictures, which are too large to be remembered."""
        nothing: dict[str, Any] = {"init_image": None, "strength": None, "mask": None}
        return self.changed(**nothing, control=(), inputs={})

    @model_validator(mode="after")
    def _within_limits(self) -> ServerRequest:
        """Refuse what would take a whole server, or show files that it must not.

        Raises:
            GenerationError: A value is not possible.
        """
        if not 1 <= self.count <= MAX_PICTURES:
            raise GenerationError(
                "The number of pictures must be between {} and {}, not {}.",
                1,
                MAX_PICTURES,
                self.count,
                where="count",
            )
        if self.steps is not None and not 1 <= self.steps <= MAX_STEPS:
            problem = Message("steps must be between {} and {}, not {}", 1, MAX_STEPS, self.steps)
            raise GenerationError(problem.sentence(), where="steps")
        if not RANDOM_SEED <= self.seed <= MAX_SEED - MAX_PICTURES:
            raise GenerationError(
                "The seed must be -1 for a random one, or between {} and {}.",
                0,
                MAX_SEED - MAX_PICTURES,
                where="seed",
            )
        self.images()
        if any(unit.path is not None for unit in self.loras):
            raise GenerationError(
                "A server takes LoRAs of its pool by name, and no files; add the file to the pool.",
                where="loras",
            )
        return self

    def with_seed(self) -> ServerRequest:
        """Return the request with its seed chosen where it was to be random."""
        if self.seed != RANDOM_SEED:
            return self
        return self.changed(seed=secrets.randbelow(RANDOM_SEEDS))


def sent_image(value: Any, where: str) -> Image | None:
    """Read a picture that was sent: base64, a ``data:`` URL, or a picture.

    Raises:
        GenerationError: It is nothing of the kind.
    """
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        return read_image(value, where) if hasattr(value, "convert") else _no_image(where)
    text = value.partition(",")[2] if value.startswith("data:") else value
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        return _no_image(where)
    return read_image(io.BytesIO(data), where)


def _no_image(where: str) -> Image:
    raise GenerationError(f"{where} must be a picture as base64, or as a data: URL.", where=where)


def sent_control(value: Any) -> Control:
    """Read ``{"type": ..., "image": ..., "scale": ...}``.

    Raises:
        GenerationError: It is nothing of the kind.
    """
    if not isinstance(value, Mapping) or not isinstance(value.get("type"), str):
        raise GenerationError(
            'control must be a list of objects with "type", "image" and "scale".', where="control"
        )
    image, scale = sent_image(value.get("image"), "control"), value.get("scale", 1.0)
    if image is None or isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise GenerationError(
            'Each control needs an "image", and its "scale" is a number.', where="control"
        )
    return Control(value["type"], image, float(scale))


def _sent_input(value: Any, name: str) -> Any:
    if isinstance(value, list):
        return [_sent_input(entry, name) for entry in value]
    if isinstance(value, str) and value.startswith("data:"):
        return sent_image(value, name)
    return value


_DESK = ("style", "retrieve", "automatic", "drop", "dropped", "strengths", "top_k", "use_triggers")


def read_desk(desk: object) -> dict[str, Any]:
    """Read what a browser holds of the cards, as fields of a request.

    Args:
        desk: ``style``, ``automatic``, ``pinned`` (strengths by name), ``dropped``, ``strengths``,
            ``use_triggers``, and in ``units`` what else a pinned LoRA's unit says, by name.

    Raises:
        GenerationError: It is nothing of the kind.
    """
    if desk is None or desk == "":
        return {}
    pinned = desk.get("pinned") or {} if isinstance(desk, Mapping) else None
    units = desk.get("units") or {} if isinstance(desk, Mapping) else None
    if not isinstance(desk, Mapping) or not isinstance(units, Mapping):
        raise GenerationError("The selection of adapters is not understood; reload the page.")
    if not isinstance(pinned, Mapping) or len(pinned) > MAX_UNITS:
        raise GenerationError("At most {} adapters with a strength each can be chosen.", MAX_UNITS)
    more = {name: unit for name, unit in units.items() if isinstance(unit, Mapping)}
    loras = [{**more.get(name, {}), "name": name, "strength": s} for name, s in pinned.items()]
    fields = {key: desk[key] for key in _DESK if desk.get(key) is not None}
    return {**fields, "loras": loras}


def desk_of(asked: GenerateRequest) -> dict[str, Any]:
    """What a browser holds of a request's adapters; `read_desk` reads it back."""
    pinned = {unit.name: unit.strength for unit in asked.loras}
    units = {unit.name: unit.to_dict() for unit in asked.loras if not unit.bare}
    return {
        "style": asked.style,
        "automatic": asked.retrieve,
        "pinned": pinned,
        "dropped": list(asked.drop),
        "strengths": dict(asked.strengths),
        "use_triggers": asked.use_triggers,
        **({"units": units} if units else {}),
    }


def request_of_report(
    report: Report, names: Mapping[str, str | None] | None = None
) -> ServerRequest:
    """Settings that make a picture again, from the report inside it.

    Args:
        report: The report.
        names: What its adapters are called now, by their names in it; None for one that is gone.

    Raises:
        GenerationError: The report has a value that no server takes.
    """
    added = any(used.triggers for used in report.adapters)
    now = {} if names is None else names
    units = [
        replace(used.to_unit(), name=name)
        for used in report.adapters
        if (name := now.get(used.name, used.name)) is not None
    ]
    # Tags would fix what the pins leave free; trigger words that were added are added again.
    return read_request(
        {
            "prompt": escape(parse_prompt(report.prompt).text if added else report.used_prompt),
            "negative_prompt": escape(report.negative_prompt),
            "seed": report.seed,
            "steps": report.steps,
            "size": (report.width, report.height),
            "guidance": report.guidance,
            "strategy": report.strategy,
            "loras": units,
            "retrieve": False,
            "use_triggers": added,
        },
        ServerRequest,
    )


def request_of_taken(taken: Taken) -> ServerRequest:
    """Settings of a picture that another program made, as far as a server takes them."""
    seed = taken.seed
    if seed is None or seed > MAX_SEED - MAX_PICTURES:
        seed = RANDOM_SEED
    said = {
        "steps": None if taken.steps is None else min(taken.steps, MAX_STEPS),
        "size": taken.size,
        "guidance": taken.guidance,
    }
    return read_request(
        {
            "prompt": taken.prompt,
            "negative_prompt": taken.negative_prompt,
            "seed": seed,
            "loras": taken.loras,
            "retrieve": False,
            "use_triggers": False,
            **{name: value for name, value in said.items() if value is not None},
        },
        ServerRequest,
    )


class CardsRequest(BaseModel):
    """A prompt that is being typed, and what was done to the cards so far."""

    prompt: str = ""
    selection: dict[str, Any] = Field(default_factory=dict)
    negative_prompt: str = Field("", description="What the picture shall not show.")


class PictureAnswer(BaseModel):
    """A finished picture."""

    id: str = Field(description="Stands for the picture in URLs of this server.")
    url: str = Field(description="Where the PNG file is, relative to the server's root.")
    file: str = Field(description="Name of the file in the output folder.")
    label: str = Field(description="What it shows, where a comparison was asked for.")
    seed: int = Field(description="The seed that was used.")
    report: dict[str, Any] = Field(description="How it was made; the PNG holds the same.")
    png: str | None = Field(
        default=None, description="The PNG file in base64, where it was asked for."
    )


class GenerateAnswer(BaseModel):
    """The pictures."""

    pictures: list[PictureAnswer]


class HitAnswer(BaseModel):
    """An adapter that was found."""

    name: str
    title: str
    score: float = Field(description="Probability that the prompt asks for it.")
    why: str = Field(description="The strongest reason.")
    channels: dict[str, float] = Field(description="Probability by channel that found it.")
    chosen: bool = Field(description="Whether a picture for this prompt would take it.")


class SearchAnswer(BaseModel):
    """What a search found, best first."""

    hits: list[HitAnswer]
    notes: list[str] = Field(description="What one should know, such as an index being built.")


class QueueAnswer(BaseModel):
    """Jobs in the queue: the running one first."""

    jobs: list[dict[str, Any]]


class Problem(BaseModel):
    """What is wrong, as one sentence."""

    error: str
    where: str = Field(default="", description="The field that is wrong, where it is one.")
    template: str = Field(default="", description="The sentence with `{}` for each value.")
    values: list[Any] = Field(default_factory=list, description="The values.")
