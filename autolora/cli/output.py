"""What the shell's commands share: exit statuses, options, completion, how results look."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from autolora.errors import AutoLoRAError, shown

if TYPE_CHECKING:
    from autolora.generate.report import Report
    from autolora.pipeline import AutoLoRAPipeline
    from autolora.retrieval import Hit

PIPE_WIDTH = 160  # columns for a reader that is no terminal


def console(stderr: bool = True) -> Console:
    """Return a console; where nobody sees a terminal, lines are long enough not to be cut."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else PIPE_WIDTH, highlight=False)


def fail(sentence: str, status: int) -> int:
    """Say on stderr what is wrong, and return the exit status."""
    print(f"autolora: {sentence}", file=sys.stderr)
    return status


def print_json(data: Any) -> None:
    """Print data on stdout."""
    print(json.dumps(data, indent=2, ensure_ascii=False, default=str))


def print_notes(notes: Iterable[str]) -> None:
    """Print notes on stderr, one per line."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def make_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """Make a table; numbers stand to the right, and nothing in a cell is taken for markup."""
    table = Table(box=None, pad_edge=False, header_style="bold", show_header=any(columns))
    cells = [list(row) for row in rows]
    for number, column in enumerate(columns):
        numeric = bool(cells) and all(isinstance(row[number], (int, float)) for row in cells)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        table.add_row(*(Text(_cell(value)) for value in row))
    return table


def show_hits(hits: Sequence[Hit], chosen: set[str], as_json: bool) -> None:
    """Print what a search found; those that a picture would take are marked."""
    if as_json:
        rows = [
            {
                "name": hit.name,
                "score": round(hit.score, 4),
                "why": hit.why,
                "title": hit.title,
                "chosen": hit.name in chosen,
                "channels": {name: round(value, 4) for name, value in hit.channels.items()},
            }
            for hit in hits
        ]
        print_json(rows)
        return
    marked = [("*" if h.name in chosen else "", shown(h.name), h.score, shown(h.why)) for h in hits]
    console(stderr=False).print(make_table(("", "adapter", "score", "why"), marked))
    if not chosen:
        print_notes(["Nothing fits well enough for a picture to take it."])


class _Bar:
    """A progress bar on stderr that appears when there is something to show.

    Args:
        title: What is going on.
        patience: Seconds to go on for before it appears.
    """

    def __init__(self, title: str, patience: float = 0.0) -> None:
        self._title = title
        self._patience = patience
        self._started: float | None = None
        self._progress: Progress | None = None
        self._task: Any = None

    def update(self, done: int, total: int) -> None:
        """Show that so much is done."""
        if self._progress is None:
            # From the first report on: what was loaded before it is not this bar's work.
            self._started = self._started or time.monotonic()
            if time.monotonic() < self._started + self._patience:
                return
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=console(),
                redirect_stdout=False,  # data must not go where the bar goes
            )
            self._task = self._progress.add_task(self._title, total=total)
            self._progress.start()
        self._progress.update(self._task, completed=done, total=total)

    def close(self) -> None:
        """Close the bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class IndexBar(_Bar):
    """Progress of going through a pool; nothing is shown where it takes no time."""

    def __init__(self, title: str = "index") -> None:
        super().__init__(title, patience=1.0)

    def __enter__(self) -> IndexBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class PicturesView:
    """Pictures of one prompt on their way: what was chosen, the steps, and what is to be known."""

    def __init__(self, quiet: bool) -> None:
        """Show nothing yet.

        Args:
            quiet: Whether only the bar is wanted.
        """
        self._quiet = quiet
        self._said: set[str] = set()
        self._status = console().status("loading") if sys.stderr.isatty() else None
        self._bar = _Bar("drawing")

    def __enter__(self) -> PicturesView:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop_status()
        self._bar.close()

    def planned(self, report: Report) -> None:
        """Show which adapters take part and why."""
        self._stop_status()
        if self._quiet:
            return
        if report.adapters:
            rows = [(shown(a.name), a.strength, a.score, shown(a.why)) for a in report.adapters]
            console().print(make_table(("adapter", "strength", "score", "why"), rows))
        else:
            print_notes(["No LoRA takes part; the base model draws alone."])
        if report.used_prompt != report.prompt:
            print_notes([f"The model reads: {shown(report.used_prompt, 600)}"])
        self.tell(report.notes)

    def step(self, done: int, total: int) -> None:
        """Show a denoising step."""
        self._bar.update(done, total)

    def tell(self, notes: Sequence[str]) -> None:
        """Print notes that were not printed yet, such as those that came up while drawing."""
        if not self._quiet:
            print_notes(note for note in notes if note not in self._said)
            self._said.update(notes)

    def saved(self, path: Path, notes: Sequence[str]) -> None:
        """Print where a picture is, and what there is to know of it."""
        self._bar.close()  # a line in the midst of a bar would be garbled
        self.tell(notes)
        if not self._quiet:
            print(path, flush=True)

    def _stop_status(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


FOUND_PROBLEMS = 1
"""A check found something, or a line of a batch failed."""
WRONG_INPUT = 2
"""Something that was asked for is not possible; one sentence on stderr says what."""
INTERRUPTED = 130
"""Ctrl-C."""

STRATEGIES = (
    "autolora",
    "average",
    "composite",
    "dare",
    "gated",
    "klora",
    "loratorio",
    "merged",
    "norm",
    "np",
    "ssr",
    "sum",
    "switch",
    "ties",
)
"""Names of the strategies for completion, which must not load torch; a test compares them."""


def examples(*lines: str) -> str:
    """Make the end of a help text from example command lines, which are not wrapped."""
    # The mark in front keeps the line breaks of what follows.
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])


