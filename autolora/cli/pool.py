"""``autolora pool``: list, check, show and add LoRA files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autolora.cli.output import (
    FOUND_PROBLEMS,
    AsJson,
    FollowLinks,
    IndexBar,
    Model,
    PoolFolder,
    complete_loras,
    console,
    examples,
    make_table,
    print_json,
    print_notes,
)
from autolora.errors import PoolError, shown
from autolora.lora.pool import PoolEntry

if TYPE_CHECKING:
    from autolora.lora import LoadReport, Metadata, Pool
    from autolora.lora.check import FileCheck, Twin

pool_app = typer.Typer(
    help="List, check, show and add LoRA files.",
    epilog=examples("autolora pool list", "autolora pool check", "autolora pool show neon"),
    no_args_is_help=True,
)


@pool_app.command(
    "list", epilog=examples("autolora pool list", "autolora pool list --pool ~/loras --json")
)
def list_pool(
    model: Model = "tiny",
    pool: PoolFolder = None,
    follow_links: FollowLinks = None,
    as_json: AsJson = False,
) -> None:
    """List the LoRAs by name."""
    loras = _open(model, pool)
    rows: list[dict[str, Any]] = []
    for entry in loras:
        metadata = loras.metadata(entry.name)
        rows.append(
            {
                "name": entry.name,
                "title": metadata.title,
                "base_model": loras.describe(entry.name).title or "unknown",
                "trigger_words": metadata.trigger_words,
                "kilobytes": round(entry.size / 1000),
                "path": str(entry.path),
            }
        )
    if as_json:
        print_json(_plain(rows))
        return
    table = [
        (r["name"], r["title"], r["base_model"], ", ".join(r["trigger_words"]), r["kilobytes"])
        for r in rows
    ]
    heads = ("name", "title", "base model", "trigger words", "kB")
    console(stderr=False).print(make_table(heads, table))
    print_notes(loras.link_notes())


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
    follow_links: FollowLinks = None,
    as_json: AsJson = False,
) -> None:
    """Open LoRA files and tell what is in them and what is not used; status 1 for problems."""
    if files:
        problems = _check_files(files, _known_entries(model, pool) if deep else [], deep, as_json)
    else:
        problems = _check_pool(_open(model, pool), deep, as_json)
    if problems:
        raise typer.Exit(FOUND_PROBLEMS)


def _known_entries(model: str, pool: Path | None) -> list[PoolEntry]:
    """Files of the pool; none where there is no pool, as a file can be checked without one."""
    try:
        return _open(model, pool).entries
    except PoolError:
        return []


def _check_files(files: list[Path], pool: list[PoolEntry], deep: bool, as_json: bool) -> list[str]:
    """Check files that were named, print what is in each, and return the problems."""
    from autolora.lora.check import check_entries

    problems: list[str] = []
    rows: list[dict[str, Any]] = []
    entries = [PoolEntry(file.stem, file, 0, 0) for file in files]
    for number, found in enumerate(check_entries(entries, deep, pool)):
        problems += [found.problem] if found.problem else []
        if as_json:
            rows.append(_plain(found.to_dict()))
            continue
        if number:
            typer.echo()
        _print_check(found)
    if as_json:
        print_json({"files": len(files), "checks": rows})
    return problems


def _check_pool(loras: Pool, deep: bool, as_json: bool) -> list[str]:
    """Check all files of a pool, print what was found, and return the problems."""
    from autolora.lora.check import check_entries

    found = _PoolCheck([(str(problem.path), problem.reason) for problem in loras.scan_problems])
    with IndexBar("check") as bar:
        for done, check in enumerate(check_entries(loras.entries, deep), 1):
            bar.update(done, len(loras))
            found.add(check, keep_row=as_json)
    found.problems.sort()
    if as_json:
        print_json(found.to_dict(len(loras), deep))
    else:
        for line in found.lines():
            typer.echo(line)
        problems = _counted(len(found.problems), "problem")
        typer.echo(f"{_counted(len(loras), 'LoRA file')}, {problems}.")
        print_notes(found.notes)
    return [reason for _, reason in found.problems]


class _PoolCheck:
    """What was found out about the files of a pool, without keeping any of them."""

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        self.problems = problems  # path and sentence
        self.notes: list[str] = []
        self._formats: Counter[str] = Counter()
        self._dropped: dict[str, Counter[str]] = {}  # keys by reason and name of the LoRA
        self._twins: list[tuple[str, Twin]] = []
        self._rows: list[dict[str, Any]] = []

    def add(self, found: FileCheck, keep_row: bool) -> None:
        """Count one file."""
        if found.report is None:
            self.problems.append((str(found.path), found.problem))
        else:
            self._formats[found.report.format] += 1
            for reason, count in found.report.dropped_reasons.items():
                self._dropped.setdefault(reason, Counter())[found.name] += count
        if found.twin is not None:
            self._twins.append((found.name, found.twin))
        self.notes += [f"{shown(found.name)}: {note}" for note in found.notes]
        if keep_row:
            row = found.to_dict()
            if row["report"] is not None:
                # Hundreds of lines for each file; `pool check FILE --json` has them.
                del row["report"]["matched"]
            self._rows.append(_plain(row))

    def lines(self) -> Iterator[str]:
        """What to tell, problems first."""
        yield from (reason for _, reason in self.problems)
        for why, by_name in sorted(self._dropped.items(), key=lambda item: -item[1].total()):
            names = [shown(name) for name, _ in by_name.most_common()]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            keys = _counted(by_name.total(), "key")
            yield f"{keys} not used: {why} ({', '.join(names[:3])}{more})."
        for group in self._same():
            yield f"The same weights: {', '.join(map(shown, group))}."
        yield from (f"{shown(name)}: {t.sentence}" for name, t in self._twins if not t.is_same)
        if self._formats:
            counted = (f"{count} {name}" for name, count in self._formats.most_common())
            yield f"Formats: {', '.join(counted)}."

    def to_dict(self, files: int, deep: bool) -> dict[str, Any]:
        """The same for another program."""
        return {
            "files": files,
            "problems": [{"path": _plain(path), "reason": why} for path, why in self.problems],
            "formats": dict(self._formats.most_common()),
            "same_weights": self._same() if deep else None,
            "checks": self._rows,
        }

    def _same(self) -> list[list[str]]:
        from autolora.lora.check import group_twins

        return group_twins(self._twins)


def _print_check(found: FileCheck) -> None:
    if found.report is None or found.metadata is None:
        typer.echo(found.problem)
        return
    rows = [
        _path_row("path", found.path),
        *_report_rows(found.report),
        *_metadata_rows(found.metadata),
    ]
    _print_rows(rows)
    print_notes([*found.notes, *([found.twin.sentence] if found.twin else [])])


def _print_rows(rows: Iterable[tuple[str, object]]) -> None:
    known = [(key, str(value)) for key, value in rows if value not in (None, "")]
    console(stderr=False).print(make_table(("", ""), known))


def _report_rows(report: LoadReport) -> list[tuple[str, object]]:
    """What became of a file's keys, for people; reasons are counted."""
    kinds = ", ".join(f"{count} x {kind}" for kind, count in report.algorithms.items())
    names = {"clip": "CLIP", "t5": "T5"}
    encoders = ", ".join(
        f"{n} layers of {names[which]}" for which, n in report.text_encoders.items()
    )
    norm = "depends on the base model" if report.norm is None else f"{report.norm:.4g}"
    return [
        ("format", report.format),
        ("layers", f"{report.layers} of {report.total}"),
        ("kinds", kinds),
        ("rank", _span(report.ranks)),
        ("alpha / rank", _span(report.scales)),
        ("stored as", ", ".join(report.dtypes)),
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
        ("in the header", "embedded_covers", _counted(metadata.embedded_covers, "picture")),
    ]
    rows: list[tuple[str, object]] = [
        (label, f"{value}  [{metadata.sources.get(name, 'unknown')}]")
        for label, name, value in fields
        if value not in (None, "") and name in metadata.sources
    ]
    return rows + [_path_row("cover", cover) for cover in metadata.covers]


