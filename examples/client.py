"""Draw a picture over the HTTP interface of a running console, showing how far it is.

    autolora serve &
    python examples/client.py "a neon elephant on a blue background" --out elephant.png

Needs only the standard library.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def main() -> int:
    """Ask, show progress on stderr, and write the picture."""
    parser = argparse.ArgumentParser(description="Draw a picture over HTTP.")
    parser.add_argument("prompt")
    parser.add_argument("--url", default="http://127.0.0.1:6006")
    parser.add_argument("--seed", type=int, default=-1, help="-1 is a random one")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--auth", default="", help="USER:PASSWORD, where the console asks for it")
    parser.add_argument("--out", type=Path, default=Path("picture.png"))
    options = parser.parse_args()
    body = {"prompt": options.prompt, "seed": options.seed, "steps": options.steps, "stream": True}
    for event in events(f"{options.url}/api/generate", body, options.auth):
        if event["event"] == "progress":
            print(f"{event['state']} {event['step']}/{event['steps']}", file=sys.stderr)
        elif event["event"] == "picture":
            options.out.write_bytes(base64.b64decode(event["png"]))
            report = event["report"]
            for adapter in report["adapters"]:
                print(f"{adapter['name']} x {adapter['strength']:g}: {adapter['why']}")
            print(f"{options.out}, seed {event['seed']}")
        elif event["event"] == "error":
            print(event["error"], file=sys.stderr)
            return 1
    return 0


def events(url: str, body: dict[str, Any], auth: str = "") -> Iterator[dict[str, Any]]:
    """Ask for pictures and give what the server says, as it says it."""
    headers = {"Content-Type": "application/json"}
    if auth:
        headers["Authorization"] = f"Basic {base64.b64encode(auth.encode()).decode()}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request) as answer:
            for line in answer:
                yield json.loads(line)
    except urllib.error.HTTPError as error:
        yield {"event": "error", **json.loads(error.read())}
    except urllib.error.URLError as error:
        yield {"event": "error", "error": f"{url} does not answer ({error.reason})."}


if __name__ == "__main__":
    sys.exit(main())
