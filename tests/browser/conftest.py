"""A real console with the shipped model and a few shipped LoRAs, and a browser to look at it.

Screenshots go to the folder that AUTOLORA_ARTIFACTS names, by default outputs/browser.
"""

import contextlib
import os
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
POOL = ("elephant", "rose", "dragon", "neon", "watercolor", "pixel-art")
STEPS = 4


@dataclass
class Console:
    """A running console."""

    url: str
    pool: Path
    styles: Path
    pid: int


@pytest.fixture(scope="session")
def chromium():
    """A browser; Playwright's own, or the system's."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    pytest.importorskip("gradio", reason="the console extra is not installed")
    with sync_api.sync_playwright() as playwright:
        found = shutil.which("chromium") or shutil.which("google-chrome")
        executable = os.environ.get("AUTOLORA_CHROMIUM") or found
        try:
            browser = playwright.chromium.launch(
                executable_path=executable, args=["--no-sandbox", "--disable-dev-shm-usage"]
            )
        except sync_api.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def console(tmp_path_factory) -> Iterator[Console]:
    """A console in a process of its own."""
    folder = tmp_path_factory.mktemp("browser")
    pool = folder / "pool"
    pool.mkdir()
    for name in POOL:
        for file in (ROOT / "lora_pool" / "tiny").glob(f"{name}.*"):
            shutil.copy(file, pool)
    styles = folder / "styles"
    config = folder / "tiny.yaml"
    config.write_text("kind: tiny\nname: tiny\npool: pool\nindex: index\nsteps: 20\n")
    command = [sys.executable, "-m", "autolora", "serve", "--port", "0", "--model", str(config)]
    command += ["--outputs", str(folder / "outputs"), "--styles", str(styles)]
    log = (folder / "log").open("w+")
    process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
    try:
        yield Console(_address(process, folder / "log"), pool, styles, process.pid)
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
        process.kill()
        log.close()


def _address(process: subprocess.Popen, log: Path) -> str:
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        if found := re.search(r"console at (http://\S+)", log.read_text()):
            return found[1]
        select.select([], [], [], 0.1)
    raise AssertionError(f"the console did not start:\n{log.read_text()}")


@pytest.fixture
def open_page(chromium, console):
    """A function that opens the console in a browser of its own; errors on the page are errors."""
    contexts, problems, asked = [], [], []

    def open_(width: int = 1440, height: int = 1000, **options):
        context = chromium.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(console.url)
        page.wait_for_selector(".al-desk .al-chip[data-style='neon']")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert problems == []
    elsewhere = {url for url in asked if not url.startswith((console.url, "data:", "blob:"))}
    assert elsewhere == set(), "the page asks nobody else for anything"


@pytest.fixture
def page(open_page):
    """The console in a wide window."""
    return open_page()


@pytest.fixture(scope="session")
def shoot():
    """A function that takes a screenshot for people to look at."""
    folder = Path(os.environ.get("AUTOLORA_ARTIFACTS", ROOT / "outputs" / "browser"))
    folder.mkdir(parents=True, exist_ok=True)

    def take(page, name: str, full_page: bool = False) -> None:
        page.wait_for_timeout(350)  # for transitions to end
        page.screenshot(path=folder / f"{name}.png", full_page=full_page)

    return take