def _path_row(label: str, path: object) -> tuple[str, object]:
    # Names of files may hold what a terminal would obey.
    return label, shown(path, limit=4096)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


@pool_app.command(epilog=examples("autolora pool show neon", "autolora pool show neon --json"))
def show(
    name: Annotated[str, typer.Argument(help="Name of a LoRA.", autocompletion=complete_loras)],
    model: Model = "tiny",
    pool: PoolFolder = None,
    follow_links: FollowLinks = None,
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
    head = [_path_row("path", lora.path), ("sha256", lora.sha256)]
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
        bool, typer.Option("--force", help="Add what the pool has under another name.")
    ] = False,
    allow_pickle: Annotated[
        bool,
        typer.Option("--allow-pickle", help="Convert .pt, .ckpt and .bin files to safetensors."),
    ] = False,
    model: Model = "tiny",
    pool: PoolFolder = None,
    follow_links: FollowLinks = None,
    as_json: AsJson = False,
) -> None:
    """Check LoRA files and copy them into the pool with what belongs to them; all or none."""
    from autolora.lora.add import add_files

    with IndexBar("compare") as bar:
        added = add_files(_folder(model, pool), files, name, force, allow_pickle, bar.update)
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
    from autolora.config import load_config
    from autolora.files import follow_links

    config = load_config(model)
    follow_links(config.follow_links)
    return config.pool if pool is None else pool.expanduser()


def _open(model: str, pool: Path | None) -> Pool:
    from autolora.lora import Pool

    return Pool(_folder(model, pool))
