"""The HTTP interface: what the page uses, and programs, too."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse

from autolora.console.api_answers import encode_event, finished_answer, png_headers, view_events
from autolora.console.jobs import JobView
from autolora.console.models import (
    CardsRequest,
    GenerateAnswer,
    GenerateRequest,
    Problem,
    QueueAnswer,
    SearchAnswer,
)
from autolora.console.orders import Order, Selection, order_of_report
from autolora.console.studio import Studio
from autolora.errors import AutoLoRAError, GenerationError, PoolError, shown
from autolora.request import parse_prompt

NDJSON = "application/x-ndjson"
EVENT_STREAM = "text/event-stream"
_BAD: dict[int | str, dict[str, Any]] = {400: {"model": Problem}}
_MISSING: dict[int | str, dict[str, Any]] = {404: {"model": Problem}}


class Missing(AutoLoRAError):
    """Something that was asked for by name is not there."""


def visit_of(request: Request) -> str:
    """The visitor, as the guard knows them by their cookie."""
    return str(getattr(request.state, "visit", ""))


def add_error_handlers(app: FastAPI) -> None:
    """Answer wrong input with one sentence as ``{"error": ...}``."""

    def problem(_: Request, error: Exception) -> JSONResponse:
        status = 404 if isinstance(error, Missing) else 400
        return JSONResponse({"error": str(error)}, status)

    def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return JSONResponse({"error": f"{shown(where)}: {shown(first['msg'])}."}, 422)

    app.add_exception_handler(AutoLoRAError, problem)
    app.add_exception_handler(RequestValidationError, invalid)


def make_router(studio: Studio) -> APIRouter:
    """Make the routes of pictures, search, styles and queue.

    Args:
        studio: What they drive.
    """
    router = APIRouter(prefix="/api", tags=["pictures"])
    _add_generate(router, studio)
    _add_pictures(router, studio)
    _add_search(router, studio)
    _add_styles(router, studio)
    return router


def _add_generate(router: APIRouter, studio: Studio) -> None:
    @router.post("/generate", responses=_BAD, response_model=GenerateAnswer)
    async def generate(body: GenerateRequest, request: Request) -> Any:
        """Draw pictures.

        The answer comes when they are finished: JSON, or the PNG file of the first one where
        `image/png` is accepted. With `stream` (or where `text/event-stream` is accepted) events
        come as they happen, one JSON object per line (or as server-sent events): `progress`,
        `picture`, and at the end `done` or `error`. Closing the connection ends the job.
        """
        order = body.order()
        owner = f"api-{id(request)}"
        accepted = request.headers.get("accept", "")
        if body.stream or EVENT_STREAM in accepted:
            sse = EVENT_STREAM in accepted
            events = _stream(studio, order, owner, body.image, sse)
            first = await anext(events)  # what is wrong at once is answered with its status
            return StreamingResponse(
                _rest(first, events),
                media_type=EVENT_STREAM if sse else NDJSON,
                headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
            )
        last: JobView | None = None
        async with aclosing(studio.run(order, owner)) as views:
            async for view in views:
                last = view
                if await request.is_disconnected():
                    return Response(status_code=499)
        assert last is not None
        if last.state != "done":
            raise GenerationError(last.error or "The job was stopped.")
        if "image/png" in accepted:
            picture = last.results[0]
            return FileResponse(picture.path, media_type="image/png", headers=png_headers(picture))
        return await asyncio.to_thread(finished_answer, last.results, body.image)


async def _stream(
    studio: Studio, order: Order, owner: str, image: bool, sse: bool
) -> AsyncGenerator[bytes, None]:
    sent = 0
    async with aclosing(studio.run(order, owner)) as views:
        async for view in views:
            for event in view_events(view, sent, image):
                yield encode_event(event, sse)
            sent = len(view.results) if view.kind == "pictures" else 0


async def _rest(first: bytes, events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        yield first
        async for event in events:
            yield event


def _add_pictures(router: APIRouter, studio: Studio) -> None:
    @router.get("/pictures/{picture}.png", response_class=FileResponse, responses=_MISSING)
    def picture_file(picture: str) -> FileResponse:
        """Return a picture that was made since the server started."""
        try:
            path = studio.pictures.get(picture).path
        except GenerationError as error:
            raise Missing(str(error)) from error
        headers = {"Cache-Control": "private, max-age=86400, immutable"}
        return FileResponse(path, media_type="image/png", headers=headers)

    @router.get("/pictures/{picture}/small", response_class=Response, responses=_MISSING)
    def small_picture(picture: str) -> Response:
        """Return a picture as a small WebP picture."""
        try:
            data = studio.covers.of_picture(studio.pictures.get(picture).path)
        except (GenerationError, PoolError) as error:
            raise Missing(str(error)) from error
        headers = {"Cache-Control": "private, max-age=86400, immutable"}
        return Response(data, media_type="image/webp", headers=headers)

    @router.get("/pictures/{picture}/gates", responses=_MISSING)
    def picture_gates(picture: str) -> dict[str, Any]:
        """Return how far each adapter's gates were open, by layer and step."""
        gates = studio.pictures.gates(picture)
        if gates is None:
            raise Missing("The gates of this picture are not known.")
        return gates

    @router.get("/history")
    def history(request: Request) -> list[dict[str, Any]]:
        """List the pictures of this visit, latest first."""
        return [entry.to_dict() for entry in studio.visits.entries(visit_of(request))]

    @router.post("/settings", responses=_BAD, openapi_extra=_png_body())
    async def settings(request: Request) -> dict[str, Any]:
        """Read the settings back from a PNG file that was made here."""
        data = await request.body()
        return await asyncio.to_thread(_settings_of_png, data)

    @router.get("/queue", response_model=QueueAnswer)
    def queue() -> dict[str, Any]:
        """List the jobs that run or wait: kind, state, position, picture and steps."""
        views = [studio.queue.view(job) for job in studio.queue.active()]
        keys = ("id", "kind", "state", "position", "task", "tasks", "done", "total")
        return {"jobs": [{key: getattr(view, key) for key in keys} for view in views]}


