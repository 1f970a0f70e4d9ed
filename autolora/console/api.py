"""The HTTP interface, which the page uses, too: pictures, the pool, uploads, styles, the queue.

``POST /api/generate`` answers when all is done, or with events while pictures come along. An
uploaded LoRA is checked outside the pool and then put into it whole.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Query, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse

from autolora.console.catalog import PAGE
from autolora.console.history import Picture
from autolora.console.jobs import JobView
from autolora.console.models import (
    CardsRequest,
    GenerateAnswer,
    Problem,
    QueueAnswer,
    SearchAnswer,
    ServerRequest,
    read_desk,
)
from autolora.console.studio import Studio
from autolora.errors import (
    AutoLoRAError,
    GenerationError,
    LoRAFormatError,
    Message,
    PoolError,
    shown,
)
from autolora.infotext import copied_parameters
from autolora.prompt_syntax import parse_prompt
from autolora.request import read_request, request_error
from autolora.schema import problems


def picture_answer(picture: Picture, image: bool) -> dict[str, Any]:
    """Describe a picture, with its file where that is asked for."""
    png = base64.b64encode(picture.path.read_bytes()).decode("ascii") if image else None
    return {**picture.to_dict(), "png": png}


def finished_answer(pictures: Sequence[Picture], image: bool) -> dict[str, Any]:
    """Describe all pictures of a job."""
    return {"pictures": [picture_answer(picture, image) for picture in pictures]}


def view_events(view: JobView, sent: int, image: bool) -> Iterator[dict[str, Any]]:
    """Say what is new in a view.

    Args:
        view: The job.
        sent: How many of its pictures were sent already.
        image: Whether to put PNG files in.

    Yields:
        Events with their name as ``event``.
    """
    if view.kind == "pictures":
        for picture in view.results[sent:]:
            yield {"event": "picture", **picture_answer(picture, image)}
    if not view.finished:
        yield {
            "event": "progress",
            "job": view.id,
            "doing": view.kind,
            "state": view.state,
            "position": view.position,
            "picture": view.task,
            "pictures": view.tasks,
            "step": view.done,
            "steps": view.total,
        }
    elif view.state == "done":
        yield {"event": "done", "pictures": len(view.results)}
    else:
        yield {"event": "error", "error": view.error or "The job was stopped."}


def encode_event(event: dict[str, Any], sse: bool) -> bytes:
    """Write an event as a server-sent event, or as a line of JSON."""
    text = json.dumps(event, ensure_ascii=False)
    if sse:
        return f"event: {event['event']}\ndata: {text}\n\n".encode()
    return text.encode() + b"\n"


def png_headers(picture: Picture) -> dict[str, str]:
    """Headers that go with a bare PNG file; its report is inside it."""
    return {"X-AutoLoRA-Seed": str(picture.report["seed"]), "Cache-Control": "no-store"}


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
        assert isinstance(error, AutoLoRAError)
        return JSONResponse(error.to_dict(), status)

    def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        found = [
            {**entry, "loc": tuple(part for part in entry["loc"] if part != "body")}
            for entry in error.errors()
        ]
        said = request_error(problems(ServerRequest, found))
        return JSONResponse(said.to_dict(), 422)

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
    async def generate(body: ServerRequest, request: Request) -> Any:
        """Draw pictures.

        The answer comes when they are finished: JSON, or the PNG file of the first one where
        `image/png` is accepted. With `stream` (or where `text/event-stream` is accepted) events
        come as they happen, one JSON object per line (or as server-sent events): `progress`,
        `picture`, and at the end `done` or `error`. Closing the connection ends the job.
        """
        owner = f"api-{id(request)}"
        accepted = request.headers.get("accept", "")
        if body.stream or EVENT_STREAM in accepted:
            sse = EVENT_STREAM in accepted
            events = _stream(studio, body, owner, body.image, sse)
            first = await anext(events)  # what is wrong at once is answered with its status
            return StreamingResponse(
                _rest(first, events),
                media_type=EVENT_STREAM if sse else NDJSON,
                headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
            )
        last: JobView | None = None
        async with aclosing(studio.run(body, owner)) as views:
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
    studio: Studio, order: ServerRequest, owner: str, image: bool, sse: bool
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
            raise Missing(error.message) from error
        headers = {"Cache-Control": "private, max-age=86400, immutable"}
        return FileResponse(path, media_type="image/png", headers=headers)

    @router.get("/pictures/{picture}/small", response_class=Response, responses=_MISSING)
    async def small_picture(picture: str) -> Response:
        """Return a picture as a small WebP picture."""
        try:
            path = studio.pictures.get(picture).path
            data = await _decoded(studio, partial(studio.covers.of_picture, path))
        except (GenerationError, PoolError) as error:
            raise Missing(error.message) from error
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

    @router.post("/settings", responses=_BAD, openapi_extra=_picture_body())
    async def settings(request: Request) -> dict[str, Any]:
        """Read the settings in a picture: PNG, JPEG or WebP, of AutoLoRA or another program.

        A text of generation parameters is read, too. LoRAs are matched to the pool by hash, then
        by name; `missing` names those that it does not have.
        """
        data = await request.body()
        return await asyncio.to_thread(studio.settings_in, data)

    @router.get("/queue", response_model=QueueAnswer)
    def queue() -> dict[str, Any]:
        """List the jobs that run or wait: kind, state, position, picture and steps."""
        views = [studio.queue.view(job) for job in studio.queue.active()]
        keys = ("id", "kind", "state", "position", "task", "tasks", "done", "total")
        return {"jobs": [{key: getattr(view, key) for key in keys} for view in views]}


def _picture_body() -> dict[str, Any]:
    schema = {"schema": {"type": "string", "format": "binary"}}
    kinds = ("image/png", "image/jpeg", "image/webp", "text/plain")
    content = {kind: schema for kind in kinds}
    return {"requestBody": {"required": True, "content": content}}


def _add_search(router: APIRouter, studio: Studio) -> None:
    @router.get("/search", responses=_BAD, response_model=SearchAnswer)
    def search(
        q: Annotated[str, Query(description="The prompt.")],
        k: Annotated[int, Query(ge=1, le=100, description="How many hits at most.")] = 5,
    ) -> dict[str, Any]:
        """Rank the pool for a prompt, and say what a picture would take."""
        parsed = parse_prompt(q)
        words = parsed.text or " ".join(lora.name for lora in parsed.loras)
        plan = studio.plan(read_request({"prompt": q}, ServerRequest))
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
        pool = studio.pool()
        links = [] if pool is None else pool.link_notes()
        return {"hits": hits, "notes": [*plan.notes, *links]}

    @router.post("/cards", responses=_BAD)
    def cards(body: CardsRequest) -> dict[str, Any]:
        """Say which adapters a picture would take, for a prompt that is being typed."""
        asked = {**read_desk(body.selection), "prompt": body.prompt}
        asked["negative_prompt"] = body.negative_prompt
        plan = studio.plan(read_request(asked, ServerRequest))
        state = {"ready": studio.desk.ready, "indexing": studio.is_indexing}
        pasted = copied_parameters(body.prompt) is not None
        return {**plan.to_dict(), **state, "pasted": pasted}


def _add_styles(router: APIRouter, studio: Studio) -> None:
    @router.get("/styles")
    def styles() -> list[dict[str, Any]]:
        """List the styles as their files are now."""
        known = studio.pool()
        names = set(known.names) if known is not None else set()
        listed = []
        for style in studio.styles.all():
            missing = [unit.name for unit in style.loras if unit.name not in names]
            listed.append({**style.to_dict(), "missing": missing})
        return listed

    @router.post("/styles", responses=_BAD)
    def save_style(body: ServerRequest, name: str, title: str = "") -> dict[str, Any]:
        """Save the adapters that a request would take as a style."""
        return studio.save_style(name, title, body).to_dict()


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
        raise Missing(error.message) from error


SUFFIX = ".safetensors"
MAX_NAME = 150
_FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f]')


def check_upload_name(name: str) -> str:
    """Make sure that a file of this name can be put into the pool.

    Args:
        name: As the sender gave it.

    Returns:
        The name.

    Raises:
        PoolError: It has a folder in it, does not end in .safetensors, or no file can have it.
    """
    if not name or _FORBIDDEN.search(name) or name.startswith(".") or not name.isprintable():
        raise PoolError(
            "A file cannot be added under the name {}; send a plain file name without folders, "
            "such as my-style.safetensors.",
            repr(shown(name, 80)),
        )
    if not name.lower().endswith(SUFFIX) or len(name) > MAX_NAME:
        raise PoolError(
            "{} is not a .safetensors file; only those can be added, under names of at most {} "
            "characters.",
            shown(name, 80),
            MAX_NAME,
        )
    return name


async def receive_file(name: str, chunks: AsyncIterator[bytes], folder: Path) -> Path:
    """Write what is being sent into a folder of its own, outside any pool.

    Args:
        name: The checked name.
        chunks: The file.
        folder: Where to put it.

    Returns:
        The file.

    Raises:
        PoolError: The disk is full or the folder cannot be written.
    """
    path = folder / name
    try:
        with path.open("wb") as file:
            async for chunk in chunks:
                file.write(chunk)
    except OSError as error:
        raise PoolError(f"{shown(name)} cannot be received: {shown(error.strerror)}.") from error
    return path


def add_to_pool(file: Path, pool: Path) -> tuple[Path, tuple[str, ...]]:
    """Check a received file and put it into the pool, whole or not at all.

    Args:
        file: The file, outside the pool.
        pool: The pool's folder; made where it is missing.

    Returns:
        The file in the pool, and what the sender should know.

    Raises:
        LoRAFormatError: It is not a LoRA that can be used.
        PoolError: A file of that name, or with the same content, is in the pool already, or it
            cannot be written.
    """
    from autolora.lora.add import add_files

    try:
        added = add_files(pool, [file])[0]
    except (LoRAFormatError, PoolError) as error:
        raise _for_sender(error, file, pool) from error
    return added.path, added.notes


def _for_sender(error: AutoLoRAError, file: Path, pool: Path) -> AutoLoRAError:
    """Say it to somebody who knows neither the server's folders nor the shell's options."""
    what = _without_folders(error.what, file, pool)
    if error.where == "name":
        return type(error)(what, advice="rename the file to add it.", where=error.where)
    return type(error)(what if what.endswith(".") else Message(f"{what.template}.", *what.values))


def _without_folders(message: Message, file: Path, pool: Path) -> Message:
    """Name files in a message by their last part."""

    def bare(value: object) -> str:
        text = str(value)
        for path in (file, pool):
            for spelling in (shown(path), str(path)):
                text = text.replace(spelling, path.name)
        return text

    if message.values:
        return Message(message.template, *map(bare, message.values))
    return Message(bare(message))


_CHUNK = 1 << 20


def make_pool_router(studio: Studio) -> APIRouter:
    """Make the routes of the pool.

    Args:
        studio: What they drive.
    """
    router = APIRouter(prefix="/api", tags=["pool"])
    _add_browsing(router, studio)
    _add_changes(router, studio)
    return router


def _add_browsing(router: APIRouter, studio: Studio) -> None:
    @router.get("/pool", responses=_BAD)
    def pool(
        q: Annotated[str, Query(description="Words in name, title, trigger words or tags.")] = "",
        tag: str = "",
        format: str = "",
        start: Annotated[int, Query(ge=0)] = 0,
        count: Annotated[int, Query(ge=1, le=240)] = PAGE,
    ) -> dict[str, Any]:
        """List LoRAs of the pool, page by page, sorted by title."""
        studio.desk.look()
        return studio.catalog.page(q, tag, format, start, count).to_dict()

    @router.get("/check")
    def check(deep: bool = False) -> StreamingResponse:
        """Open every file and say what is in it: one JSON object per line as they are read."""
        return StreamingResponse(_check(studio, deep), media_type=NDJSON)

    @router.get("/cover/{name:path}", response_class=Response, responses=_MISSING)
    async def cover(
        name: str, n: Annotated[int, Query(ge=0)] = 0, size: Annotated[int, Query(ge=1)] = 256
    ) -> Response:
        """Return a cover of a LoRA as a small WebP picture."""
        item = await asyncio.to_thread(require_pool, studio, name)
        try:
            data = await _decoded(studio, partial(studio.covers.get, item, n, size))
        except PoolError as error:
            raise Missing(error.message) from error
        headers = {"Cache-Control": "private, max-age=3600"}
        return Response(data, media_type="image/webp", headers=headers)

    @router.get("/pool/{name:path}", responses=_MISSING)
    def lora(name: str) -> dict[str, Any]:
        """Say what is known about a LoRA."""
        item = require_pool(studio, name)
        metadata = studio.pipe.pool.metadata(name)
        facts = {key: value for key, value in metadata.to_dict().items() if key != "covers"}
        return {**facts, **item.to_dict()}


async def _decoded(studio: Studio, make: Callable[[], bytes]) -> bytes:
    """Make a small picture in the threads that are there for it, so that others stay free."""
    return await asyncio.get_running_loop().run_in_executor(studio.covers.threads, make)


def _check(studio: Studio, deep: bool) -> Iterator[bytes]:
    """Check reports without the paths of this machine, and how far it is."""
    from autolora.lora.check import check_entries

    try:
        pool = studio.pipe.pool
        pool.refresh()
    except AutoLoRAError as error:
        yield dump({"error": str(error)})
        return
    root, entries = str(pool.folder), list(pool.entries)
    for problem in pool.scan_problems:
        reason = problem.reason.replace(root, "pool")
        yield dump({"name": problem.path.name, "problem": reason, "total": len(entries)})
    for done, found in enumerate(check_entries(entries, deep), start=1):
        report = None if found.report is None else found.report.to_dict()
        if report is not None:
            report.pop("matched", None)
        notes = [*found.notes, *([found.twin.sentence] if found.twin else [])]
        row = {
            "name": found.name,
            "problem": found.problem.replace(root, "pool"),
            "report": report,
            "notes": [note.replace(root, "pool") for note in notes],
            "done": done,
            "total": len(entries),
        }
        yield json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n"


def _add_changes(router: APIRouter, studio: Studio) -> None:
    @router.post("/pool", responses=_BAD)
    async def add(file: UploadFile) -> dict[str, Any]:
        """Add a `.safetensors` file to the pool; the index is brought up to date afterwards."""
        name = check_upload_name(file.filename or "")
        with tempfile.TemporaryDirectory(prefix="autolora-upload-") as folder:
            received = await receive_file(name, _chunks(file), Path(folder))
            target = studio.pipe.config.pool
            placed, notes = await asyncio.to_thread(add_to_pool, received, target)
        await asyncio.to_thread(studio.desk.look, True)
        job = studio.reindex()
        return {"name": placed.stem, "notes": list(notes), "job": job.id}

    @router.post("/index", responses=_BAD)
    async def index(request: Request, rebuild: bool = False) -> StreamingResponse:
        """Bring the search index up to date: one JSON object per line as files are read."""
        return StreamingResponse(_index(studio, rebuild), media_type=NDJSON)


async def _chunks(file: UploadFile) -> AsyncGenerator[bytes, None]:
    while chunk := await file.read(_CHUNK):
        yield chunk


async def _index(studio: Studio, rebuild: bool) -> AsyncGenerator[bytes, None]:
    """Follow the job; it goes on when nobody listens, as other people need the index, too."""
    job = studio.reindex(rebuild)
    root = str(studio.pipe.config.pool)
    async with aclosing(studio.queue.follow(job)) as views:
        async for view in views:
            row = {"state": view.state, "done": view.done, "total": view.total}
            if view.error:
                row["error"] = view.error.replace(root, "pool")
            if view.state == "done":
                row["result"] = _index_result(view.results[0], root)
            yield dump(row)


def _index_result(result: dict[str, Any], root: str) -> dict[str, Any]:
    left_out = {name: why.replace(root, "pool") for name, why in result["left_out"].items()}
    encoded, removed = len(result["encoded"]), len(result["removed"])
    counts = {"loras": result["loras"], "encoded": encoded, "kept": result["kept"]}
    return {**counts, "removed": removed, "left_out": left_out}
