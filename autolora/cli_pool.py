"""``autolora pool``: list, check, show and add LoRA files."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autolora.cli_view import console, make_table, print_json, print_notes
from autolora.errors import PoolError, shown

if TYPE_CHECKING:
    from autolora.adapters import Pool

FOUND_PROBLEMS = 1

pool_app = typer.Typer(help="List, check, show and add LoRA files.", no_args_is_help=True)

Model = Annotated[
    str,
    typer.Option("--model", "-m", envvar="AUTOLORA_MODEL", help="Base model: name or .yaml file."),
]
PoolFolder = Annotated[
    Path | None,
    typer.Option(
        "--pool", envvar="AUTOLORA_POOL", help="Folder of LoRAs, in place of the model's."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


@pool_app.command("list")
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
        print_json(rows)
        return
    table = [(r["name"], r["title"], ", ".join(r["trigger_words"]), r["kilobytes"]) for r in rows]
    console(stderr=False).print(make_table(("name", "title", "trigger words", "kB"), table))


@pool_app.command()
def check(model: Model = "tiny", pool: PoolFolder = None, as_json: AsJson = False) -> None:
    """Open every file and list those that cannot be used; status 1 if there are any."""
    loras = _open(model, pool)
    problems = loras.check()
    if as_json:
        found = [{"path": str(problem.path), "reason": problem.reason} for problem in problems]
        print_json({"files": len(loras), "problems": found})
    else:
        for problem in problems:
            typer.echo(problem.reason)
        typer.echo(f"{len(loras)} LoRA files, {len(problems)} problems.")
    if problems:
        raise typer.Exit(FOUND_PROBLEMS)


@pool_app.command()
def show(
    name: Annotated[str, typer.Argument(help="Name of a LoRA.")],
    model: Model = "tiny",
    pool: PoolFolder = None,
    as_json: AsJson = False,
) -> None:
    """Show what is known about one LoRA: format, layers, ranks and metadata."""
    lora = _open(model, pool).load(name)
    report, metadata = lora.report.to_dict(), lora.metadata
    if as_json:
        print_json(
            {
                "name": name,
                "path": str(lora.path),
                "sha256": lora.sha256,
                "report": report,
                "metadata": metadata.to_dict(),
            }
        )
        return
    low, high = lora.report.ranks
    rows = [
        ("path", lora.path),
        ("sha256", lora.sha256),
        ("format", lora.report.format),
        ("layers", len(lora.layers)),
        ("rank", low if low == high else f"{low} to {high}"),
        ("alpha / rank", " to ".join(f"{scale:g}" for scale in sorted(set(lora.report.scales)))),
        ("keys", f"{report['matched_count']} used, {report['dropped_count']} not used"),
        *(("not used", f"{n} x {why}") for why, n in lora.report.dropped_reasons.items()),
        ("title", metadata.title),
        ("trigger words", ", ".join(metadata.trigger_words)),
        ("tags", ", ".join(metadata.tags)),
        ("base model", metadata.base_model),
        ("strength", metadata.preferred_strength),
        ("description", metadata.description[:300]),
        *(("cover", cover) for cover in metadata.covers),
    ]
    known = [(key, str(value)) for key, value in rows if value not in (None, "")]
    console(stderr=False).print(make_table(("", ""), known))
    print_notes(metadata.warnings)


@pool_app.command()
def add(
    files: Annotated[list[Path], typer.Argument(help="LoRA files (.safetensors).")],
    model: Model = "tiny",
    pool: PoolFolder = None,
) -> None:
    """Check LoRA files and copy them into the pool, with the files beside them."""
    from autolora.adapters import LoRA

    folder = _folder(model, pool)
    for file in files:
        LoRA.load(file)
        if (folder / file.name).exists():
            raise PoolError(
                f"{shown(folder / file.name)} is there already; rename one of the two files."
            )
    for file in files:
        typer.echo(_copy(file, folder))


def _copy(file: Path, folder: Path) -> Path:
    """Copy what belongs to a LoRA; its weights appear last and whole."""
    beside = [
        other
        for other in sorted(file.parent.iterdir())
        if other.is_file() and other.name.startswith(f"{file.stem}.") and other.name != file.name
    ]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for source in (*beside, file):
            target = folder / source.name
            if not target.exists():
                _copy_whole(source, target)
    except OSError as error:
        raise PoolError(f"{shown(file)} cannot be copied: {shown(error)}.") from error
    return folder / file.name


def _copy_whole(source: Path, target: Path) -> None:
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=".part")
    os.close(handle)
    try:
        shutil.copyfile(source, temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def _folder(model: str, pool: Path | None) -> Path:
    from autolora.flux.config import load_config

    return load_config(model).pool if pool is None else pool.expanduser()


def _open(model: str, pool: Path | None) -> Pool:
    from autolora.adapters import Pool

    return Pool(_folder(model, pool))
