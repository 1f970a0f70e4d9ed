"""``autolora show``: what a picture says about how it was made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autolora.cli.output import AsJson, console, examples, make_table, print_json, print_notes
from autolora.errors import GenerationError, shown

if TYPE_CHECKING:
    from autolora.generate.report import Report

EXAMPLES = examples(
    "autolora show teapot.png",
    "autolora show teapot.png --json",
    "autolora generate --from-png teapot.png",
)


def show(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="PNG file of AutoLoRA, A1111, Forge or ComfyUI."),
    ],
    as_json: AsJson = False,
) -> None:
    """Show what a picture says about how it was made."""
    from autolora.generate.png import WORKFLOW_CHUNK, read_texts, read_workflow
    from autolora.generate.report import (
        CHUNK,
        PARAMETERS_CHUNK,
        Report,
        read_parameters,
        read_report,
    )

    texts = read_texts(file)
    if CHUNK in texts:
        facts = read_report(file)
        if as_json:
            print_json(facts)
        else:
            _show_report(Report.from_dict(facts))
        return
    nodes = read_workflow(texts.get(WORKFLOW_CHUNK, ""))
    if PARAMETERS_CHUNK in texts:
        found = read_parameters(texts[PARAMETERS_CHUNK])
        data: Any = vars(found)
        rows: _Rows = [("prompt", found.prompt), ("negative prompt", found.negative_prompt)]
        rows += found.settings.items()
    elif nodes:
        data = {"nodes": [vars(node) for node in nodes]}
        rows = [(node.kind, _listed(node.values)) for node in nodes]
    else:
        raise GenerationError(f"{shown(file)} says nothing about how it was made.")
    if as_json:
        print_json(data)
        return
    _print_rows(rows)
    print_notes(["Made by another program; it cannot be repeated from this file."])


_Rows = list[tuple[str, str | None]]


def _listed(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in values.items())


def _show_report(report: Report) -> None:
    base = report.base
    rows: _Rows = [
        ("prompt", report.prompt),
        ("the model read", report.used_prompt if report.used_prompt != report.prompt else None),
        ("negative prompt", report.negative_prompt),
        ("model", report.model if base is None else f"{report.model} ({base.storage})"),
        ("strategy", report.strategy),
        ("seed", str(report.seed)),
        ("steps", str(report.steps)),
        ("size", f"{report.width}x{report.height}"),
        ("guidance", f"{report.guidance:g}"),
        ("drawn at once", ", ".join(f"seed {seed}" for seed in report.batch)),
        ("text encoders", "changed by the LoRAs" if report.text_encoders else None),
        ("versions", ", ".join(f"{name} {text}" for name, text in report.versions.items())),
    ]
    _print_rows(rows)
    if report.adapters:
        columns = ("adapter", "strength", "gate", "score", "hash", "why")
        adapters = [
            (shown(a.name), a.strength, a.gate, a.score, a.sha256[:12], shown(a.why))
            for a in report.adapters
        ]
        console(stderr=False).print()
        console(stderr=False).print(make_table(columns, adapters))
    print_notes(shown(note, 600) for note in report.notes)


def _print_rows(rows: _Rows) -> None:
    known = [(shown(name, 60), shown(text, 2000)) for name, text in rows if text]
    console(stderr=False).print(make_table(("", ""), known))
