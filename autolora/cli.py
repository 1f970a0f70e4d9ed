"""The command ``autolora``: data goes to stdout, everything for people's eyes to stderr.

Wrong input ends with one sentence on stderr and status 2, an interrupt with status 130. Only what
every command needs is imported here, so that ``--help`` is quick.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import autolora
from autolora.cli_pool import pool_app
from autolora.cli_view import (
    IndexBar,
    PictureView,
    fail,
    print_json,
    print_notes,
    show_hits,
)
from autolora.errors import AutoLoRAError, GenerationError

if TYPE_CHECKING:
    from autolora.generation.prompts import AskedLoRA
    from autolora.pipeline import AutoLoRAPipeline

INTERRUPTED = 130
WRONG_INPUT = 2

app = typer.Typer(
    name="autolora",
    help="Type a prompt; AutoLoRA finds the FLUX LoRAs that fit it and fuses them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(pool_app, name="pool")

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: What follows the command's name; None takes the process's own.

    Returns:
        Exit status.
    """
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
    return status if isinstance(status, int) else 0


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


Asked = Annotated[
    list[str] | None,
    typer.Option("--lora", help="Take this LoRA: NAME or NAME:0.8. Repeatable."),
]
NoRetrieval = Annotated[bool, typer.Option("--no-retrieval", help="Take only what is asked for.")]
TopK = Annotated[
    int | None, typer.Option("--top-k", "-k", help="Most LoRAs in all.", show_default=False)
]
StrategyName = Annotated[
    str | None, typer.Option("--strategy", help="How LoRAs are fused.", show_default=False)
]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.", show_default=False)]
Seeds = Annotated[
    list[int] | None,
    typer.Option("--seed", "-s", help="Seed; repeatable. 0 without it.", show_default=False),
]
Size = Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels.", show_default=False)]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale.", show_default=False)]
Negative = Annotated[str, typer.Option(help="What the picture shall not show.")]
NoTriggers = Annotated[
    bool, typer.Option("--no-triggers", help="Do not add trigger words to the prompt.")
]
Out = Annotated[
    str | None,
    typer.Option("--out", "-o", help="PNG file, or folder ending in /.", show_default=False),
]


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What the picture shall show; - reads stdin.")],
    model: Model = "tiny",
    pool: PoolFolder = None,
    lora: Asked = None,
    no_retrieval: NoRetrieval = False,
    top_k: TopK = None,
    strategy: StrategyName = None,
    steps: Steps = None,
    seed: Seeds = None,
    size: Size = None,
    guidance: Guidance = None,
    negative: Negative = "",
    no_triggers: NoTriggers = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Draw pictures for a prompt; <lora:NAME:0.8> in it takes a LoRA as asked."""
    from autolora.generation.prompts import parse_lora
    from autolora.generation.request import parse_size

    text = sys.stdin.read() if prompt == "-" else prompt
    seeds = list(dict.fromkeys(seed or [0]))
    options: dict[str, Any] = {
        "size": None if size is None else parse_size(size),
        "steps": steps,
        "guidance": guidance,
        "top_k": top_k,
        "negative_prompt": negative,
    }
    asked = [parse_lora(entry) for entry in lora or []]
    pipe = _pipeline(model, pool)
    targets = _check(pipe, text, seeds, asked, options, out)
    if not no_retrieval:
        with IndexBar() as bar:
            pipe.open_index(bar.update)
    options |= {
        "loras": asked,
        "retrieve": not no_retrieval,
        "strategy": strategy,
        "use_triggers": not no_triggers,
    }
    pictures = [_draw(pipe, text, number, targets, options, as_json) for number in seeds]
    if as_json:
        print_json({"pictures": pictures})


def _check(
    pipe: AutoLoRAPipeline,
    text: str,
    seeds: list[int],
    asked: list[AskedLoRA],
    options: dict[str, Any],
    out: str | None,
) -> dict[int, Path]:
    """Find what is wrong before anything slow begins; return where each seed's picture goes."""
    from autolora.generation.request import make_request

    requests = [make_request(pipe.config, text, seed=seed, **options) for seed in seeds]
    for name in (entry.name for entry in (*asked, *requests[0].tags)):
        pipe.pool.entry(name)
    return {seed: _picture_name(out, text, seed, len(seeds) > 1) for seed in seeds}


def _draw(
    pipe: AutoLoRAPipeline,
    text: str,
    seed: int,
    targets: dict[int, Path],
    options: dict[str, Any],
    as_json: bool,
) -> dict[str, Any]:
    """Make and save one picture; return its facts."""
    first = seed == next(iter(targets))
    with PictureView(quiet=as_json, first=first) as view:
        output = pipe(text, seed, planned=view.planned, progress=view.step, **options)
    path = output.save(targets[seed], overwrite=False)
    if not as_json:
        typer.echo(path)
    return {"path": str(path), **output.report.to_dict()}


@app.command()
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
    pipe = _pipeline(model, pool)
    with IndexBar() as bar:
        pipe.open_index(bar.update)
    hits = pipe.search(prompt, k)
    chosen = {hit.name for hit in pipe.choose(prompt)}
    show_hits(hits, chosen, as_json)


@app.command()
def index(
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Encode every file again.")] = False,
    model: Model = "tiny",
    pool: PoolFolder = None,
    as_json: AsJson = False,
) -> None:
    """Build the search index of the pool, or bring it up to date."""
    pipe = _pipeline(model, pool)
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


def _pipeline(model: str, pool: Path | None) -> AutoLoRAPipeline:
    from autolora.pipeline import AutoLoRAPipeline

    return AutoLoRAPipeline.from_config(model, pool)


def _picture_name(out: str | None, prompt: str, seed: int, many: bool) -> Path:
    """File to write: ``--out``, with the seed where there are several, or named by the prompt."""
    from autolora.generation.prompts import slug
    from autolora.generation.report import check_png_name

    default = f"{slug(prompt)}-{seed}.png"
    if out is None:
        return Path(default)
    path = Path(out).expanduser()
    if out.endswith("/") or os.path.isdir(path):
        return path / default
    if not path.suffix:
        raise GenerationError(f"{out} must end in .png, or in / for a folder.")
    check_png_name(path)
    return path.with_name(f"{path.stem}-{seed}{path.suffix}") if many else path


if __name__ == "__main__":
    sys.exit(main())