def _png_body() -> dict[str, Any]:
    schema = {"schema": {"type": "string", "format": "binary"}}
    return {"requestBody": {"required": True, "content": {"image/png": schema}}}


def _settings_of_png(data: bytes) -> dict[str, Any]:
    import tempfile

    from autolora.generate.report import read_report

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        path.write_bytes(data)
        try:
            report = read_report(path)
        except GenerationError as error:
            raise GenerationError(str(error).replace(str(path), "The file")) from error
    order = order_of_report(report)
    return {"order": order.to_dict(), "model": str(report.get("model", ""))}


def _add_search(router: APIRouter, studio: Studio) -> None:
    @router.get("/search", responses=_BAD, response_model=SearchAnswer)
    def search(
        q: Annotated[str, Query(description="The prompt.")],
        k: Annotated[int, Query(ge=1, le=100, description="How many hits at most.")] = 5,
    ) -> dict[str, Any]:
        """Rank the pool for a prompt, and say what a picture would take."""
        parsed = parse_prompt(q)
        words = parsed.text or " ".join(lora.name for lora in parsed.loras)
        plan = studio.plan(q)
        chosen = {card.item.name for card in plan.cards}
        hits = [
            {
                "name": hit.name,
                "title": hit.title,
                "score": round(hit.score, 4),
                "why": hit.why,
                "channels": {name: round(p, 4) for name, p in hit.channels.items()},
                "chosen": hit.name in chosen,
            }
            for hit in studio.desk.search(words, k)
        ]
        return {"hits": hits, "notes": plan.notes}

    @router.post("/cards", responses=_BAD)
    def cards(body: CardsRequest) -> dict[str, Any]:
        """Say which adapters a picture would take, for a prompt that is being typed."""
        plan = studio.plan(body.prompt, Selection.from_dict(body.selection))
        return {**plan.to_dict(), "ready": studio.desk.ready, "indexing": studio.is_indexing}


def _add_styles(router: APIRouter, studio: Studio) -> None:
    @router.get("/styles")
    def styles() -> list[dict[str, Any]]:
        """List the styles as their files are now."""
        known = studio.pool()
        names = set(known.names) if known is not None else set()
        listed = []
        for style in studio.styles.all():
            missing = [name for name, _ in style.adapters if name not in names]
            listed.append({**style.to_dict(), "missing": missing})
        return listed

    @router.post("/styles", responses=_BAD)
    def save_style(body: GenerateRequest, name: str, title: str = "") -> dict[str, Any]:
        """Save the adapters that a request would take as a style."""
        return studio.save_style(name, title, body.order()).to_dict()


def dump(event: dict[str, Any]) -> bytes:
    """One line of newline-delimited JSON."""
    return json.dumps(event, ensure_ascii=False).encode() + b"\n"


def require_pool(studio: Studio, name: str) -> Any:
    """Look a LoRA up for a route.

    Raises:
        Missing: There is none of this name.
    """
    try:
        return studio.catalog.item(name)
    except PoolError as error:
        raise Missing(str(error)) from error
