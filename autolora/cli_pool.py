"""``autolora pool``: list, check, show and add LoRA files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autolora.cli_options import (
    FOUND_PROBLEMS,
    AsJson,
    Model,
    PoolFolder,
    complete_loras,
    examples,
)
from autolora.cli_view import IndexBar, console, make_table, print_json, print_notes

if TYPE_CHECKING:
    from autolora.adapters import LoadReport, Metadata, Pool
    from autolora.adapters.checking import FileCheck

pool_app = typer.Typer(
    help="List, check, show and add LoRA files.",
    epilog=examples("autolora pool list", "autolora pool check", "autolora pool show neon"),
    no_args_is_help=True,
)


@pool_app.command(
    "list", epilog=examples("autolora pool list", "autolora pool list --pool ~/loras --json")
)
def list_pool(model: Model = "tiny", pool: PoolFolder = None, as_json: AsJson = False) -> None:
    """List the LoRAs by name."""
    loras = _open(model, pool)
    rows: list[dict[str, Any]] = []
    for entry in loras:
        metadata = loras.metadata(entry.name)
        rows.append(
            {
                "name": entry.name,
                "title": metadata.title,
                "trigger_words": metadata.trigger_words,
                "kilobytes": round(entry.size / 1000),
                "path": str(entry.path),
            }
        )
    if as_json:
        print_json(_plain(rows))
        return
    table = [(r["name"], r["title"], ", ".join(r["trigger_words"]), r["kilobytes"]) for r in rows]
    console(stderr=False).print(make_table(("name", "title", "trigger words", "kB"), table))


@pool_app.command(
    epilog=examples(
        "autolora pool check",
        "autolora pool check ~/Downloads/style.safetensors",
        "autolora pool check --deep --json",
    )
)
def check(
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="LoRA files; the whole pool without any.", show_default=False),
    ] = None,
    deep: Annotated[
        bool,
        typer.Option("--deep", help="Also look for duplicates, empty ones and broken pictures."),
    ] = False,
    model: Model = "tiny",
    pool: PoolFolder = None,
    as_json: AsJson = False,
) -> None:
    """Open LoRA files and tell what is in them and what is not used; status 1 for problems."""
    from autolora.adapters.checking import check_file

    if files:
        checks = [check_file(file, deep=deep) for file in files]
        problems = [found.problem for found in checks if found.problem]
        if as_json:
            print_json({"files": len(files), "checks": [_plain(c.to_dict()) for c in checks]})
        else:
            for found in checks:
                _print_check(found)
    else:
        problems = _check_pool(_open(model, pool), deep, as_json)
    if problems:
        raise typer.Exit(FOUND_PROBLEMS)


def _check_pool(loras: Pool, deep: bool, as_json: bool) -> list[str]:
    """Check all files of a pool, print what was found, and return the problems."""
    from autolora.adapters.checking import check_entries
    from autolora.adapters.duplicates import find_duplicates

    rows: list[dict[str, Any]] = []
    problems = [(str(problem.path), problem.reason) for problem in loras.scan_problems]
    formats: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    notes: list[str] = []
    with IndexBar("check") as bar:
        for done, found in enumerate(check_entries(loras.entries, deep), 1):
            bar.update(done, len(loras))
            if found.report is None:
                problems.append((str(found.path), found.problem))
            else:
                formats[found.report.format] += 1
                dropped.update(found.report.dropped_reasons)
            if as_json:
                rows.append(_plain(found.to_dict()))
            notes += [f"{found.name}: {note}" for note in found.notes]
    same = find_duplicates(loras.entries) if deep else []
    problems.sort()
    if as_json:
        listed = [{"path": _plain(path), "reason": reason} for path, reason in problems]
        print_json(
            {
                "files": len(loras),
                "problems": listed,
                "formats": dict(formats.most_common()),
                "same_weights": same if deep else None,
                "checks": rows,
            }
        )
        return [reason for _, reason in problems]
    for _, reason in problems:
        typer.echo(reason)
    for why, count in dropped.most_common():
        typer.echo(f"{count} keys not used: {why}.")
    for names in same:
        typer.echo(f"The same weights: {', '.join(names)}.")
    typer.echo(f"{len(loras)} LoRA files, {len(problems)} problems.")
    print_notes([*notes, *([f"Formats: {_counted(formats)}"] if deep else [])])
    return [reason for _, reason in problems]


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in counts.most_common())


def _print_check(found: FileCheck) -> None:
    if found.report is None or found.metadata is None:
        typer.echo(found.problem)
        return
    rows = [("path", found.path), *_report_rows(found.report), *_metadata_rows(found.metadata)]
    _print_rows(rows)
    print_notes(found.notes)


def _print_rows(rows: Iterable[tuple[str, object]]) -> None:
    known = [(key, str(value)) for key, value in rows if value not in (None, "")]
    console(stderr=False).print(make_table(("", ""), known))


def _report_rows(report: LoadReport) -> list[tuple[str, object]]:
    """What became of a file's keys, for people; reasons are counted."""
    kinds = ", ".join(f"{count} x {kind}" for kind, count in report.algorithms.items())
    encoders = ", ".join(f"{count} x {which}" for which, count in report.text_encoders.items())
    norm = "depends on the base model" if report.norm is None else f"{report.norm:.4g}"
    return [
        ("format", report.format),
        ("layers", f"{report.layers} of {report.total}"),
        ("kinds", kinds),
        ("rank", _span(report.ranks)),
        ("alpha / rank", _span(report.scales)),
        ("norm of the change", norm),
        ("biases", report.biases or ""),
        ("normalizations", report.norms or ""),
        ("text encoders", encoders),
        ("keys", f"{len(report.matched)} used, {len(report.dropped)} not used"),
        *(("not used", f"{n} x {why}") for why, n in report.dropped_reasons.items()),
    ]


