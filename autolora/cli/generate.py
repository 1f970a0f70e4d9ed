"""``autolora generate``: pictures for a prompt, for each line of stdin, or again from a picture.

A line of stdin is a prompt or a JSON object. Lines are read, drawn and answered one by one, so that
another program can hold a conversation; what is wrong with a line is in the answer to that line,
and the others go on.
"""

from __future__ import annotations

import io
import json
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autolora.cli.output import (
    FOUND_PROBLEMS,
    AsJson,
    FollowLinks,
    IndexBar,
    Model,
    PicturesView,
    PoolFolder,
    complete_loras,
    complete_strategies,
    complete_styles,
    examples,
    open_pipeline,
    print_json,
    print_notes,
)
from autolora.errors import AutoLoRAError, ConfigError, GenerationError, shown

if TYPE_CHECKING:
    from autolora.generate.report import Output, Report
    from autolora.pipeline import AutoLoRAPipeline
    from autolora.request import GenerateRequest

MAX_COUNT = 10_000
"""Most pictures of one command."""
MAX_RANDOM_SEED = 2**32 - 1
"""Largest seed that is drawn at random, as other programs take no larger ones."""
_RANGE = re.compile(r"([0-9]{1,19})(?:-|\.\.)([0-9]{1,19})")


@dataclass
class Job:
    """Pictures to draw that differ in their seeds only.

    Attributes:
        asked: The request; its seed is not used.
        seeds: Their seeds, each once.
        out: What ``--out`` says.
        batch: How many to draw at once.
        name: What files are named after, where it is not the prompt.
        recorded: Report of the picture that is repeated: one with its seed gets its facts.
        notes: What differs from that picture.
    """

    asked: GenerateRequest
    seeds: Sequence[int]
    out: str | None
    batch: int = 1
    name: str | None = None
    recorded: Report | None = None
    notes: list[str] = field(default_factory=list)

    def target(self, seed: int) -> Path:
        """The file to write; another name is taken where that is there."""
        return picture_name(self.out, self.name or self.asked.prompt, seed, len(self.seeds) > 1)

    def drawn_seeds(self) -> tuple[list[int], int]:
        """Seeds to draw and how many at once; a batch is repeated as a whole to the byte."""
        if self.recorded is not None and list(self.seeds) == [self.recorded.seed]:
            seeds = self.recorded.batch or [self.recorded.seed]
            return seeds, len(seeds)
        return list(self.seeds), self.batch

    def check(self, pipe: AutoLoRAPipeline) -> None:
        """Find what is wrong before anything slow begins.

        Raises:
            AutoLoRAError: Something that was asked for is not possible.
        """
        from autolora.generate.png import check_folder
        from autolora.request import check_batch, check_seed

        check_batch(self.batch)
        pipe.check(self.asked)
        for seed in self.seeds:
            check_seed(seed)
            check_folder(self.target(seed))

    def open_index(self, pipe: AutoLoRAPipeline) -> None:
        """Bring the search index up to date where it is needed, under a bar."""
        if self.asked.retrieve:
            with IndexBar() as bar:
                pipe.open_index(bar.update)


def draw(
    pipe: AutoLoRAPipeline,
    job: Job,
    quiet: bool,
    saved: Callable[[dict[str, Any]], None],
) -> None:
    """Make pictures; each is saved, its path printed and its facts handed on once it is there.

    Args:
        pipe: The pipeline.
        job: The pictures.
        quiet: Whether to print nothing but the bar.
        saved: Called with the facts of each picture and its ``path``.
    """
    from autolora.generate.reproduce import restore_facts

    seeds, batch = job.drawn_seeds()
    with PicturesView(quiet=quiet) as view:

        def save(output: Output) -> None:
            report = output.report
            if report.seed not in job.seeds:
                return  # drawn only because it was in the batch of a repeated picture
            if job.recorded is not None and report.seed == job.recorded.seed:
                output.report = restore_facts(report, job.recorded, job.notes)
            path = output.save(job.target(report.seed), overwrite=False)
            view.saved(path, report.notes)
            saved({"path": str(path), **output.report.to_dict()})

        pipe.generate_many(
            job.asked,
            seeds,
            batch=batch,
            planned=view.planned,
            progress=view.step,
            drawn=save,
        )


