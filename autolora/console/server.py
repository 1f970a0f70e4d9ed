"""Runs the console on a port, and documents the HTTP interface on a page without outside files."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse, Response

import autolora
from autolora.console.api import Missing, add_error_handlers, make_pool_router, make_router
from autolora.console.guard import Access, Guard, is_loopback, loopback_hosts
from autolora.console.studio import Studio
from autolora.errors import ConfigError

_STYLE = """
body{font:16px/1.55 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;
color:#23262d;background:#fbfaf8}
code,pre{font:13px/1.5 ui-monospace,monospace;background:#efece7;border-radius:5px}
code{padding:.1em .3em}pre{padding:.8em 1em;overflow:auto}
h2{margin-top:2.2em;font-size:1.05rem}h2 b{color:#9a4a1e;margin-right:.5em}
table{border-collapse:collapse;width:100%}td,th{text-align:left;vertical-align:top;
padding:.25em .8em .25em 0;border-bottom:1px solid #e3ded6}
@media(prefers-color-scheme:dark){body{color:#dcdad5;background:#17181b}
code,pre{background:#26282d}td,th{border-color:#34363c}h2 b{color:#e59a6a}}
"""
_CURL = """curl -s -X POST localhost:6006/api/generate -H 'Content-Type: application/json' \\
  -H 'Accept: image/png' -d '{"prompt": "a neon elephant", "seed": 0}' -o picture.png"""


def docs_page(schema: Mapping[str, Any]) -> str:
    """Write an OpenAPI document as HTML.

    Args:
        schema: The document.

    Returns:
        The page.
    """
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>AutoLoRA HTTP API</title>',
        f"<style>{_STYLE}</style><h1>AutoLoRA HTTP API</h1>",
        "<p>JSON in, JSON out. What is wrong is answered with status 4xx and one sentence as "
        '<code>{"error": "..."}</code>. With a password, send it as HTTP Basic authentication. '
        'The same as an OpenAPI document: <a href="api/openapi.json">api/openapi.json</a>.</p>',
        f"<pre>{escape(_CURL)}</pre>",
    ]
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            parts += _operation(schema, path, method, operation)
    return "\n".join(parts) + "</html>"


def _operation(
    schema: Mapping[str, Any], path: str, method: str, operation: Mapping[str, Any]
) -> Iterator[str]:
    yield f"<h2><b>{escape(method.upper())}</b><code>{escape(path)}</code></h2>"
    yield f"<p>{_prose(operation.get('description', ''))}</p>"
    rows = [
        (
            parameter["name"],
            f"in the {parameter['in']}",
            _type(parameter["schema"]),
            parameter.get("description") or parameter["schema"].get("description", ""),
        )
        for parameter in operation.get("parameters", ())
    ]
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        rows += _body_rows(schema, kind, content.get("schema", {}))
    if rows:
        yield "<table><tr><th>Name<th>Where<th>Type<th>What</tr>"
        for row in rows:
            yield "<tr>" + "".join(f"<td>{_prose(cell)}" for cell in row) + "</tr>"
        yield "</table>"


def _body_rows(
    schema: Mapping[str, Any], kind: str, body: Mapping[str, Any]
) -> list[tuple[str, str, str, str]]:
    model = _resolve(schema, body)
    if "properties" not in model:
        return [("the body", kind, _type(model), "")]
    required = set(model.get("required", ()))
    return [
        (
            name + ("" if name in required else " (optional)"),
            kind,
            _type(field),
            str(field.get("description", "")),
        )
        for name, field in model["properties"].items()
    ]


def _resolve(schema: Mapping[str, Any], part: Mapping[str, Any]) -> Mapping[str, Any]:
    reference = part.get("$ref", "")
    if not reference:
        return part
    return schema["components"]["schemas"][reference.rsplit("/", 1)[-1]]


def _type(field: Mapping[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_type(choice) for choice in field["anyOf"])
    if "$ref" in field:
        return field["$ref"].rsplit("/", 1)[-1]
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    return str(field.get("format") or field.get("type", "anything"))


def _prose(text: str) -> str:
    """Escape a text; what stands in backquotes is code."""
    pieces = escape(text).split("`")
    return "".join(
        f"<code>{piece}</code>" if number % 2 else piece for number, piece in enumerate(pieces)
    ).replace("\n\n", "<p>")


MAX_UPLOAD = 8 << 30
STATIC = Path(__file__).parent / "static"
_KINDS = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


def make_access(host: str, auth: str, password: str, everybody: bool) -> Access:
    """Decide who may use the console.

    Args:
        host: Address that it listens on.
        auth: ``USER:PASSWORD``, or nothing.
        password: A password for any user name, or nothing.
        everybody: Whether a server that others can reach may go without a password.

    Raises:
        ConfigError: Both are given, `auth` has no colon, or others could use it freely.
    """
    if auth and password:
        raise ConfigError("Give either --auth or --password, not both.")
    user, colon, secret = auth.partition(":")
    if auth and not (colon and user and secret):
        raise ConfigError("--auth must be USER:PASSWORD.")
    secret = secret or password
    if not secret and not is_loopback(host) and not everybody:
        raise ConfigError(
            f"Everybody who can reach {host} could use this console and add files to the pool; "
            "set a password with --password, or say --i-know."
        )
    # A page elsewhere cannot know the password, whatever name it gives this server.
    return Access(user, secret, () if secret or everybody else loopback_hosts(host))


def make_app(studio: Studio, access: Access | None = None, page: bool = True) -> FastAPI:
    """Make the web application.

    Args:
        studio: What it drives.
        access: Who may use it; by default everybody, under any host name.
        page: Whether to serve the page beside the HTTP interface.
    """
    app = FastAPI(
        title="AutoLoRA",
        version=autolora.__version__,
        description="Type a prompt; the server finds the LoRAs that fit and draws.",
        docs_url=None,  # the usual ones load scripts from elsewhere
        redoc_url=None,
        openapi_url="/api/openapi.json",
    )
    add_error_handlers(app)
    app.include_router(make_router(studio))
    app.include_router(make_pool_router(studio))
    _add_files(app)
    if page:
        _add_page(app, studio)
    app.add_middleware(Guard, access=access or Access(), max_upload=MAX_UPLOAD)
    return app


def _add_files(app: FastAPI) -> None:
    files = {file.name: file for file in STATIC.iterdir() if file.suffix in _KINDS}

    @app.get("/console/static/{name}", include_in_schema=False)
    def static(name: str) -> FileResponse:
        if name not in files:
            raise Missing("There is no such file.")
        kind = _KINDS[files[name].suffix]
        return FileResponse(files[name], media_type=kind, headers={"Cache-Control": "no-cache"})

    @app.get("/api", include_in_schema=False)
    def docs() -> HTMLResponse:
        return HTMLResponse(docs_page(app.openapi()))

    @app.get("/docs", include_in_schema=False)
    def docs_elsewhere() -> RedirectResponse:
        return RedirectResponse("api")

    @app.get("/favicon.ico", include_in_schema=False)
    def icon() -> Response:
        return FileResponse(STATIC / "icon.svg", media_type="image/svg+xml")


def _add_page(app: FastAPI, studio: Studio) -> None:
    # Before Gradio is imported: nothing of this may be reported to anybody.
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import gradio

    from autolora.console.page import build_page, head, theme

    gradio.mount_gradio_app(
        app,
        build_page(studio),
        path="/",
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size="1kb",  # files come in through our own, checked routes
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme(),
        head=head(),
    )


def open_socket(host: str, port: int) -> socket.socket:
    """Listen on a port, before anything slow begins.

    Args:
        host: Name or address.
        port: The port; 0 takes a free one.

    Raises:
        ConfigError: The port is in use, or the address is not this machine's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"{host}:{port} is no address to listen on: {error}.") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"Port {port} on {host} cannot be used ({error.strerror}); is a console running "
            "there already? Choose another with --port."
        ) from error
    return listener


def serve(studio: Studio, listener: socket.socket, access: Access) -> None:
    """Answer requests until interrupted.

    Args:
        studio: What is served.
        listener: From `open_socket`.
        access: From `make_access`.
    """
    import uvicorn

    app = make_app(studio, access)
    threading.Thread(target=studio.warm_up, name="warm-up", daemon=True).start()
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        studio.queue.close()


def address_of(listener: socket.socket) -> str:
    """The URL of a listening socket."""
    name: Any = listener.getsockname()
    host = f"[{name[0]}]" if ":" in name[0] else name[0]
    return f"http://{host}:{name[1]}"
