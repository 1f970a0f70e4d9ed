"""The clients in examples/, run against a real server."""

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import uvicorn

from autolora.console.server import Access, make_app, open_socket
from autolora.generate.report import read_report

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def serving(studio):
    """A function that serves the studio and returns its address."""
    servers = []

    def serve(access: Access | None = None) -> str:
        listener = open_socket("127.0.0.1", 0)
        app = make_app(studio, access, page=False)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        servers.append((server, thread, listener))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield serve
    for server, thread, listener in servers:
        server.should_exit = True
        thread.join(20)
        listener.close()


def run_python(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(EXAMPLES / "client.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_python_client(serving, tmp_path: Path) -> None:
    url = serving()
    out = tmp_path / "picture.png"
    done = run_python("a neon elephant", "--url", url, "--seed", "3", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "neon x 0.7" in done.stdout and "seed 3" in done.stdout and "running" in done.stderr
    assert read_report(out)["seed"] == 3
    wrong = run_python(" ", "--url", url)
    assert wrong.returncode == 1 and "prompt is empty" in wrong.stderr
    assert "does not answer" in run_python("x", "--url", "http://127.0.0.1:1").stderr


def test_the_python_client_with_a_password(serving, tmp_path: Path) -> None:
    url = serving(Access("ann", "secret"))
    out = tmp_path / "picture.png"
    assert "password" in run_python("a rose", "--url", url).stderr
    done = run_python("a neon rose", "--url", url, "--auth", "ann:secret", "--out", str(out))
    assert done.returncode == 0 and out.is_file()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_curl_client(serving, tmp_path: Path) -> None:
    out = tmp_path / "picture.png"
    command = ["sh", str(EXAMPLES / "client.sh"), 'a "neon" elephant', str(out)]
    environment = {"AUTOLORA_URL": serving(), "PATH": "/usr/bin:/bin:/usr/local/bin"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    hits = json.loads(done.stdout.splitlines()[0])["hits"]
    assert {hit["name"] for hit in hits if hit["chosen"]} == {"neon", "elephant"}
    assert read_report(out)["prompt"] == 'a "neon" elephant'