def recorded_job(
    picture: Path,
    model: str | None,
    pool: Path | None,
    prompt: str | None,
    changes: Mapping[str, Any],
    seeds: Sequence[int],
    batch: int | None,
    out: str | None,
    force: bool,
) -> tuple[AutoLoRAPipeline, Job]:
    """Make a job that repeats a picture, exactly or with changes.

    Args:
        picture: A PNG file of ours.
        model: Base model; None is the one that the picture names.
        pool: Folder of LoRAs in place of the model's.
        prompt: Another prompt.
        changes: Other options for the call of the pipeline.
        seeds: Other seeds; empty for the picture's own.
        batch: How many to draw at once; None is as the picture was drawn.
        out: What ``--out`` says.
        force: Whether to go on although files differ.

    Returns:
        The pipeline and the job.

    Raises:
        AutoLoRAError: The picture cannot be repeated here.
    """
    from autolora.generate.reproduce import check, load_report, repeat_options
    from autolora.images import GivenImages
    from autolora.prompt_syntax import escape, parse_prompt
    from autolora.request import read_request
    from autolora.unit import merge_units, read_units

    report = load_report(picture)
    try:
        pipe = open_pipeline(model or report.model, pool)
    except ConfigError as error:
        if model is not None:
            raise
        raise GenerationError(
            f"{shown(picture)} was made with base model {shown(report.model)!r}, which is not "
            "known by that name here; name its configuration by --model."
        ) from error
    loras = read_units(changes.get("loras", ()))
    asked = (*loras, *(parse_prompt(prompt).loras if prompt else ()))
    notes = check(report, pipe, force, [unit.name for unit in loras if unit.path is not None])
    print_notes(notes)
    repeated = repeat_options(report, lambda: pipe.pool)
    options = {**repeated, **changes}
    images = GivenImages.of(options)[0].facts()
    if report.images and not changes.keys() & {"image", "control", "inputs"}:
        raise GenerationError(
            f"{shown(picture)} was drawn from other pictures, which it does not hold; give them "
            "again by --image, --mask and --control."
        )
    if report.images.get("strength") is not None and changes.get("strength") is None:
        options["strength"] = report.images["strength"]
        images = GivenImages.of(options)[0].facts()
    if images != report.images:
        notes = [*notes, "It starts from other pictures than the first one did."]
    options["loras"] = merge_units(repeated["loras"], asked)
    if prompt is not None and "use_triggers" not in changes:
        options["use_triggers"] = True
    options["prompt"] = escape(report.used_prompt) if prompt is None else prompt
    numbers = list(seeds) or [report.seed]
    exact = not changes and prompt is None and batch is None
    # One of several seeds is drawn alone, which is no repetition of a picture from a batch.
    exact = exact and (not report.batch or numbers == [report.seed])
    return pipe, Job(
        asked=read_request(options),
        seeds=numbers,
        out=out,
        batch=1 if batch is None else batch,
        name=report.prompt if prompt is None else None,
        recorded=report if exact else None,
        notes=notes,
    )


def is_ours(picture: Path) -> bool:
    """Tell whether a picture is to be repeated, or holds only settings of another program.

    Raises:
        GenerationError: It cannot be read.
    """
    from autolora.generate.foreign import read_found
    from autolora.generate.picture_texts import read_texts
    from autolora.generate.report import CHUNK

    texts = read_texts(picture)
    return CHUNK in texts or read_found(texts) is None


