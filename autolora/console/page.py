"""The Gradio page: layout, and what its controls do.

Functions here turn the values of a form into a request, and jobs and pictures into what is shown.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import gradio as gr

from autolora.config import SIZE_MULTIPLE
from autolora.console.guard import VISIT_COOKIE
from autolora.console.history import Picture
from autolora.console.i18n import LABELS, LANGUAGES, MESSAGES, PHRASES, compiled, label, language_of
from autolora.console.jobs import JobView
from autolora.console.models import MAX_PICTURES, MAX_STEPS, ServerRequest, desk_of, read_desk
from autolora.console.studio import Look, Studio
from autolora.errors import AutoLoRAError, GenerationError, shown
from autolora.images import DEFAULT_STRENGTH
from autolora.request import parse_size, read_request

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
"""Names of the controls that hold a request's fields, in the order in which they are sent."""
PICTURE = ("redraw", "redrawn")
"""Parts that hold a picture to redraw; they are sent after the others, and not remembered."""


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
        return {**facts, "labels": LABELS, "messages": MESSAGES, "phrases": phrases}

    def selection(self) -> dict[str, Any]:
        """What the desk starts with."""
        return desk_of(ServerRequest(prompt=""))

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
            yield {"state": "failed", **error.to_dict(), "pictures": []}, *resting

    def order(self, *values: Any) -> ServerRequest:
        """Read the form.

        Raises:
            GenerationError: A value is not possible.
        """
        form = dict(zip(VALUES, values[: len(VALUES)], strict=True))
        size, redrawn = _redrawn(form["size"], *values[len(VALUES) :])
        return read_request(
            {
                **read_desk(form["desk"]),
                "prompt": str(form["prompt"] or ""),
                "negative_prompt": str(form["negative"] or ""),
                "seed": whole_number("The seed", form["seed"]),
                "steps": whole_number("The number of steps", form["steps"]),
                "size": size,
                **redrawn,
                "guidance": _number("The guidance", form["guidance"]),
                "count": whole_number("The number of pictures", form["count"]),
                "strategy": str(form["strategy"] or "") or None,
                "compare": bool(form["compare"]),
            },
            ServerRequest,
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
            if not isinstance(error, AutoLoRAError):
                error = GenerationError("These settings are not understood.")
            return [gr.skip()] * len(VALUES) + [{"state": "notice", **error.to_dict()}]
        shown = None if picture is None else picture.to_dict()
        return [
            *form_values(self.studio, order),
            {"state": "notice", "error": "", "picture": shown},
        ]

    def _restored(self, event: gr.EventData, visit: str) -> tuple[ServerRequest, Picture | None]:
        """The settings, and the picture where it is one of this visit."""
        data: Mapping[str, Any] = event._data if isinstance(event._data, Mapping) else {}
        if "picture" in data:
            entry = self.studio.visits.find(visit, str(data["picture"]))
            if entry is None:
                raise GenerationError("This picture is not in the history of this visit any more.")
            return read_request(entry.order, ServerRequest), entry.picture
        return read_request(data["order"], ServerRequest), None

    def reuse(self, event: gr.EventData) -> int:
        """Put a picture's seed into the form."""
        return whole_number("The seed", getattr(event, "seed", -1))

    def save_style(self, prompt: str, strategy: str, desk: Any) -> dict[str, Any]:
        """Save the adapters that the cards show as a style, and switch to it."""
        fields = desk if isinstance(desk, Mapping) else {}
        name = str(fields.get("save_as") or "").strip()
        try:
            asked = {**read_desk(desk), "prompt": prompt or "", "strategy": strategy or None}
            order = read_request(asked, ServerRequest)
            style = self.studio.save_style(_stem(name), name, order)
        except AutoLoRAError as error:
            return {**fields, "save_as": "", "problem": error.to_dict()}
        return {**desk_of(ServerRequest(prompt="", style=style.name)), "saved": name}


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
        "redraw": {"label": "redraw"},
        "redrawn": {"label": "redrawn"},
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
        **view.message,
    }


def form_values(studio: Studio, order: ServerRequest) -> list[Any]:
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
        desk_of(order),
    ]


