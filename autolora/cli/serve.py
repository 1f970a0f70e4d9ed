"""``autolora serve``: the web console and the HTTP interface."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from autolora.cli.output import FollowLinks, Model, PoolFolder, examples, open_pipeline
from autolora.errors import ConfigError

EXAMPLES = examples(
    "autolora serve",
    "autolora serve --port 7000 --pool ~/loras --outputs ~/pictures",
    "autolora serve --host 0.0.0.0 --auth ann:secret",
)

Host = Annotated[
    str,
    typer.Option(
        metavar="ADDRESS",
        envvar="AUTOLORA_HOST",
        help="Address to listen on; 0.0.0.0 is all of them.",
    ),
]
Port = Annotated[
    int,
    typer.Option(
        min=0, max=65535, metavar="N", envvar="AUTOLORA_PORT", help="Port; 0 takes a free one."
    ),
]
Auth = Annotated[
    str,
    typer.Option(
        envvar="AUTOLORA_AUTH",
        metavar="USER:PASSWORD",
        help="Let in this user only.",
        show_envvar=True,
    ),
]
Password = Annotated[
    str,
    typer.Option(metavar="TEXT", envvar="AUTOLORA_PASSWORD", help="Let in whoever knows it."),
]
IKnow = Annotated[
    bool, typer.Option("--i-know", help="Let in everybody who can reach this machine.")
]
Outputs = Annotated[Path, typer.Option(metavar="FOLDER", help="Where pictures go.")]
StylesFolder = Annotated[
    Path | None,
    typer.Option(
        "--styles",
        metavar="FOLDER",
        help="Where styles are saved; styles/ in --outputs without it.",
    ),
]


def serve(
    host: Host = "127.0.0.1",
    port: Port = 6006,
    model: Model = "tiny",
    pool: PoolFolder = None,
    follow_links: FollowLinks = None,
    auth: Auth = "",
    password: Password = "",
    i_know: IKnow = False,
    outputs: Outputs = Path("outputs"),
    styles: StylesFolder = None,
) -> None:
    """Serve the web console and the HTTP interface until interrupted."""
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("The console needs Gradio: pip install 'autolora[console]'")
    from autolora.console.server import address_of, make_access, open_socket
    from autolora.console.server import serve as answer
    from autolora.console.studio import Studio

    access = make_access(host, auth, password, i_know)
    pipe = open_pipeline(model, pool)
    studio = Studio(pipe, outputs.expanduser(), None if styles is None else styles.expanduser())
    listener = open_socket(host, port)
    typer.echo(f"AutoLoRA console at {address_of(listener)}  (HTTP interface: /api)", err=True)
    try:
        answer(studio, listener, access)
    finally:
        listener.close()
