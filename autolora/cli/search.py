"""The commands ``autolora search`` and ``autolora index``."""

from __future__ import annotations

from typing import Annotated

import typer

from autolora.cli.output import (
    AsJson,
    FollowLinks,
    IndexBar,
    Model,
    PoolFolder,
    examples,
    open_pipeline,
    print_json,
    print_notes,
    show_hits,
)

SEARCH_EXAMPLES = examples(
    'autolora search "something that glows"',
    'autolora search "a dragon" -k 20 --json',
    'autolora search "a dragon" --pool ~/loras',
)
INDEX_EXAMPLES = examples(
    "autolora index",
    "autolora index --rebuild",
    "autolora index --pool ~/loras --json",
)


def search(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the picture shall show.")],
    k: Annotated[int, typer.Option("-k", metavar="N", help="How many hits at most.")] = 5,
    model: Model = "tiny",
    pool: PoolFolder = None,
    follow_links: FollowLinks = None,
    as_json: AsJson = False,
) -> None:
    """Rank the pool for a prompt, with scores and reasons.

    A star marks what a picture would take.
    """
    from autolora.prompt_syntax import parse_prompt

    pipe = open_pipeline(model, pool)
    tags = parse_prompt(prompt).loras
    asked = {entry.name for lora in tags for entry in pipe.pool.find(lora.name)}
    with IndexBar() as bar:
        left_out = len(pipe.open_index(bar.update).report.left_out)
    hits = pipe.search(prompt, k)
    chosen = {hit.name for hit in pipe.choose(prompt)}
    show_hits(hits, chosen | asked, as_json)
    print_notes(pipe.pool.link_notes())
    if left_out:
        print_notes([f"Files that cannot be searched: {left_out}; `autolora index` says why."])


def index(
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Encode every file again.")] = False,
    model: Model = "tiny",
    pool: PoolFolder = None,
    follow_links: FollowLinks = None,
    as_json: AsJson = False,
) -> None:
    """Build the search index of the pool, or bring it up to date."""
    pipe = open_pipeline(model, pool)
    with IndexBar() as bar:
        state = pipe.index(rebuild, bar.update)
    report = state.report
    if as_json:
        facts = {**vars(report), "encoded": state.encoded, "kept": state.kept}
        print_json({"index": str(pipe.config.index), "loras": state.size, **facts})
        return
    typer.echo(
        f"{state.size} LoRAs in {pipe.config.index} ({len(state.encoded)} encoded, {state.kept} "
        f"kept); {len(report.removed)} files removed, {len(report.left_out)} left out"
    )
    print_notes([f"Left out: {reason}" for reason in report.left_out.values()])
