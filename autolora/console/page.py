"""The page: where things stand and which function answers to what. What they do is in `forms`."""

from __future__ import annotations

from typing import Any

import gradio as gr

from autolora.console.forms import Form, Forms
from autolora.console.labels import label
from autolora.console.orders import MAX_PICTURES, MAX_STEPS
from autolora.console.studio import Studio

STATIC_URL = "console/static"


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
        button_primary_background_fill="#c2552d",
        button_primary_background_fill_hover="#a94622",
        button_primary_background_fill_dark="#d9663c",
        button_primary_text_color="#ffffff",
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
    with gr.Blocks(title="AutoLoRA", analytics_enabled=False, fill_width=True) as page:
        header = widget("header", forms.header(), "language")
        with gr.Tabs(elem_id="al-tabs"):
            with gr.Tab(label("en", "studio"), id="studio") as studio_tab:
                form, buttons, stage, history = _studio_tab(forms)
            with gr.Tab(label("en", "pool"), id="pool") as pool_tab:
                widget("pool", None)
        _connect(page, forms, form, buttons, stage, history)
        labelled = [*form.labelled(), *buttons, studio_tab, pool_tab]
        relabelled = {"outputs": labelled, "show_progress": "hidden", "api_visibility": "private"}
        header.language(forms.relabel, **relabelled)
        page.load(forms.first_labels, **relabelled)
    page.queue(default_concurrency_limit=None, max_size=256)
    return page


def _studio_tab(forms: Forms) -> tuple[Form, list[gr.Button | gr.Accordion], gr.HTML, gr.HTML]:
    with gr.Row(elem_id="al-studio", equal_height=False):
        with gr.Column(scale=5, min_width=320, elem_id="al-left"):
            prompt = gr.Textbox(
                lines=2, max_lines=8, elem_id="al-prompt", autofocus=True, show_label=False
            )
            with gr.Row(elem_id="al-buttons"):
                generate = gr.Button(variant="primary", size="lg", elem_id="al-generate", scale=3)
                stop = gr.Button(size="lg", elem_id="al-stop", interactive=False, scale=1)
            desk = widget("desk", forms.selection(), "save_style")
            with gr.Accordion(open=False, elem_id="al-settings") as settings:
                fields = _settings(forms)
        with gr.Column(scale=7, min_width=320, elem_id="al-right"):
            stage = widget("stage", None, "restore", "reuse")
            history = widget("history", None, "restore")
    form = Form(prompt=prompt, desk=desk, settings=settings, **fields)
    return form, [generate, stop], stage, history


def _settings(forms: Forms) -> dict[str, Any]:
    config = forms.studio.pipe.config
    with gr.Row():
        seed = gr.Number(value=-1, precision=0, minimum=-1, elem_id="al-seed", min_width=120)
        count = gr.Slider(1, MAX_PICTURES, value=1, step=1, elem_id="al-count", min_width=160)
    with gr.Row():
        steps = gr.Slider(
            1,
            MAX_STEPS,
            value=min(config.steps, MAX_STEPS),
            step=1,
            elem_id="al-steps",
            min_width=160,
        )
        guidance = gr.Slider(
            0, 10, value=config.guidance, step=0.1, elem_id="al-guidance", min_width=160
        )
    with gr.Row():
        size = gr.Dropdown(
            forms.sizes(),
            value=forms.sizes()[0],
            allow_custom_value=True,
            elem_id="al-size",
            min_width=140,
        )
        # The others come with the labels: naming them takes importing torch.
        by_style = [(label("en", "by_style"), "")]
        strategy = gr.Dropdown(by_style, value="", elem_id="al-strategy", min_width=140)
    negative = gr.Textbox(lines=1, elem_id="al-negative")
    compare = gr.Checkbox(elem_id="al-compare")
    return {
        "negative": negative,
        "seed": seed,
        "steps": steps,
        "size": size,
        "guidance": guidance,
        "count": count,
        "strategy": strategy,
        "compare": compare,
    }


def _connect(
    page: gr.Blocks,
    forms: Forms,
    form: Form,
    buttons: list[Any],
    stage: gr.HTML,
    history: gr.HTML,
) -> None:
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    generate, stop = buttons
    generate.click(
        forms.generate,
        form.values(),
        [stage, generate, stop],
        trigger_mode="once",
        concurrency_limit=None,
        **quiet,
    )
    stop.click(forms.stop, queue=False, **quiet)
    page.unload(forms.leave)
    for source in (stage, history):
        source.restore(forms.restore, None, [*form.values(), stage], queue=False, **quiet)
    stage.reuse(forms.reuse, None, form.seed, queue=False, **quiet)
    form.desk.save_style(
        forms.save_style, [form.prompt, form.strategy, form.desk], form.desk, queue=False, **quiet
    )
    form.prompt.change(fn=None, js="() => { window.autolora && window.autolora.refresh(); }")