def foreign_job(
    picture: Path,
    model: str | None,
    pool: Path | None,
    prompt: str | None,
    changes: Mapping[str, Any],
    seeds: Sequence[int],
    batch: int | None,
    out: str | None,
    force: bool,
) -> tuple[AutoLoRAPipeline, Job]:
    """Make a job with the settings of a picture that another program made.

    Args:
        picture: A picture that is not ours.
        model: Base model; None is the usual one.
        pool: Folder of LoRAs in place of the model's.
        prompt: Another prompt.
        changes: Other options for the call of the pipeline.
        seeds: Other seeds; empty for the picture's own.
        batch: How many to draw at once.
        out: What ``--out`` says.
        force: Whether to go on although LoRAs are missing.

    Returns:
        The pipeline and the job.

    Raises:
        AutoLoRAError: Its prompt cannot be used, or the pool lacks one of its LoRAs.
    """
    from autolora.generate.foreign import read_found, take_over
    from autolora.generate.picture_texts import read_texts
    from autolora.prompt_syntax import parse_prompt
    from autolora.request import read_request
    from autolora.unit import merge_units, read_units

    found = read_found(read_texts(picture))
    assert found is not None
    pipe = open_pipeline(model or "tiny", pool)
    taken = take_over(found, pipe.pool if found.loras else None, pipe.config)
    if taken.missing and not force:
        raise GenerationError(
            f"The pool {shown(pipe.pool.folder)} lacks {shown(', '.join(taken.missing), 300)}; "
            "put the files there, or --force draws without them."
        )
    print_notes(taken.notes)
    said = {
        "prompt": taken.prompt if prompt is None else prompt,
        "negative_prompt": taken.negative_prompt,
        "steps": taken.steps,
        "size": taken.size,
        "guidance": taken.guidance,
        "retrieve": False,
        "use_triggers": prompt is not None,
    }
    options = {name: value for name, value in said.items() if value is not None} | dict(changes)
    tags = parse_prompt(prompt).loras if prompt else ()
    options["loras"] = merge_units(taken.loras, (*read_units(changes.get("loras", ())), *tags))
    numbers = list(seeds) or [0 if taken.seed is None else taken.seed]
    return pipe, Job(read_request(options), numbers, out, batch=1 if batch is None else batch)


def read_seeds(texts: Iterable[str], count: int | None) -> list[int]:
    """Read the seeds of a command line.

    Args:
        texts: Numbers, ranges such as ``3-6`` or ``3..6``, ``random`` or -1; each seed is drawn
            once.
        count: How many pictures; the seeds count up from the only one given.

    Returns:
        The seeds in the order asked for; empty where nothing was asked for.

    Raises:
        GenerationError: A seed is not understood, or it is far too many.
    """
    seeds = list(dict.fromkeys(seed for text in texts for seed in _read_seed(text)))
    if count is not None:
        if not 1 <= count <= MAX_COUNT:
            raise GenerationError(f"Count must be between 1 and {MAX_COUNT}, not {count}.")
        if len(seeds) > 1:
            raise GenerationError("Count goes with one seed, from which the others count up.")
        start = seeds[0] if seeds else 0
        seeds = list(range(start, start + count))
    if len(seeds) > MAX_COUNT:
        raise GenerationError(f"{len(seeds)} seeds are too many; at most {MAX_COUNT} are drawn.")
    return seeds


def _read_seed(text: str) -> Sequence[int]:
    if text.strip() in ("random", "-1"):
        return [secrets.randbelow(MAX_RANDOM_SEED + 1)]
    if match := _RANGE.fullmatch(text.strip()):
        low, high = map(int, match.groups())
        if not 0 <= high - low < MAX_COUNT:
            raise GenerationError(
                f"Seed range {shown(text, 60)} must go up and have at most {MAX_COUNT} seeds."
            )
        return range(low, high + 1)
    if not re.fullmatch(r"\s*-?[0-9]{1,30}\s*", text):
        raise GenerationError(
            f"Seed must be a whole number, a range such as 3-6, or random, not {shown(text, 60)!r}."
        )
    return [int(text)]


