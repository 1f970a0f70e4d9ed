"""A console in a process of its own, for the scripts that measure and check it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def running(folder: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Start a console on a free port; give its address and process."""
    log = folder / "console.log"
    command = [sys.executable, "-m", "autolora", "serve", "--port", "0", *options]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT, env=environment())
    try:
        yield address(process, log), process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
        process.kill()


def environment() -> dict[str, str]:
    """The environment, without the network."""
    return {**os.environ, "HF_HUB_OFFLINE": "1"}


def address(process: subprocess.Popen[bytes], log: Path) -> str:
    """Wait until the console says where it is."""
    while process.poll() is None:
        if found := re.search(r"console at (http://\S+)", log.read_text()):
            return found[1]
        time.sleep(0.01)
    raise SystemExit(f"The console did not start:\n{log.read_text()}")


def first_byte(url: str, patience: float = 120.0) -> None:
    """Wait until a page answers."""
    end = time.monotonic() + patience
    while True:
        try:
            with urllib.request.urlopen(url, timeout=patience) as answer:
                answer.read(1)
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.01)


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A browser, or None where there is none."""
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        yield None
        return
    with sync_playwright() as playwright:
        executable = os.environ.get("AUTOLORA_CHROMIUM") or shutil.which("chromium")
        try:
            browser = playwright.chromium.launch(
                executable_path=executable, args=["--no-sandbox", "--disable-dev-shm-usage"]
            )
        except Error:
            yield None
            return
        yield browser
        browser.close()
