"""Answers of ``POST /api/generate``: whole, or as events while pictures come along."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from typing import Any

from autolora.console.jobs import JobView
from autolora.console.pictures import Picture


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
        sent: How many of its pictures were told already.
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