def picture_name(out: str | None, prompt: str, seed: int, many: bool) -> Path:
    """File to write: ``--out``, with the seed where there are several, or named by the prompt.

    Raises:
        GenerationError: The name cannot be a picture's.
    """
    from autolora.generate.png import check_png_name
    from autolora.prompt_syntax import slug

    default = f"{slug(prompt)}-{seed}.png"
    if out is None:
        return Path(default)
    path = Path(out).expanduser()
    if out.endswith("/") or os.path.isdir(path):
        return path / default
    if not path.suffix:
        raise GenerationError(f"{shown(out)} must end in .png, or in / for a folder.")
    check_png_name(path)
    return path.with_name(f"{path.stem}-{seed}{path.suffix}") if many else path


EXAMPLES = examples(
    'autolora generate "a neon elephant on a blue background"',
    'autolora generate "a dragon <lora:sepia:0.7>" --seed 3-6 --out pictures/',
    'autolora generate "a cat" --count 8 --batch 4 --size 128x96',
    'autolora generate "a cat in snow" --image cat.png --strength 0.5',
    'autolora generate "a red teapot" --lora blueprint:0.8 --no-retrieval',
    "autolora generate --from-image teapot.png",
    "autolora generate --from-image teapot.png --seed 9 --steps 30",
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
        help="Take this LoRA, or file, at this strength; repeatable.",
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
FamilyName = Annotated[
    str | None,
    typer.Option(
        "--family",
        metavar="NAME",
        help="Family of the --lora files, where they do not tell: flux1, sdxl, ...",
        show_default=False,
    ),
]
StyleName = Annotated[
    str | None,
    typer.Option(
        "--style",
        metavar="NAME",
        help="A style of the console, or a .yaml file.",
        autocompletion=complete_styles,
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
Redrawn = Annotated[
    Path | None,
    typer.Option(
        "--image", metavar="FILE", help="Redraw this picture; its size is kept.", show_default=False
    ),
]
Strength = Annotated[
    float | None,
    typer.Option(
        metavar="0.6", help="How much of it is redrawn, above 0 and at most 1.", show_default=False
    ),
]
Mask = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="White where it is redrawn.", show_default=False),
]
Guides = Annotated[
    list[str] | None,
    typer.Option(
        "--control",
        metavar="TYPE=FILE[:0.8]",
        help="Guide by a picture through a ControlNet; repeatable.",
        show_default=False,
    ),
]
NoTriggers = Annotated[
    bool, typer.Option("--no-triggers", help="Do not add trigger words to the prompt.")
]
FromImage = Annotated[
    Path | None,
    typer.Option(
        "--from-image",
        "--from-png",
        metavar="FILE",
        help="Repeat this picture, or take the settings of another program's; other options "
        "change what they name.",
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
    follow_links: FollowLinks = None,
    lora: Asked = None,
    no_retrieval: NoRetrieval = False,
    top_k: TopK = None,
    strategy: StrategyName = None,
    family: FamilyName = None,
    style: StyleName = None,
    text_encoders: TextEncoders = None,
    steps: Steps = None,
    seed: Seeds = None,
    count: Count = None,
    batch: Batch = None,
    size: Size = None,
    guidance: Guidance = None,
    negative: Negative = None,
    image: Redrawn = None,
    strength: Strength = None,
    mask: Mask = None,
    control: Guides = None,
    no_triggers: NoTriggers = False,
    from_image: FromImage = None,
    force: Force = False,
    stdin: Stdin = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Draw pictures for a prompt, or repeat one."""
    from autolora.request import read_request

    given: dict[str, Any] = {
        "size": size,
        "steps": steps,
        "guidance": guidance,
        "top_k": top_k,
        "negative_prompt": negative,
        "loras": _of_family(lora or [], family) or None,
        "retrieve": False if no_retrieval else None,
        "strategy": strategy,
        "style": style,
        "use_triggers": False if no_triggers else None,
        "text_encoders": text_encoders,
        "image": image,
        "strength": strength,
        "mask": mask,
        "control": control or None,
    }
    options = {name: value for name, value in given.items() if value is not None}
    seeds = read_seeds(seed or [], count)
    at_once = 1 if batch is None else batch
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Bytes that are no UTF-8 are said to be so later, in one line of many perhaps.
        sys.stdin.reconfigure(errors="surrogateescape")
    text = sys.stdin.read() if prompt == "-" and not stdin else prompt
    if stdin:
        if prompt is not None or from_image is not None:
            raise GenerationError("With --stdin the prompts come from stdin; leave out the other.")
        failed = run_batch(open_pipeline(model, pool), sys.stdin, options, seeds, at_once, out)
        if failed:
            raise typer.Exit(FOUND_PROBLEMS)
        return
    if from_image is not None:
        named = context.get_parameter_source("model")
        chosen = None if named is None or named.name.startswith("DEFAULT") else model
        job_of = recorded_job if is_ours(from_image) else foreign_job
        pipe, job = job_of(from_image, chosen, pool, text, options, seeds, batch, out, force)
    else:
        if text is None:
            raise GenerationError("Missing argument PROMPT; say what the picture shall show.")
        pipe = open_pipeline(model, pool)
        job = Job(read_request({**options, "prompt": text}), seeds or [0], out, at_once)
    job.check(pipe)
    job.open_index(pipe)
    facts: list[dict[str, Any]] = []
    draw(pipe, job, as_json, facts.append)
    if as_json:
        print_json({"pictures": facts})


def _of_family(texts: Sequence[str], family: str | None) -> list[Any]:
    """Add a base-model family to LoRAs as they were typed."""
    if family is None:
        return list(texts)
    from dataclasses import replace

    from autolora.unit import parse_lora

    return [replace(parse_lora(text), family=family) for text in texts]


def run_batch(
    pipe: AutoLoRAPipeline,
    lines: Iterable[str],
    options: Mapping[str, Any],
    seeds: Sequence[int],
    batch: int,
    out: str | None,
) -> int:
    """Draw what lines ask for and print a JSON object per picture or failed line.

    Args:
        pipe: The pipeline.
        lines: Prompts or JSON objects; empty lines are passed over.
        options: For the call of the pipeline; a line's own win.
        seeds: Of lines that name none.
        batch: How many pictures of a line to draw at once, for lines that say nothing.
        out: What ``--out`` says, for lines that say nothing.

    Returns:
        How many lines failed.
    """
    failed = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            job = read_line(line, options, seeds, batch, out)
            job.check(pipe)
            job.open_index(pipe)
            draw(pipe, job, True, partial(_answer, number))
        except AutoLoRAError as error:
            failed += 1
            _answer(number, {"error": str(error)})
    return failed


def read_line(
    line: str, options: Mapping[str, Any], seeds: Sequence[int], batch: int, out: str | None
) -> Job:
    """Read one line.

    Args:
        line: A prompt, or a JSON object with the fields of `autolora.request.LineRequest`.
        options: For the call of the pipeline; the line's own win.
        seeds: Where the line names none.
        batch: Where the line says nothing, like `out`.
        out: A file or folder.

    Returns:
        The line's pictures.

    Raises:
        GenerationError: Something in the line is wrong.
    """
    text = line.removeprefix("\ufeff").strip()
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise GenerationError("The line is not valid UTF-8.")
    from autolora.request import LineRequest, read_request

    raw = _read_object(text) if text.startswith("{") else {"prompt": text}
    line_says = read_request(raw, LineRequest).fields()
    own = {key: line_says.pop(key) for key in ("seed", "count", "batch", "out") if key in line_says}
    usual = read_request({"prompt": "-", **options}).fields()
    named = [str(own["seed"])] if "seed" in own else []
    return Job(
        read_request({**usual, **line_says}),
        read_seeds(named, own.get("count")) or seeds or [0],
        own.get("out", out),
        own.get("batch", batch),
    )


def _read_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GenerationError(f"The line is not valid JSON: {shown(error)}.") from error
    if "prompt" not in found:
        raise GenerationError("The line's object has no prompt.")
    return dict(found)


def _answer(number: int, facts: Mapping[str, Any]) -> None:
    answer = {"line": number, **facts}
    print(json.dumps(answer, ensure_ascii=False, default=str), flush=True)
