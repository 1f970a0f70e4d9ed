"""``autolora show``: what a picture says about how it was made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autolora.cli.output import (
    AsJson,
    FollowLinks,
    Model,
    PoolFolder,
    console,
    examples,
    make_table,
    print_json,
    print_notes,
)
from autolora.errors import GenerationError, shown

if TYPE_CHECKING:
    from autolora.generate.foreign import Found
    from autolora.generate.report import Report

EXAMPLES = examples(
    "autolora show teapot.png",
    "autolora show teapot.png --json",
    "autolora generate --from-image teapot.png",
)


def show(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="PNG, JPEG or WebP picture of AutoLoRA or another program."
        ),
    ],
    model: Model = "tiny",
    pool: PoolFolder = None,
    follow_links: FollowLinks = None,
    as_json: AsJson = False,
) -> None:
    """Show what a picture says about how it was made; of other programs' LoRAs, what is here."""
    from autolora.generate.comfy import WORKFLOW_CHUNK, read_workflow
    from autolora.generate.foreign import read_found
    from autolora.generate.picture_texts import read_texts
    from autolora.generate.report import CHUNK, Report, read_report

    texts = read_texts(file)
    if CHUNK in texts:
        facts = read_report(file)
        if as_json:
            print_json(facts)
        else:
            _show_report(Report.from_dict(facts))
        return
    found = read_found(texts)
    nodes = read_workflow(texts.get(WORKFLOW_CHUNK, ""))
    if found is None:
        raise GenerationError(f"{shown(file)} says nothing about how it was made.")
    loras, notes = _in_pool(found, model, pool)
    if as_json:
        listed = [{"kind": node.kind, "values": node.values} for node in nodes.values()]
        print_json({**asdict(found), "loras": loras, "notes": notes, "nodes": listed})
        return
    rows: _Rows = [
        ("made by", found.program),
        ("prompt", found.prompt),
        ("negative prompt", found.negative_prompt),
        *((name, _said(getattr(found, name))) for name in ("seed", "steps")),
        ("size", None if found.width is None else f"{found.width}x{found.height}"),
        ("guidance", _said(found.guidance)),
        *found.settings.items(),
    ]
    rows += [] if found.settings else [(node.kind, _listed(node.values)) for node in nodes.values()]
    _print_rows(rows)
    if loras:
        columns = ("LoRA", "strength", "in the pool as")
        listed_loras = [
            (shown(lora["name"]), lora["strength"], shown(lora["found"] or "-")) for lora in loras
        ]
        console(stderr=False).print()
        console(stderr=False).print(make_table(columns, listed_loras))
    print_notes(
        [
            *notes,
            "Made by another program; `autolora generate --from-image` draws a like picture.",
        ]
    )


def _in_pool(
    found: Found, model: str, folder: Path | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """The LoRAs of a picture with their names in the pool, where there is one."""
    from autolora.config import load_config
    from autolora.errors import AutoLoRAError
    from autolora.generate.foreign import match_loras
    from autolora.lora import Pool

    pool = None
    notes: list[str] = []
    if found.loras:
        try:
            pool = Pool(load_config(model).pool if folder is None else folder)
        except AutoLoRAError as error:
            notes.append(str(error))
    loras = []
    for lora in found.loras:
        matched, _ = match_loras([lora], pool, notes)
        here = matched[0].name if matched else None
        loras.append(
            {"name": lora.name, "strength": lora.strength, "hashes": lora.hashes, "found": here}
        )
    return loras, notes


def _said(value: object) -> str | None:
    return None if value is None else str(value)


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
