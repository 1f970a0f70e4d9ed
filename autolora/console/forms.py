"""What the page's buttons do: from values of the form to orders, and from jobs to what is shown."""

from __future__ import annotations

import base64
import io
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import gradio as gr

from autolora.config import SIZE_MULTIPLE
from autolora.console.guard import VISIT_COOKIE
from autolora.console.jobs import JobView
from autolora.console.labels import LABELS, LANGUAGES, label, language_of
from autolora.console.orders import Order, Selection, whole_number
from autolora.console.phrases import PHRASES, compiled
from autolora.console.pictures import Picture
from autolora.console.studio import Look, Studio
from autolora.errors import AutoLoRAError, GenerationError
from autolora.request import parse_size

LANGUAGE_COOKIE = "autolora_language"
_SHAPES = ((1, 1), (3, 4), (4, 3), (2, 3), (3, 2), (9, 16), (16, 9))


VALUES = (
    "prompt",
    "negative",
    "seed",
    "steps",
    "size",
    "guidance",
    "count",
    "strategy",
    "compare",
    "desk",
)
"""Names of the parts that hold what is asked for, in the order in which they are sent."""


class Forms:
    """Answers to what people do on the page."""

    def __init__(self, studio: Studio) -> None:
        """Answer by a studio."""
        self.studio = studio

    # What the page starts with

    def header(self) -> dict[str, Any]:
        """Facts for the top of the page, and all labels for the scripts."""
        config = self.studio.pipe.config
        phrases = {language: compiled(known) for language, known in PHRASES.items()}
        facts = {"model": config.name, "languages": LANGUAGES}
        return {**facts, "labels": LABELS, "phrases": phrases}

    def selection(self) -> dict[str, Any]:
        """What the desk starts with."""
        return selection_value(Selection())

    def sizes(self) -> list[str]:
        """Sizes of about the model's usual number of pixels, the usual one first."""
        config = self.studio.pipe.config
        sizes = [f"{config.width}x{config.height}"]
        side = (config.width * config.height) ** 0.5
        for wide, high in _SHAPES:
            scale = side / (wide * high) ** 0.5
            width, height = (_multiple(part * scale) for part in (wide, high))
            if min(width, height) >= 4 * SIZE_MULTIPLE:
                sizes.append(f"{width}x{height}")
        return list(dict.fromkeys(sizes))

    def strategies(self, language: str) -> list[tuple[str, str]]:
        """Ways to fuse adapters, with what people read."""
        from autolora.fusion import strategy_names

        return [(label(language, "by_style"), ""), *((name, name) for name in strategy_names())]

    # Labels

    def first_labels(self, request: gr.Request) -> list[Any]:
        """Labels in the language that the browser prefers, or that was chosen before."""
        return labels(_language(request))

    def first_strategies(self, request: gr.Request) -> Any:
        """The ways to fuse, apart from the other labels as naming them takes importing torch."""
        return gr.update(choices=self.strategies(_language(request)))

    def relabel(self, event: gr.EventData) -> list[Any]:
        """Labels in the language that was chosen, and the ways to fuse."""
        language = str(getattr(event, "language", "en"))
        return [*labels(language), gr.update(choices=self.strategies(language))]

    # Pictures

    async def generate(self, request: gr.Request, *values: Any) -> AsyncGenerator[Any, None]:
        """Draw, and show how it goes; the stage, and the two buttons."""
        resting = gr.update(interactive=True), gr.update(interactive=False)
        busy = gr.update(interactive=False), gr.update(interactive=True)
        try:
            order = self.order(*values)
            run = self.studio.run(order, _owner(request), _visit(request))
            first = True
            async with aclosing(run) as views:
                async for view in views:
                    buttons = resting if view.finished else busy if first else (gr.skip(),) * 2
                    first = False
                    yield stage_value(view), *buttons
        except AutoLoRAError as error:
            yield {"state": "failed", "error": str(error), "pictures": []}, *resting

    def order(self, *values: Any) -> Order:
        """Read the form.

        Raises:
            GenerationError: A value is not possible.
        """
        form = dict(zip(VALUES, values, strict=True))
        width, height = parse_size(str(form["size"] or ""))
        return Order(
            prompt=str(form["prompt"] or ""),
            negative_prompt=str(form["negative"] or ""),
            seed=whole_number("The seed", form["seed"]),
            steps=whole_number("The number of steps", form["steps"]),
            width=width,
            height=height,
            guidance=_number("The guidance", form["guidance"]),
            count=whole_number("The number of pictures", form["count"]),
            strategy=str(form["strategy"] or "") or None,
            compare=bool(form["compare"]),
            selection=Selection.from_dict(form["desk"]),
        )

    def stop(self, request: gr.Request) -> None:
        """End what this browser tab asked for."""
        self.studio.queue.cancel_owner(_owner(request))

    def leave(self, request: gr.Request) -> None:
        """End what a tab asked for that was closed."""
        self.stop(request)

    # Settings of earlier pictures

    def restore(self, event: gr.EventData, request: gr.Request) -> list[Any]:
        """Fill the form with the settings of a picture, from the history or from a PNG file."""
        try:
            order, picture = self._restored(event, _visit(request))
        except (AutoLoRAError, TypeError, ValueError, KeyError) as error:
            known = isinstance(error, AutoLoRAError)
            sentence = str(error) if known else "These settings are not understood."
            return [gr.skip()] * len(VALUES) + [{"state": "notice", "error": sentence}]
        shown = None if picture is None else picture.to_dict()
        return [
            *form_values(self.studio, order),
            {"state": "notice", "error": "", "picture": shown},
        ]

    def _restored(self, event: gr.EventData, visit: str) -> tuple[Order, Picture | None]:
        """The settings, and the picture where it is one of this visit."""
        data: Mapping[str, Any] = event._data if isinstance(event._data, Mapping) else {}
        if "picture" in data:
            entry = self.studio.visits.find(visit, str(data["picture"]))
            if entry is None:
                raise GenerationError("This picture is not in the history of this visit any more.")
            return Order.from_dict(entry.order), entry.picture
        return Order.from_dict(data["order"]), None

    def reuse(self, event: gr.EventData) -> int:
        """Put a picture's seed into the form."""
        return whole_number("The seed", getattr(event, "seed", -1))

    def save_style(self, prompt: str, strategy: str, desk: Any) -> dict[str, Any]:
        """Save the adapters that the cards show as a style, and switch to it."""
        fields = desk if isinstance(desk, Mapping) else {}
        name = str(fields.get("save_as") or "").strip()
        try:
            order = Order(
                prompt=prompt or "",
                strategy=strategy or None,
                selection=Selection.from_dict(desk),
            )
            style = self.studio.save_style(_stem(name), name, order)
        except AutoLoRAError as error:
            return {**fields, "save_as": "", "problem": str(error)}
        return {**selection_value(Selection(style=style.name)), "saved": name}