def _data_url(look: object) -> str:
    if not isinstance(look, Look):
        return ""
    out = io.BytesIO()
    look.image.convert("RGB").save(out, format="JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def _multiple(side: float) -> int:
    return max(SIZE_MULTIPLE, round(side / SIZE_MULTIPLE) * SIZE_MULTIPLE)


def whole_number(name: str, value: object) -> int:
    """Read a whole number from a form.

    Raises:
        GenerationError: It is none.
    """
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    if not math.isfinite(number) or number != int(number):
        raise GenerationError(f"{name} must be a whole number, not {{}}.", shown(value, 40))
    return int(number)


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise GenerationError(f"{name} must be a number.")
    return float(value)


def _redrawn(size: object, picture: Any = None, part: object = None) -> tuple[str, dict[str, Any]]:
    """A picture to redraw at about the size that is set, with its own proportions."""
    text = str(size or "")
    if picture is None:
        return text, {}
    width, height = parse_size(text)
    scale = (width * height / (picture.width * picture.height)) ** 0.5
    fitting = _multiple(picture.width * scale), _multiple(picture.height * scale)
    given = {"init_image": picture.resize(fitting), "strength": _number("The strength", part)}
    return f"{fitting[0]}x{fitting[1]}", given


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


STATIC_URL = "console/static"
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


def theme() -> gr.themes.Base:
    """The look of Gradio's own parts; fonts are the system's, so nothing is fetched."""
    fonts = ["system-ui", "Segoe UI", "Noto Sans", "Noto Sans CJK SC", "sans-serif"]
    look = gr.themes.Base(
        primary_hue=gr.themes.colors.orange,
        neutral_hue=gr.themes.colors.stone,
        font=[gr.themes.Font(name) for name in fonts],
        font_mono=[gr.themes.Font("ui-monospace"), gr.themes.Font("monospace")],
        radius_size=gr.themes.sizes.radius_lg,
    )
    return look.set(
        body_background_fill="#f6f3ee",
        body_background_fill_dark="#141312",
        block_background_fill="#fffdfa",
        block_background_fill_dark="#1d1b1a",
        block_border_width="0px",
        block_shadow="none",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        input_background_fill="#ffffff",
        input_background_fill_dark="#262321",
        input_border_width="1px",
        input_border_color="#e6dfd5",
        input_border_color_dark="#3a3632",
        input_border_color_focus="#c2552d",
        input_border_color_focus_dark="#e0764b",
        button_primary_background_fill="#c2552d",
        button_primary_background_fill_hover="#a94622",
        button_primary_background_fill_dark="#c2552d",
        button_primary_background_fill_hover_dark="#a94622",
        button_primary_text_color="#ffffff",
        button_border_width="0px",
        checkbox_background_color_selected="#c2552d",
        checkbox_background_color_selected_dark="#d9663c",
        checkbox_border_color_selected="#c2552d",
        checkbox_border_color_selected_dark="#d9663c",
        slider_color="#c2552d",
        slider_color_dark="#d9663c",
    )


def head() -> str:
    """What the page's head gets: our scripts, as modules from this server."""
    return (
        "<script>window.autoloraReady = new Promise((done) => { window.autoloraDone = done; });"
        f'</script><script type="module" src="{STATIC_URL}/main.js"></script>'
        f'<link rel="stylesheet" href="{STATIC_URL}/style.css">'
        f'<link rel="icon" href="{STATIC_URL}/icon.svg">'
    )


def widget(kind: str, value: Any, *events: str, **props: Any) -> gr.HTML:
    """A part of the page that our scripts draw.

    Args:
        kind: The function of ``static/main.js`` that draws it.
        value: Its value, as plain data.
        events: Names of the events that it triggers.
        props: Further data for the scripts.
    """
    known = ", ".join(f"'{name}'" for name in events)
    return gr.HTML(
        value=value,
        html_template=f'<div class="al-{kind}"></div>',
        js_on_load=f"/* {known} */ window.autoloraReady.then((autolora) => "
        f"autolora.{kind}({{ element, props, trigger, watch }}));",
        apply_default_css=False,
        elem_id=f"al-{kind}",
        **props,
    )


def build_page(studio: Studio) -> gr.Blocks:
    """Lay the page out and connect it.

    Args:
        studio: What it drives.
    """
    forms = Forms(studio)
    said = part_labels("en")
    with gr.Blocks(title="AutoLoRA", analytics_enabled=False, fill_width=True) as page:
        header = widget("header", forms.header(), "language")
        with gr.Tabs(elem_id="al-tabs"):
            with gr.Tab(**said["studio"], id="studio") as studio_tab:
                parts = _studio_tab(forms, said)
            with gr.Tab(**said["pool"], id="pool") as pool_tab:
                widget("pool", None)
        parts |= {"studio": studio_tab, "pool": pool_tab}
        _connect(page, forms, parts)
        labelled = [parts[name] for name in said]
        header.language(forms.relabel, None, [*labelled, parts["strategy"]], **QUIET)
        page.load(forms.first_labels, None, labelled, **QUIET)
        page.load(forms.first_strategies, None, parts["strategy"], **QUIET)
    page.queue(default_concurrency_limit=None, max_size=256)
    return page


def _studio_tab(forms: Forms, said: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The parts of the first tab by name."""
    with gr.Row(elem_id="al-studio", equal_height=False):
        with gr.Column(scale=5, min_width=320, elem_id="al-left"):
            prompt = gr.Textbox(
                **said["prompt"],
                lines=2,
                max_lines=8,
                elem_id="al-prompt",
                autofocus=True,
                show_label=False,
            )
            with gr.Row(elem_id="al-buttons"):
                generate = gr.Button(
                    **said["generate"],
                    variant="primary",
                    size="lg",
                    elem_id="al-generate",
                    scale=3,
                )
                stop = gr.Button(
                    **said["stop"], size="lg", elem_id="al-stop", interactive=False, scale=1
                )
            compare = gr.Checkbox(**said["compare"], elem_id="al-compare", container=False)
            desk = widget("desk", forms.selection(), "save_style", "restore")
            with gr.Accordion(**said["settings"], open=False, elem_id="al-settings") as settings:
                fields = _settings(forms, said)
        with gr.Column(scale=7, min_width=320, elem_id="al-right"):
            stage = widget("stage", None, "restore", "reuse")
            history = widget("history", None, "restore")
    named = {"prompt": prompt, "generate": generate, "stop": stop, "compare": compare}
    drawn = {"desk": desk, "stage": stage, "history": history, "settings": settings}
    return {**named, **drawn, **fields}


def _settings(forms: Forms, said: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The parts behind *Settings* by name."""
    config = forms.studio.pipe.config
    narrow: dict[str, Any] = {"min_width": 140}
    with gr.Row():
        seed = gr.Number(
            **said["seed"], value=-1, precision=0, minimum=-1, elem_id="al-seed", **narrow
        )
        sizes = forms.sizes()
        size = gr.Dropdown(
            sizes,
            **said["size"],
            value=sizes[0],
            allow_custom_value=True,
            elem_id="al-size",
            **narrow,
        )
    with gr.Row():
        count = gr.Slider(
            1, MAX_PICTURES, **said["count"], value=1, step=1, elem_id="al-count", **narrow
        )
        steps = gr.Slider(
            1,
            MAX_STEPS,
            **said["steps"],
            value=min(config.steps, MAX_STEPS),
            step=1,
            elem_id="al-steps",
            **narrow,
        )
    with gr.Row():
        guidance = gr.Slider(
            0,
            10,
            **said["guidance"],
            value=config.guidance,
            step=0.1,
            elem_id="al-guidance",
            **narrow,
        )
        # The others come a little later: naming them takes importing torch.
        by_style = [(label("en", "by_style"), "")]
        strategy = gr.Dropdown(
            by_style, **said["strategy"], value="", elem_id="al-strategy", **narrow
        )
    negative = gr.Textbox(**said["negative"], lines=1, elem_id="al-negative")
    redraw = gr.Image(
        **said["redraw"],
        type="pil",
        sources=["upload", "clipboard"],
        height=180,
        elem_id="al-redraw",
    )
    redrawn = gr.Slider(
        0.05, 1, **said["redrawn"], value=DEFAULT_STRENGTH, step=0.05, elem_id="al-redrawn"
    )
    names = ("seed", "size", "count", "steps", "guidance", "strategy", "negative", *PICTURE)
    fields = (seed, size, count, steps, guidance, strategy, negative, redraw, redrawn)
    return dict(zip(names, fields, strict=True))


def _connect(page: gr.Blocks, forms: Forms, parts: Mapping[str, Any]) -> None:
    values = [parts[name] for name in VALUES]
    stage, desk = parts["stage"], parts["desk"]
    parts["generate"].click(
        forms.generate,
        [*values, *(parts[name] for name in PICTURE)],
        [stage, parts["generate"], parts["stop"]],
        trigger_mode="once",
        concurrency_limit=None,
        **QUIET,
    )
    parts["stop"].click(forms.stop, queue=False, **QUIET)
    page.unload(forms.leave)
    for source in (stage, parts["history"], desk):
        source.restore(forms.restore, None, [*values, stage], queue=False, **QUIET)
    stage.reuse(forms.reuse, None, parts["seed"], queue=False, **QUIET)
    saved = [parts["prompt"], parts["strategy"], desk]
    desk.save_style(forms.save_style, saved, desk, queue=False, **QUIET)
    parts["prompt"].change(fn=None, js="() => { window.autolora?.refresh(); }")
    # A page that is loaded again, as after a restart of the server, keeps what was typed.
    keep = "(...values) => { window.autolora?.keep(values); }"
    gr.on([part.change for part in values], None, values, None, js=keep)
    page.load(None, values, values, js="async (...values) => (await autoloraReady).kept(values)")
