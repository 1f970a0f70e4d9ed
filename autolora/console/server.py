"""Putting the console on a port."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse, Response

import autolora
from autolora.console.api import Missing, add_error_handlers, make_router
from autolora.console.api_docs import docs_page
from autolora.console.api_pool import make_pool_router
from autolora.console.guard import Access, Guard, is_loopback, loopback_hosts
from autolora.console.studio import Studio
from autolora.errors import ConfigError

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
