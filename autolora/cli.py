"""The command ``autolora``: data goes to stdout, everything for people's eyes to stderr.

Exit statuses: 0 for success, 1 for found problems or failed lines of a batch, 2 for wrong input
with one sentence on stderr, 130 for an interrupt. Only what every command needs is imported here,
so that ``--help`` is quick.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import autolora
from autolora import cli_doctor, cli_generate, cli_serve, cli_show
from autolora.cli_options import (
    INTERRUPTED,
    WRONG_INPUT,
    AsJson,
    Model,
    PoolFolder,
    examples,
    open_pipeline,
)
from autolora.cli_pool import pool_app
from autolora.cli_view import IndexBar, fail, print_json, print_notes, show_hits
from autolora.errors import AutoLoRAError

app = typer.Typer(
    name="autolora",
    help="Type a prompt; AutoLoRA finds the FLUX LoRAs that fit it and fuses them.",
    epilog=examples(
        'autolora generate "a neon elephant on a blue background"',
        'autolora search "something that glows"',
        "autolora pool check",
        "autolora --install-completion",
    )
    + "\n\nExit status: 0 done, 1 problems found, 2 wrong input, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("generate", epilog=cli_generate.EXAMPLES)(cli_generate.generate)
app.command("show", epilog=cli_show.EXAMPLES)(cli_show.show)
app.command("doctor", epilog=cli_doctor.DOCTOR_EXAMPLES)(cli_doctor.doctor)
app.command("init", epilog=cli_doctor.INIT_EXAMPLES)(cli_doctor.init)
app.add_typer(pool_app, name="pool")
app.command("serve", epilog=cli_serve.EXAMPLES)(cli_serve.serve)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: What follows the command's name; None takes the process's own.

    Returns:
        Exit status.
    """
    _print_anything()
    try:
        given = None if arguments is None else list(arguments)
        status = app(args=given, prog_name="autolora", standalone_mode=False)
    except AutoLoRAError as error:
        return fail(str(error), WRONG_INPUT)
    except (KeyboardInterrupt, typer.Abort):
        return fail("interrupted.", INTERRUPTED)
    except BrokenPipeError:
        # The reader of a pipe went away; nothing is left to be said to it.
        sys.stderr.close()
        return 1
    except Exception as error:
        # What typer raises for unknown options and the like knows how to say it.
        sentence = getattr(error, "format_message", None)
        if sentence is None:
            raise
        return fail(f"{sentence().rstrip('.')}; see autolora --help.", WRONG_INPUT)
    if status == INTERRUPTED:
        # Some versions of typer turn Ctrl-C into this status themselves, without a word.
        return fail("interrupted.", INTERRUPTED)
    return status if isinstance(status, int) else 0


def _print_anything() -> None:
    """Let names that are no valid text, or that the terminal lacks, be printed with escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError, ValueError):
                stream.reconfigure(errors="backslashreplace")


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)
    ] = False,
) -> None:
    """Handle what comes before a command."""
    if version:
        typer.echo(f"autolora {autolora.__version__}")
        raise typer.Exit()


@app.command(
    epilog=examples(
        'autolora search "something that glows"',
        'autolora search "a dragon" -k 20 --json',
        'autolora search "a dragon" --pool ~/loras',
    )
)
def search(
    prompt: Annotated[str, typer.Argument(help="What the picture shall show.")],
    k: Annotated[int, typer.Option("-k", help="How many hits at most.")] = 5,
    model: Model = "tiny",
    pool: PoolFolder = None,
    as_json: AsJson = False,
) -> None:
    """Rank the pool for a prompt, with scores and reasons."""
    from autolora.generation.prompts import parse_prompt

    parse_prompt(prompt)
    pipe = open_pipeline(model, pool)
    with IndexBar() as bar:
        pipe.open_index(bar.update)
    hits = pipe.search(prompt, k)
    chosen = {hit.name for hit in pipe.choose(prompt)}
    show_hits(hits, chosen, as_json)


@app.command(
    epilog=examples(
        "autolora index",
        "autolora index --rebuild",
        "autolora index --pool ~/loras --json",
    )
)
def index(
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Encode every file again.")] = False,
    model: Model = "tiny",
    pool: PoolFolder = None,
    as_json: AsJson = False,
) -> None:
    """Build the search index of the pool, or bring it up to date."""
    pipe = open_pipeline(model, pool)
    with IndexBar() as bar:
        state = pipe.index(rebuild, bar.update)
    report = state.report
    if as_json:
        print_json({"index": str(pipe.config.index), "loras": state.size, **vars(report)})
        return
    typer.echo(
        f"{state.size} LoRAs in {pipe.config.index} ({len(report.encoded)} encoded, "
        f"{report.kept} kept, {len(report.removed)} removed)"
    )
    print_notes([f"Left out: {reason}" for reason in report.left_out.values()])


if __name__ == "__main__":
    sys.exit(main())