def part_labels(language: str) -> dict[str, dict[str, Any]]:
    """What the parts of the page say, by part and by Gradio's name for the place."""
    keys = {
        "prompt": {"placeholder": "prompt_hint", "label": "prompt"},
        "negative": {"label": "negative", "placeholder": "negative_hint"},
        "seed": {"label": "seed", "info": "seed_info"},
        "steps": {"label": "steps"},
        "size": {"label": "size", "info": "size_info"},
        "guidance": {"label": "guidance"},
        "count": {"label": "count"},
        "strategy": {"label": "strategy"},
        "compare": {"label": "compare", "info": "compare_info"},
        "settings": {"label": "settings"},
        "generate": {"value": "generate"},
        "stop": {"value": "stop"},
        "studio": {"label": "studio"},
        "pool": {"label": "pool"},
    }
    return {
        part: {place: label(language, key) for place, key in places.items()}
        for part, places in keys.items()
    }


def labels(language: str) -> list[Any]:
    """Updates of all parts with labels, in the order of `part_labels`."""
    return [gr.update(**places) for places in part_labels(language).values()]


def stage_value(view: JobView) -> dict[str, Any]:
    """What the stage shows of a job."""
    pictures = view.results if view.kind == "pictures" else ()
    return {
        "state": view.state,
        "kind": view.kind,
        "position": view.position,
        "task": view.task,
        "tasks": view.tasks,
        "label": view.label,
        "done": view.done,
        "total": view.total,
        "preview": _data_url(view.preview),
        "pictures": [picture.to_dict() for picture in pictures],
        "error": view.error,
    }


def selection_value(selection: Selection) -> dict[str, Any]:
    """A selection as the desk holds it."""
    return {
        "style": selection.style,
        "automatic": selection.automatic,
        "pinned": dict(selection.pinned),
        "dropped": list(selection.dropped),
        "strengths": dict(selection.strengths),
        "use_triggers": selection.use_triggers,
    }


def form_values(studio: Studio, order: Order) -> list[Any]:
    """What the form shows for an order, in the order of `VALUES`."""
    config = studio.pipe.config
    size = f"{order.width or config.width}x{order.height or config.height}"
    return [
        order.prompt,
        order.negative_prompt,
        order.seed,
        config.steps if order.steps is None else order.steps,
        size,
        config.guidance if order.guidance is None else order.guidance,
        order.count,
        order.strategy or "",
        order.compare,
        selection_value(order.selection),
    ]


def _data_url(look: object) -> str:
    if not isinstance(look, Look):
        return ""
    out = io.BytesIO()
    look.image.convert("RGB").save(out, format="JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def _multiple(side: float) -> int:
    return max(SIZE_MULTIPLE, round(side / SIZE_MULTIPLE) * SIZE_MULTIPLE)


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise GenerationError(f"{name} must be a number.")
    return float(value)


def _stem(name: str) -> str:
    """File name for a style that people named."""
    words = "".join(char if char.isalnum() else " " for char in name.lower()).split()
    return "-".join(words)[:48]


def _language(request: gr.Request) -> str:
    """The language that was chosen before, or else that the browser prefers."""
    chosen = (request.cookies or {}).get(LANGUAGE_COOKIE, "")
    accepted = dict(request.headers or {}).get("accept-language", "")
    return chosen if chosen in LANGUAGES else language_of(accepted)


def _owner(request: gr.Request) -> str:
    return f"tab-{request.session_hash}"


def _visit(request: gr.Request) -> str:
    """The visitor; the guard gave their browser a cookie with the page."""
    return str((request.cookies or {}).get(VISIT_COOKIE, ""))