def complete_models(incomplete: str) -> list[str]:
    """Complete the name of a base model, or a YAML file of the working folder."""
    from autolora.config import shipped_configs

    files = (path.name for path in Path().glob("*.yaml"))
    return _starting(incomplete, (*shipped_configs(), *sorted(files)))


def complete_loras(context: typer.Context, incomplete: str) -> list[str]:
    """Complete the name of a LoRA in the pool that the command line names."""
    try:
        names = _starting(incomplete, _lora_names(context))
    except AutoLoRAError:
        # Nothing can be said in the middle of a line; the command itself will say it.
        return []
    # Shells quote what they are given, but for bash, and zsh's script mistakes these characters.
    names = [name for name in names if name.isprintable() and not set(name) & set("'\"\\")]
    if os.environ.get("_AUTOLORA_COMPLETE") != "complete_bash":
        return names
    return [re.sub(r"[^\w@%+=:,./-]", r"\\\g<0>", name) for name in names]


def complete_strategies(incomplete: str) -> list[str]:
    """Complete the name of a strategy."""
    return _starting(incomplete, STRATEGIES)


def complete_styles(incomplete: str) -> list[str]:
    """Complete the name of a style."""
    from autolora.styles import Styles, own_styles, shipped_styles

    return _starting(incomplete, [s.name for s in Styles([shipped_styles()], own_styles()).all()])


def _lora_names(context: typer.Context) -> Iterator[str]:
    from autolora.config import load_config
    from autolora.lora import Pool

    pool = context.params.get("pool")
    folder = Path(pool) if pool else load_config(context.params.get("model") or "tiny").pool
    yield from Pool(folder.expanduser()).names


def _starting(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME",
        envvar="AUTOLORA_MODEL",
        help="Base model, or a .yaml file of your own.",
        autocompletion=complete_models,
    ),
]
PoolFolder = Annotated[
    Path | None,
    typer.Option(
        "--pool",
        metavar="FOLDER",
        envvar="AUTOLORA_POOL",
        help="LoRAs to use, in place of the model's.",
    ),
]


def _follow(roots: list[Path] | None) -> list[Path] | None:
    from autolora.files import follow_links

    follow_links(roots or [])
    return roots


FollowLinks = Annotated[
    list[Path] | None,
    typer.Option(
        "--follow-links",
        metavar="FOLDER",
        envvar="AUTOLORA_FOLLOW_LINKS",
        callback=_follow,
        help="Follow links of the pool that lead into this folder; repeatable.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


def open_pipeline(model: str, pool: Path | None) -> AutoLoRAPipeline:
    """Make a pipeline for what the options say; nothing heavy is loaded yet.

    Raises:
        ConfigError: There is no such model.
    """
    from autolora.pipeline import AutoLoRAPipeline

    return AutoLoRAPipeline.from_config(model, pool)
