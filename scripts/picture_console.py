"""Draws the web console's picture for the README, with the model and pool that ship.

    python scripts/picture_console.py [--out docs/images/console.png]

A browser opens a console of its own, draws three prompts and photographs the page.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image

from scripts.console_run import ROOT, chromium, running

PROMPTS = (
    "a pixel art dragon on a yellow background",
    "a sepia mushroom on a white background",
    "a watercolor rocket on an orange background",
)
SEED = 0


def main() -> int:
    """Take the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "console.png")
    out = parser.parse_args().out
    with (
        tempfile.TemporaryDirectory() as folder,
        running(Path(folder), "--outputs", f"{folder}/outputs") as (url, _),
        chromium() as browser,
    ):
        if browser is None:
            raise SystemExit("There is no Chromium; install it, or name it by AUTOLORA_CHROMIUM.")
        page = browser.new_page(viewport={"width": 1360, "height": 900}, color_scheme="light")
        page.set_default_timeout(300_000)
        page.goto(url)
        page.wait_for_selector(".al-desk .al-chip")
        page.locator("#al-settings > button").click()
        seed = page.locator("#al-seed input[type=number]").first
        seed.fill(str(SEED))
        seed.press("Tab")
        page.locator("#al-settings > button").click()
        for prompt in PROMPTS:
            before = page.locator(".al-facts").get_attribute("data-id") or ""
            page.locator("#al-prompt textarea").fill(prompt)
            page.wait_for_function(
                f"document.querySelector('.al-desk').dataset.prompt === {prompt!r}"
            )
            page.click("#al-generate")
            page.wait_for_function(
                "before => (document.querySelector('.al-facts').dataset.id || before) !== before"
                " && !document.querySelector('#al-generate').disabled",
                arg=before,
            )
        page.mouse.move(0, 0)
        page.wait_for_timeout(4000)  # the number of those who wait is asked for now and then
        shot = Path(folder) / "console.png"
        page.screenshot(path=shot, full_page=True)
        small = Image.open(shot).convert("RGB").quantize(255, dither=Image.Dither.FLOYDSTEINBERG)
        out.parent.mkdir(parents=True, exist_ok=True)
        small.save(out, optimize=True)
    print(f"{out}: {out.stat().st_size // 1024} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
