"""Requests as the console's tests write them."""

from autolora.console.models import ServerRequest
from autolora.request import read_request


def ask(prompt: str, **fields) -> ServerRequest:
    return read_request({"prompt": prompt, **fields}, ServerRequest)