def _span(values: tuple[float, float]) -> str:
    low, high = values
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _metadata_rows(metadata: Metadata) -> list[tuple[str, object]]:
    """What is known about a LoRA, each with its source."""
    low, high = metadata.strength_bounds or (None, None)
    fields: list[tuple[str, str, object]] = [
        ("title", "title", metadata.title),
        ("trigger words", "trigger_words", ", ".join(metadata.trigger_words)),
        ("tags", "tags", ", ".join(metadata.tags)),
        ("suggestions", "suggestions", ", ".join(metadata.suggestions)),
        ("base model", "base_model", metadata.base_model),
        ("strength", "preferred_strength", metadata.preferred_strength),
        ("strengths", "strength_bounds", "" if low is None else f"{low:g} to {high:g}"),
        ("description", "description", metadata.description[:300]),
        ("captions", "captions", len(metadata.captions) or None),
        ("in the header", "embedded_covers", _pictures(metadata.embedded_covers)),
    ]
    rows: list[tuple[str, object]] = [
        (label, f"{value}  [{metadata.sources.get(name, 'unknown')}]")
        for label, name, value in fields
        if value not in (None, "")
    ]
    return rows + [("cover", cover) for cover in metadata.covers]


def _pictures(count: int) -> str:
    return "" if not count else f"{count} picture{'s' if count > 1 else ''}"


@pool_app.command(epilog=examples("autolora pool show neon", "autolora pool show neon --json"))
def show(
    name: Annotated[str, typer.Argument(help="Name of a LoRA.", autocompletion=complete_loras)],
    model: Model = "tiny",
    pool: PoolFolder = None,
    as_json: AsJson = False,
) -> None:
    """Show what is known about one LoRA: format, layers, ranks, and metadata with its sources."""
    lora = _open(model, pool).load(name)
    report, metadata = lora.report, lora.metadata
    if as_json:
        facts = {
            "name": name,
            "path": str(lora.path),
            "sha256": lora.sha256,
            "report": report.to_dict(),
            "metadata": metadata.to_dict(),
        }
        print_json(_plain(facts))
        return
    head = [("path", lora.path), ("sha256", lora.sha256)]
    _print_rows([*head, *_report_rows(report), *_metadata_rows(metadata)])
    print_notes(metadata.warnings)


@pool_app.command(
    epilog=examples(
        "autolora pool add ~/Downloads/*.safetensors",
        "autolora pool add ~/Downloads/style.safetensors --name neon",
        "autolora pool add --allow-pickle ~/Downloads/old.pt",
    )
)
def add(
    files: Annotated[list[Path], typer.Argument(help="LoRA files.")],
    name: Annotated[
        str | None,
        typer.Option("--name", help="Name in the pool, for one file.", show_default=False),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Add a file that the pool has under another name.")
    ] = False,
    allow_pickle: Annotated[
        bool,
        typer.Option("--allow-pickle", help="Convert .pt, .ckpt and .bin files to safetensors."),
    ] = False,
    model: Model = "tiny",
    pool: PoolFolder = None,
    as_json: AsJson = False,
) -> None:
    """Check LoRA files and copy them into the pool with what belongs to them; all or none."""
    from autolora.adapters.adding import add_files

    added = add_files(_folder(model, pool), files, name, force, allow_pickle)
    if as_json:
        rows = [
            {
                "path": str(one.path),
                "source": str(one.source),
                "sha256": one.sha256,
                "beside": [path.name for path in one.beside],
                "notes": list(one.notes),
            }
            for one in added
        ]
        print_json(_plain(rows))
        return
    for one in added:
        typer.echo(one.path)
        print_notes(one.notes)


def _plain(value: Any) -> Any:
    """Data that UTF-8 can hold: file names may have bytes that are no text."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_plain(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _folder(model: str, pool: Path | None) -> Path:
    from autolora.flux.config import load_config

    return load_config(model).pool if pool is None else pool.expanduser()


def _open(model: str, pool: Path | None) -> Pool:
    from autolora.adapters import Pool

    return Pool(_folder(model, pool))
