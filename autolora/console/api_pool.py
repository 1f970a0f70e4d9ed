"""The pool over HTTP: browsing, covers, checking, adding a file, the index."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, UploadFile
from fastapi.responses import Response, StreamingResponse

from autolora.console.api import NDJSON, Missing, dump, require_pool
from autolora.console.catalog import PAGE
from autolora.console.models import Problem
from autolora.console.studio import Studio
from autolora.console.uploads import add_to_pool, check_upload_name, receive_file
from autolora.errors import AutoLoRAError, PoolError

_BAD: dict[int | str, dict[str, Any]] = {400: {"model": Problem}}
_MISSING: dict[int | str, dict[str, Any]] = {404: {"model": Problem}}
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
    def cover(
        name: str, n: Annotated[int, Query(ge=0)] = 0, size: Annotated[int, Query(ge=1)] = 256
    ) -> Response:
        """Return a cover of a LoRA as a small WebP picture."""
        item = require_pool(studio, name)
        try:
            data = studio.covers.get(item, n, size)
        except PoolError as error:
            raise Missing(str(error)) from error
        headers = {"Cache-Control": "private, max-age=3600"}
        return Response(data, media_type="image/webp", headers=headers)

    @router.get("/pool/{name:path}", responses=_MISSING)
    def lora(name: str) -> dict[str, Any]:
        """Say what is known about a LoRA."""
        item = require_pool(studio, name)
        metadata = studio.pipe.pool.metadata(name)
        facts = {key: value for key, value in metadata.to_dict().items() if key != "covers"}
        return {**facts, **item.to_dict()}


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
