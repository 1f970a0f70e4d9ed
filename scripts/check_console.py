"""Two browsers at once draw twenty pictures each: all arrive, each with its own settings.

    python scripts/check_console.py [--pictures 20] [--steps 6] [--rounds 2]

Resident memory of the server is read when both browsers have their first pictures and at the end
of every round. Ends with status 1 where a picture is missing or has another one's settings. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil

from scripts.console_run import chromium, running

PROMPTS = ("a neon elephant", "a watercolor rose")


def order(page: Any, prompt: str, seed: int, pictures: int, steps: int) -> None:
    """Fill the form and press Generate."""
    if not page.locator("#al-seed").is_visible():
        page.locator("#al-settings > button").click()
        page.wait_for_selector("#al-seed input", state="visible")
    for part, value in (("seed", seed), ("count", pictures), ("steps", steps)):
        field = page.locator(f"#al-{part} input[type=number]").first
        field.fill(str(value))
        field.press("Tab")
    page.locator("#al-prompt textarea").fill(prompt)
    page.wait_for_function(f"document.querySelector('.al-desk').dataset.prompt === '{prompt}'")
    page.click("#al-generate")


def reports(page: Any, url: str) -> list[dict[str, Any]]:
    """Reports of the pictures that the page shows."""
    ids = page.locator(".al-shot").evaluate_all("shots => shots.map(shot => shot.dataset.id)")
    return [picture_report(f"{url}/api/pictures/{name}.png") for name in ids]


def picture_report(address: str) -> dict[str, Any]:
    """The report inside a picture."""
    from autolora.generate.report import read_report

    with urllib.request.urlopen(address) as answer, tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "picture.png"
        file.write_bytes(answer.read())
        return read_report(file)


def wrong(found: list[dict[str, Any]], prompt: str, seed: int, pictures: int, steps: int) -> int:
    """How many pictures are missing or have other settings."""
    expected = [(prompt, seed + number, steps) for number in range(pictures)]
    got = [(report["prompt"], report["seed"], report["steps"]) for report in found]
    return sum(one not in got for one in expected) + max(0, len(got) - len(expected))


def main() -> int:
    """Run the check."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pictures", type=int, default=20)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    bad, memory, start = 0, [], time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        running(Path(folder), "--outputs", f"{folder}/outputs") as (url, process),
        chromium() as browser,
    ):
        if browser is None:
            raise SystemExit("There is no Chromium; install it, or name it by AUTOLORA_CHROMIUM.")
        server = psutil.Process(process.pid)
        pages = [browser.new_context().new_page() for _ in PROMPTS]
        for page in pages:
            page.set_default_timeout(1_200_000)
            page.goto(url)
            page.wait_for_selector(".al-desk .al-chip")
        for round_number in range(options.rounds):
            seeds = [1000 * (2 * round_number + number + 1) for number in range(len(pages))]
            for page, prompt, seed in zip(pages, PROMPTS, seeds, strict=True):
                order(page, prompt, seed, options.pictures, options.steps)
            for page in pages:
                page.wait_for_selector(".al-stage[data-state='running']")
                page.wait_for_selector(".al-shot")
                if not memory:
                    memory.append(server.memory_info().rss)
            for page, prompt, seed in zip(pages, PROMPTS, seeds, strict=True):
                page.wait_for_selector("#al-generate:not([disabled])")
                found = reports(page, url)
                bad += wrong(found, prompt, seed, options.pictures, options.steps)
            memory.append(server.memory_info().rss)
            print(f"round {round_number + 1}: {memory[-1] / 2**20:.0f} MiB, {bad} wrong so far")
    result = {
        "pictures": len(PROMPTS) * options.rounds * options.pictures,
        "wrong": bad,
        "memory_mib": [round(value / 2**20, 1) for value in memory],
        "growth_last_round": memory[-1] / memory[-2] - 1,
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(result))
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
