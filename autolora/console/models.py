"""What the HTTP interface takes and gives, as its documentation shows it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from autolora.console.orders import MAX_PICTURES, MAX_STEPS, Order, Selection


class AdapterChoice(BaseModel):
    """An adapter that takes part in any case."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="Its name in the pool.", examples=["elephant"])
    strength: float | None = Field(None, description="Its strength; null is its author's.")


class GenerateRequest(BaseModel):
    """What is asked for; everything but the prompt may be left out."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(
        description="What the picture shall show; `<lora:name:0.8>` takes an adapter as asked.",
        examples=["a neon elephant on a blue background"],
    )
    negative_prompt: str = Field("", description="What the picture shall not show.")
    seed: int = Field(-1, description="Seed of the first picture; -1 is a random one.")
    steps: int | None = Field(None, description=f"Denoising steps, 1 to {MAX_STEPS}.")
    width: int | None = Field(None, description="Pixels.")
    height: int | None = Field(None, description="Pixels.")
    guidance: float | None = Field(None, description="Guidance scale.")
    count: int = Field(1, description=f"How many pictures, 1 to {MAX_PICTURES}.")
    strategy: str | None = Field(None, description="How adapters are fused, such as `gated`.")
    use_triggers: bool = Field(True, description="Add trigger words to the prompt.")
    compare: bool = Field(
        False, description="Draw the fused picture, then with each adapter alone, then without."
    )
    style: str = Field("", description="Name of a style.")
    automatic: bool = Field(True, description="Let the search add adapters that fit.")
    adapters: list[AdapterChoice] = Field(default_factory=list, description="Taken in any case.")
    drop: list[str] = Field(default_factory=list, description="Not taken although they fit.")
    strengths: dict[str, float] = Field(
        default_factory=dict, description="Strengths, by name, of adapters that are found."
    )
    top_k: int | None = Field(None, description="Most adapters in all.")
    stream: bool = Field(
        False, description="Answer with one JSON object per line as the pictures come along."
    )
    image: bool = Field(True, description="Put the PNG files into the answer, as base64.")

    def order(self) -> Order:
        """Return what is asked for, checked.

        Raises:
            GenerationError: A value is not possible.
        """
        selection = Selection.from_dict(
            {
                "style": self.style,
                "automatic": self.automatic,
                "pinned": {entry.name: entry.strength for entry in self.adapters},
                "dropped": self.drop,
                "strengths": self.strengths,
                "top_k": self.top_k,
                "use_triggers": self.use_triggers,
            }
        )
        shared = set(Order.__dataclass_fields__) & set(type(self).model_fields)
        return Order(**{name: getattr(self, name) for name in shared}, selection=selection)


class CardsRequest(BaseModel):
    """A prompt that is being typed, and what was done to the cards so far."""

    prompt: str = ""
    selection: dict[str, Any] = Field(default_factory=dict)


class PictureAnswer(BaseModel):
    """A finished picture."""

    id: str = Field(description="Stands for the picture in URLs of this server.")
    url: str = Field(description="Where the PNG file is, relative to the server's root.")
    file: str = Field(description="Name of the file in the output folder.")
    label: str = Field(description="What it shows, where a comparison was asked for.")
    seed: int = Field(description="The seed that was used.")
    report: dict[str, Any] = Field(description="How it was made; the PNG holds the same.")
    png: str | None = Field(None, description="The PNG file in base64, where it was asked for.")


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
