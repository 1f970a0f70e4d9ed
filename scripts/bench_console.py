"""Times the console: from the command to the page, and from a keystroke to the cards.

    python scripts/bench_console.py [--adapters 1000] [--repeats 30]

The start is measured beside Gradio's own hello world, from the start of the process to the first
byte of the page. The cards are measured in Chromium, from the keystroke's event to the change of
the page, over a pool of copies of the shipped LoRAs with weights, names and vectors slightly
changed (their vectors are made from the shipped ones, so that building the index takes a minute);
beside it stand the choice alone, in a running Python, and the request over HTTP. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from scripts.console_run import ROOT, chromium, environment, first_byte, running

HELLO = """
import sys, gradio
page = gradio.Interface(lambda name: name, "text", "text", analytics_enabled=False)
page.launch(server_port=int(sys.argv[1]), quiet=True)
"""
SUBJECTS = ("elephant", "rose", "dragon", "teapot", "bicycle", "panda face", "sunflower", "whale")
STYLES = ("neon", "watercolor", "woodcut", "pixel art", "sepia", "mosaic", "blueprint")
TYPING = """
async (text) => {
  const box = document.querySelector("#al-prompt textarea");
  const desk = document.querySelector(".al-desk");
  const start = performance.now();
  box.value = text;
  const done = new Promise((resolve) => {
    const seen = new MutationObserver(() => {
      if (desk.dataset.prompt === text) { seen.disconnect(); resolve(performance.now() - start); }
    });
    seen.observe(desk, { attributes: true });
  });
  box.dispatchEvent(new Event("input", { bubbles: true }));
  return await done;
}
"""


def prompts(count: int) -> list[str]:
    """Prompts that were not asked for before, as typing makes them."""
    backgrounds = ("red", "blue", "green", "yellow", "purple", "orange", "white", "gray")
    every = [f"a {s} {o} on {b}" for b in backgrounds for s in STYLES for o in SUBJECTS]
    step = max(1, len(every) // count)
    return (every[::step] or every)[:count]


def make_pool(source: Path, folder: Path, count: int) -> None:
    """Copies of shipped LoRAs under other names, with slightly changed weights."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    files = sorted(source.glob("*.safetensors"))
    folder.mkdir(parents=True)
    for number in range(count):
        file = files[number % len(files)]
        with safe_open(file, "pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata()
        for key, tensor in tensors.items():
            if tensor.is_floating_point() and tensor.numel() > 1:
                noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std()
                tensors[key] = (tensor.float() + 0.05 * noise).to(tensor.dtype)
        stem = f"{file.stem}-{number}"
        save_file(tensors, folder / f"{stem}.safetensors", metadata)
        cover = next(iter(sorted(source.glob(f"{file.stem}.cover-*.png"))), None)
        if cover is not None:
            (folder / f"{stem}.png").write_bytes(cover.read_bytes())


def make_index(pipe: Any, shipped: Any) -> None:
    """Build the index of the copies, with vectors near those of the shipped LoRAs."""
    index = shipped.open_index().searcher.index
    rows = {record.name: record.vector for record in index.records if record.vector is not None}
    vectors = torch.from_numpy(index.vectors("weights"))
    generator = torch.Generator().manual_seed(1)

    def encode(lora: Any) -> torch.Tensor:
        vector = vectors[rows[lora.name.rpartition("-")[0]]]
        noise = torch.randn(vector.shape, generator=generator) / len(vector) ** 0.5
        return torch.nn.functional.normalize(vector + 0.3 * noise, dim=0)

    pipe._search._encode = encode  # in place of minutes of portraits
    pipe.index()


def time_start(folder: Path, repeats: int) -> dict[str, float]:
    """Seconds from the start of the process to the first byte, in turns."""
    found: dict[str, list[float]] = {"console": [], "hello world": []}
    for number in range(repeats):
        start = time.perf_counter()
        with running(folder, "--outputs", str(folder / "outputs")) as (url, _):
            first_byte(url)
            found["console"].append(time.perf_counter() - start)
        port = 17800 + number
        start = time.perf_counter()
        hello = subprocess.Popen(
            [sys.executable, "-c", HELLO, str(port)], env=environment(), cwd=ROOT
        )
        first_byte(f"http://127.0.0.1:{port}")
        found["hello world"].append(time.perf_counter() - start)
        hello.terminate()
        hello.wait(15)
    return {name: statistics.median(values) for name, values in found.items()}


def timed(call: Callable[[str], Any], texts: list[str]) -> list[float]:
    """Milliseconds by prompt."""
    found = []
    for text in texts:
        start = time.perf_counter()
        call(text)
        found.append(1000 * (time.perf_counter() - start))
    return found


def ask(url: str, text: str) -> dict[str, Any]:
    """Ask for cards as the page does."""
    body = json.dumps({"prompt": text}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/api/cards", body, headers)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def working(url: str) -> bool:
    """Whether the console is still loading the base model."""
    with urllib.request.urlopen(f"{url}/api/queue") as answer:
        return bool(json.load(answer)["jobs"])


def time_cards(config: Path, folder: Path, pipe: Any, repeats: int) -> dict[str, list[float]]:
    """Milliseconds from keystroke to cards, over HTTP, and of the choice alone."""
    texts = prompts(3 * repeats)
    found = {"choice": timed(pipe.choose, ["warm up", *texts[0::3]])[1:]}
    options = ("--model", str(config), "--outputs", str(folder / "outputs"))
    with running(folder, *options) as (url, _), chromium() as browser:
        while not ask(url, "a neon elephant")["cards"] or working(url):
            time.sleep(0.5)
        found["http"] = timed(lambda text: ask(url, text), texts[1::3])
        if browser is not None:
            page = browser.new_page()
            page.goto(url)
            page.wait_for_selector(".al-desk .al-chip")
            page.evaluate(TYPING, "warm up")
            found["keystroke"] = [page.evaluate(TYPING, text) for text in texts[2::3]]
    return found


def main() -> None:
    """Measure, print a table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=30, help="prompts per measurement")
    parser.add_argument("--starts", type=int, default=3)
    options = parser.parse_args()
    from autolora.pipeline import AutoLoRAPipeline

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shipped = AutoLoRAPipeline.from_config("tiny")
        make_pool(shipped.config.pool, folder / "pool", options.adapters)
        config = folder / "tiny.yaml"
        config.write_text("kind: tiny\nname: tiny\npool: pool\nindex: index\n")
        pipe = AutoLoRAPipeline.from_config(config)
        make_index(pipe, shipped)
        cards = time_cards(config, folder, pipe, options.repeats)
        start = time_start(folder, options.starts)
    medians = {name: statistics.median(values) for name, values in cards.items()}
    worst = {name: sorted(values)[int(0.95 * (len(values) - 1))] for name, values in cards.items()}
    for name in cards:
        print(f"{name:>12}  median {medians[name]:7.1f} ms   95 % {worst[name]:7.1f} ms")
    for name, seconds in start.items():
        print(f"{name:>12}  first byte {seconds:.2f} s")
    if "keystroke" not in cards:
        print("No Chromium: the time from the keystroke was not measured.")
    result = {
        "adapters": options.adapters,
        "cards_ms": {name: {"median": medians[name], "p95": worst[name]} for name in cards},
        "first_byte_s": start,
        "first_byte_over_hello_world": start["console"] / start["hello world"],
        "keystroke_goal_ms": 150,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
