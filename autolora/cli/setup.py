"""The commands ``autolora doctor`` and ``autolora init``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from autolora.cli.output import (
    FOUND_PROBLEMS,
    AsJson,
    IndexBar,
    Model,
    console,
    examples,
    make_table,
    print_json,
    print_notes,
)
from autolora.errors import AutoLoRAError, ConfigError, shown

DOCTOR_EXAMPLES = examples(
    "autolora doctor",
    "autolora doctor --model flux1-dev",
    "autolora doctor --model mine.yaml --json",
)
INIT_EXAMPLES = examples(
    "autolora init --model flux1-dev --pool ~/loras",
    "autolora init --pool ~/loras --weights ~/models/my-flux.safetensors",
    "autolora init --model tiny --pool lora_pool/tiny --out mine.yaml",
)


def doctor(model: Model = "tiny", as_json: AsJson = False) -> None:
    """Say what is installed, which files are missing, and which options fit this machine."""
    from autolora.config import load_config
    from autolora.doctor import examine

    config = load_config(model)
    found = examine(config)
    if as_json:
        print_json(found)
    else:
        _show(found, f"{config.width}x{config.height}")
    if found["problems"]:
        raise typer.Exit(FOUND_PROBLEMS)


def init(
    pool: Annotated[Path, typer.Option("--pool", help="Folder of your LoRAs.")],
    model: Model = "flux1-dev",
    weights: Annotated[
        Path | None,
        typer.Option(
            "--weights",
            help="Your checkpoint: a .safetensors file, or a folder as published.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            metavar="NAME",
            help="What reads prompts for the search: auto, clip (the checkpoint's) or minilm.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="File to write; NAME.yaml here without it."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
) -> None:
    """Write a configuration of your own for a base model and a pool, and index the pool."""
    from autolora.config import write_config

    values = _values(pool, model, weights)
    if text is not None:
        values["text"] = text
    target = (out or Path(f"{Path(model).stem}-mine.yaml")).expanduser()
    values["name"] = target.stem
    values["index"] = f"index/{target.stem}"
    config = write_config(model, target, values, force)
    typer.echo(target)
    try:
        _index(target)
    except AutoLoRAError as error:
        print_notes(
            [
                f"The pool is not indexed yet: {error}",
                f"When that is done: autolora index --model {target}",
            ]
        )
    if config.kind != "tiny":
        print_notes([f"See what is missing and what fits with: autolora doctor --model {target}"])


def _values(pool: Path, model: str, weights: Path | None) -> dict[str, str]:
    """Checked values for the new configuration, by top-level key."""
    folder = pool.expanduser().resolve()
    if not folder.is_dir():
        raise ConfigError(f"There is no folder {shown(pool)}; give the folder of your LoRAs.")
    values = {"pool": str(folder)}
    if weights is not None:
        path = weights.expanduser().resolve()
        if not path.exists():
            raise ConfigError(f"There is no checkpoint {shown(weights)}; check the path.")
        _check_weights(model, path)
        values["weights"] = str(path)
    return values


def _check_weights(model: str, path: Path) -> None:
    """Refuse what is incomplete or another model before anything is written.

    Raises:
        ConfigError: It is.
    """
    from autolora.config import PipelineConfig, load_config
    from autolora.families.headers import check_part
    from autolora.families.registry import find_family
    from autolora.runtime.checkpoints import locate_part
    from autolora.safetensors_io import read_checkpoint_header

    family = find_family(load_config(model).kind)
    if family.packaged is not None:
        read_checkpoint_header(path)
        return
    new = PipelineConfig("new", kind=family.name, weights=path)
    transformer = locate_part(new, "transformer", family.parts)
    if transformer.complete and family.check_part is not None:
        family.check_part(transformer)
    elif transformer.complete:
        check_part(family, transformer)


def _index(target: Path) -> None:
    from autolora.pipeline import AutoLoRAPipeline

    pipe = AutoLoRAPipeline.from_config(target)
    with IndexBar() as bar:
        state = pipe.index(progress=bar.update)
    print_notes([f"{state.size} LoRAs of {pipe.config.pool} are indexed."])
    print_notes([f"Left out: {reason}" for reason in state.report.left_out.values()])


def _show(found: dict[str, Any], size: str) -> None:
    view = console(stderr=False)
    machine = found["machine"]
    view.print(f"Python {machine['python']}, {machine['system']}, {_gib(machine['memory'])} memory")
    auto = f"bfloat16, by {machine['bfloat16']}" if machine["bfloat16"] else "float32"
    view.print(f"On the CPU, compute: auto takes {auto}")
    rows = [(name, number or "not installed") for name, number in found["programs"].items()]
    view.print(make_table(("program", "version"), rows))
    for card in found["cards"]:
        known = ", ".join(
            word
            for word, has in (
                ("bfloat16", card["bfloat16"]),
                ("float8 storage", card["float8_storage"]),
                ("float8 arithmetic", card["float8_compute"]),
            )
            if has
        )
        view.print(
            f"\n{card['device']}: {card['name']}, {_gib(card['free'])} of {_gib(card['total'])} "
            f"free; knows {known}",
            markup=False,
        )
    if found["cuda"]:
        view.print(f"\nNo NVIDIA card: {found['cuda']}.", markup=False)
    _show_model(view, found, size)


def _show_model(view: Any, found: dict[str, Any], size: str) -> None:
    model = found["model"]
    files = [
        (
            entry["part"],
            "found" if entry["found"] else "unusable" if entry["broken"] else "missing",
            entry["size"],
            entry["place"] or "",
        )
        for entry in model["files"]
    ]
    view.print(f"\nBase model {shown(model['name'])}", markup=False)
    view.print(make_table(("part", "", "size", "place"), files))
    if found["needs"]:
        _show_needs(view, found["needs"], size)
    if found["here"]:
        view.print(f"\nHere: {_here(found['here'])}", markup=False)
    for problem in found["problems"]:
        view.print(f"problem: {problem}", markup=False)
    if model["command"]:
        view.print("\nGet what is missing with:", markup=False)
        # Unwrapped, so that it can be copied.
        typer.echo(model["command"])


def _show_needs(view: Any, needs: list[dict[str, Any]], size: str) -> None:
    rows = [
        [
            need["storage"],
            "as computed" if need["text_storage"] == "auto" else need["text_storage"],
            need["offload"],
            f"{need['card_gib']:.1f}",
            f"{need['machine_gib']:.1f}",
        ]
        for need in needs
    ]
    columns = ["storage", "text encoders", "offload", "card GiB", "memory GiB"]
    if needs[0]["fits"] is None:
        whose = "What a card would have to have free"
    else:
        whose = "Estimated peak"
        columns.append("fits")
        for row, need in zip(rows, needs, strict=True):
            row.append("yes" if need["fits"] else "no")
    view.print(f"\n{whose} at {size} (for offload layers the least; it uses what is there):")
    view.print(make_table(columns, rows))


def _here(here: dict[str, Any]) -> str:
    """How the model would be loaded on this machine, in words."""
    kept = f"storage {here['storage']}, computing in {here['compute']}"
    if here["text_storage"] == "float8":
        kept += ", float8 text encoders"
    if not here["device"].startswith("cuda"):
        return (
            f"on the {here['name']} with {kept}: about {here['device_gib']:.1f} GiB of memory. "
            "That works, but far slower than on a card."
        )
    limit = here["vram_limit"]
    most = f" that may fill the card up to {limit:.1f} GiB" if limit else ""
    waiting = f", and {here['machine_gib']:.1f} GiB of memory" if here["machine_gib"] else ""
    return (
        f"on {here['name']} with {kept}, offload {here['offload']}{most}: at least "
        f"{here['device_gib']:.1f} GiB of the card{waiting}."
    )


def _gib(count: int | None) -> str:
    return "?" if count is None else f"{count / 2**30:.1f} GiB"
