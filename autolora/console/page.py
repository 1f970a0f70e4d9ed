"""The page: where things stand and which function answers to what. What they do is in `forms`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr

from autolora.console.forms import VALUES, Forms, part_labels
from autolora.console.labels import label
from autolora.console.orders import MAX_PICTURES, MAX_STEPS
from autolora.console.studio import Studio

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
            desk = widget("desk", forms.selection(), "save_style")
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
    names = ("seed", "size", "count", "steps", "guidance", "strategy", "negative")
    fields = (seed, size, count, steps, guidance, strategy, negative)
    return dict(zip(names, fields, strict=True))


def _connect(page: gr.Blocks, forms: Forms, parts: Mapping[str, Any]) -> None:
    values = [parts[name] for name in VALUES]
    stage, desk = parts["stage"], parts["desk"]
    parts["generate"].click(
        forms.generate,
        values,
        [stage, parts["generate"], parts["stop"]],
        trigger_mode="once",
        concurrency_limit=None,
        **QUIET,
    )
    parts["stop"].click(forms.stop, queue=False, **QUIET)
    page.unload(forms.leave)
    for source in (stage, parts["history"]):
        source.restore(forms.restore, None, [*values, stage], queue=False, **QUIET)
    stage.reuse(forms.reuse, None, parts["seed"], queue=False, **QUIET)
    saved = [parts["prompt"], parts["strategy"], desk]
    desk.save_style(forms.save_style, saved, desk, queue=False, **QUIET)
    parts["prompt"].change(fn=None, js="() => { window.autolora?.refresh(); }")
    # A page that is loaded again, as after a restart of the server, keeps what was typed.
    keep = "(...values) => { window.autolora?.keep(values); }"
    gr.on([part.change for part in values], None, values, None, js=keep)
    page.load(None, values, values, js="async (...values) => (await autoloraReady).kept(values)")
