"""``autolora generate``: pictures for a prompt, for lines of stdin, or again from a picture."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from autolora.cli_jobs import Job, draw, read_seeds, recorded_job
from autolora.cli_options import (
    FOUND_PROBLEMS,
    AsJson,
    Model,
    PoolFolder,
    complete_loras,
    complete_strategies,
    examples,
    open_pipeline,
)
from autolora.cli_view import IndexBar, print_json
from autolora.errors import GenerationError

EXAMPLES = examples(
    'autolora generate "a neon elephant on a blue background"',
    'autolora generate "a dragon <lora:sepia:0.7>" --seed 3-6 --out pictures/',
    'autolora generate "a cat" --count 8 --batch 4 --size 128x96',
    'autolora generate "a red teapot" --lora blueprint:0.8 --no-retrieval',
    "autolora generate --from-png teapot.png",
    "autolora generate --from-png teapot.png --seed 9 --steps 30",
    "autolora generate --stdin --out pictures/ < prompts.txt > results.ndjson",
)

Prompt = Annotated[
    str | None,
    typer.Argument(
        metavar="PROMPT",
        help="What the picture shall show; <lora:NAME:0.8> in it takes a LoRA as asked. "
        "- reads it from stdin.",
        show_default=False,
    ),
]
Asked = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="NAME[:0.8]",
        help="Take this LoRA, at this strength; repeatable.",
        autocompletion=complete_loras,
        show_default=False,
    ),
]
NoRetrieval = Annotated[bool, typer.Option("--no-retrieval", help="Take only what is asked for.")]
TopK = Annotated[
    int | None,
    typer.Option("--top-k", "-k", metavar="N", help="Most LoRAs in all.", show_default=False),
]
StrategyName = Annotated[
    str | None,
    typer.Option(
        "--strategy",
        metavar="NAME",
        help="How LoRAs are fused.",
        autocompletion=complete_strategies,
        show_default=False,
    ),
]
TextEncoders = Annotated[
    bool | None,
    typer.Option(
        "--text-encoders/--no-text-encoders",
        help="Apply the text encoder parts of LoRAs too.",
        show_default=False,
    ),
]
Steps = Annotated[
    int | None, typer.Option(metavar="N", help="Denoising steps.", show_default=False)
]
Seeds = Annotated[
    list[str] | None,
    typer.Option(
        "--seed",
        "-s",
        metavar="N",
        help="Seed, range such as 3-6, or random; repeatable. 0 without it.",
        show_default=False,
    ),
]
Count = Annotated[
    int | None,
    typer.Option(
        "--count",
        "-n",
        metavar="N",
        help="So many pictures, seeds counting up.",
        show_default=False,
    ),
]
Batch = Annotated[
    int | None,
    typer.Option(
        "--batch",
        "-b",
        metavar="N",
        help="Draw so many pictures at once: faster; last bits may differ from one at a time.",
        show_default=False,
    ),
]
Size = Annotated[
    str | None, typer.Option(metavar="WIDTHxHEIGHT", help="In pixels.", show_default=False)
]
Guidance = Annotated[
    float | None, typer.Option(metavar="SCALE", help="Guidance scale.", show_default=False)
]
Negative = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="What the picture shall not show.", show_default=False),
]
NoTriggers = Annotated[
    bool, typer.Option("--no-triggers", help="Do not add trigger words to the prompt.")
]
FromPng = Annotated[
    Path | None,
    typer.Option(
        "--from-png",
        metavar="FILE",
        help="Repeat this picture; other options change what they name.",
        show_default=False,
    ),
]
Force = Annotated[
    bool, typer.Option("--force", help="Repeat a picture although model or LoRA files changed.")
]
Stdin = Annotated[
    bool,
    typer.Option(
        "--stdin", help="Read a prompt or a JSON object per line; write a JSON object per picture."
    ),
]
Out = Annotated[
    str | None,
    typer.Option(
        "--out", "-o", metavar="FILE", help="PNG file, or folder ending in /.", show_default=False
    ),
]


def generate(
    context: typer.Context,
    prompt: Prompt = None,
    model: Model = "tiny",
    pool: PoolFolder = None,
    lora: Asked = None,
    no_retrieval: NoRetrieval = False,
    top_k: TopK = None,
    strategy: StrategyName = None,
    text_encoders: TextEncoders = None,
    steps: Steps = None,
    seed: Seeds = None,
    count: Count = None,
    batch: Batch = None,
    size: Size = None,
    guidance: Guidance = None,
    negative: Negative = None,
    no_triggers: NoTriggers = False,
    from_png: FromPng = None,
    force: Force = False,
    stdin: Stdin = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Draw pictures for a prompt, or repeat one."""
    from autolora.generation.prompts import parse_lora
    from autolora.generation.request import parse_size

    given: dict[str, Any] = {
        "size": None if size is None else parse_size(size),
        "steps": steps,
        "guidance": guidance,
        "top_k": top_k,
        "negative_prompt": negative,
        "loras": [parse_lora(entry) for entry in lora or []] or None,
        "retrieve": False if no_retrieval else None,
        "strategy": strategy,
        "use_triggers": False if no_triggers else None,
        "text_encoders": text_encoders,
    }
    options = {name: value for name, value in given.items() if value is not None}
    seeds = read_seeds(seed or [], count)
    at_once = 1 if batch is None else batch
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Bytes that are no UTF-8 are said to be so later, in one line of many perhaps.
        sys.stdin.reconfigure(errors="surrogateescape")
    text = sys.stdin.read() if prompt == "-" and not stdin else prompt
    if stdin:
        from autolora.cli_batch import run_batch

        if prompt is not None or from_png is not None:
            raise GenerationError("With --stdin the prompts come from stdin; leave out the other.")
        failed = run_batch(open_pipeline(model, pool), sys.stdin, options, seeds, at_once, out)
        if failed:
            raise typer.Exit(FOUND_PROBLEMS)
        return
    if from_png is not None:
        named = context.get_parameter_source("model")
        chosen = None if named is None or named.name.startswith("DEFAULT") else model
        pipe, job = recorded_job(from_png, chosen, pool, text, options, seeds, batch, out, force)
    else:
        if text is None:
            raise GenerationError("Missing argument PROMPT; say what the picture shall show.")
        pipe = open_pipeline(model, pool)
        job = Job(text, seeds or [0], out, options, at_once)
    job.check(pipe)
    if job.retrieves:
        with IndexBar() as bar:
            pipe.open_index(bar.update)
    facts: list[dict[str, Any]] = []
    draw(pipe, job, as_json, facts.append)
    if as_json:
        print_json({"pictures": facts})
