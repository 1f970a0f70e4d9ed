"""The command ``autolora``: data goes to stdout, everything for people's eyes to stderr.

Exit statuses: 0 for success, 1 for found problems or failed lines of a batch, 2 for wrong input
with one sentence on stderr, 130 for an interrupt. Only what every command needs is imported here,
so that ``--help`` is quick.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import autolora
from autolora.cli import generate, search, serve, setup, show
from autolora.cli.output import FOUND_PROBLEMS, INTERRUPTED, WRONG_INPUT, examples, fail
from autolora.cli.pool import pool_app
from autolora.errors import AutoLoRAError

app = typer.Typer(
    name="autolora",
    help="Type a prompt; AutoLoRA finds the LoRAs that fit it and fuses them.",
    epilog=examples(
        'autolora generate "a neon elephant on a blue background"',
        'autolora search "something that glows"',
        "autolora pool check",
        "autolora --install-completion",
    )
    + "\n\nExit status: 0 done, 1 problems found, 2 wrong input, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # boxes would take the columns that examples need
)
# In the order of the help, which has groups last: pictures, finding LoRAs, setting up.
app.command("generate", epilog=generate.EXAMPLES)(generate.generate)
app.command(
    "show",
    epilog=show.EXAMPLES,
    short_help="Show how a picture was made, by this or another program.",
)(show.show)
app.command("serve", epilog=serve.EXAMPLES)(serve.serve)
app.command("search", epilog=search.SEARCH_EXAMPLES)(search.search)
app.add_typer(pool_app, name="pool")
app.command("index", epilog=search.INDEX_EXAMPLES)(search.index)
app.command(
    "doctor",
    epilog=setup.DOCTOR_EXAMPLES,
    short_help="Say what is installed, what is missing, and what fits.",
)(setup.doctor)
app.command(
    "init",
    epilog=setup.INIT_EXAMPLES,
    short_help="Write a configuration for your model and your LoRAs.",
)(setup.init)


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
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a full disk or a closed pipe can still be said
    except AutoLoRAError as error:
        return fail(str(error), WRONG_INPUT)
    except (KeyboardInterrupt, typer.Abort):
        return fail("interrupted.", INTERRUPTED)
    except BrokenPipeError:
        # The reader of a pipe went away; nothing is left to be said to it.
        _drop_output()
        return FOUND_PROBLEMS
    except Exception as error:
        return _fail_with(error)
    if status == INTERRUPTED:
        # Some versions of typer turn Ctrl-C into this status themselves, without a word.
        return fail("interrupted.", INTERRUPTED)
    return status if isinstance(status, int) else 0


def _fail_with(error: Exception) -> int:
    """Say what typer found wrong with the command line; any other error is raised again."""
    sentence = getattr(error, "format_message", None)
    if sentence is not None:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(sentence(), file=sys.stderr)
            return WRONG_INPUT
        command = getattr(getattr(error, "ctx", None), "command_path", "autolora")
        return fail(f"{sentence().rstrip('.')}; see {command} --help.", WRONG_INPUT)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        _drop_output()
        return fail("no space is left where the output goes.", FOUND_PROBLEMS)
    raise error


def _drop_output() -> None:
    """Let what is still to be written go nowhere, so that the end of the process stays silent."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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


if __name__ == "__main__":
    sys.exit(main())
