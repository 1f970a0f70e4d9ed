"""Measures the tiny world on generated pictures, scored by probes trained on renders.

    python scripts/evaluate_tiny.py [--quick] [--sheet docs/images/contact-sheet.png]
    python scripts/evaluate_tiny.py --retrieval

Prints one table and, on the last line, the same as JSON. Subjects and styles are those of the
committed pool. Retrieval is measured on that pool as it is and on a copy without any names or
metadata, apart for concepts that the retriever was trained on and for those it never saw.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from autolora import Pool
from autolora.config import load_config
from autolora.families.load import load_pipeline, quiet
from autolora.fusion import GateBank, attached, load_gates
from train.retrieval.config import load_config as read_config
from train.tiny_world.captions import prompt
from train.tiny_world.export import draw
from train.tiny_world.probes import Probe, load_probe
from train.tiny_world.render import COLOURS
from train.tiny_world.retrieval import evaluate_retrieval
from train.tiny_world.styles import STYLES
from train.tiny_world.world import load_world_config, split_world

ROOT = Path(__file__).resolve().parents[1]
LABEL_HEIGHT = 20  # pixels above the contact sheet
COLUMNS = ("base model", "subject LoRA", "style LoRA", "both, sum", "both, gated")


class Scorer:
    """Draws pictures with adapters attached and asks the probes what they show."""

    def __init__(self, pipe: Any, pool: Pool, probe: Probe, gates: GateBank | None) -> None:
        self.pipe, self.pool, self.probe, self.gates = pipe, pool, probe, gates
        self.rng = np.random.default_rng(0)

    def colour(self) -> str:
        """A background colour, in a fixed sequence."""
        return str(self.rng.choice(list(COLOURS)))

    def picture(self, text: str, names: Iterable[str], strategy: str, seed: int) -> Image.Image:
        """One picture with the named adapters at strength 1."""
        adapters = [(self.pool.load(name), 1.0) for name in names]
        with attached(self.pipe.dit, adapters, strategy=strategy, gates=self.gates):
            return draw(self.pipe, text, seed)

    @torch.no_grad()
    def label(self, picture: Image.Image) -> tuple[str, str]:
        """Subject and style that the probes see."""
        x = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        subject, style = self.probe(x)
        return self.probe.subjects[int(subject.argmax())], self.probe.styles[int(style.argmax())]


def accuracy(
    scorer: Scorer, cases: list[tuple[str, str | None, list[str]]], strategy: str
) -> dict[str, float]:
    """Shares of right subject, right style and both.

    Args:
        scorer: Draws and labels.
        cases: Subject, style or None, and the adapters to attach.
        strategy: Fusion strategy.
    """
    subject = style = both = 0
    scorer.rng = np.random.default_rng(len(cases))  # the same prompts for every strategy
    for seed, (name, look, adapters) in enumerate(cases):
        picture = scorer.picture(prompt(name, scorer.colour(), look), adapters, strategy, seed)
        seen_subject, seen_style = scorer.label(picture)
        right = (seen_subject == name, seen_style == (look or "plain"))
        subject, style, both = subject + right[0], style + right[1], both + all(right)
    n = max(1, len(cases))
    return {"subject": subject / n, "style": style / n, "both": both / n, "pictures": n}


def evaluate_pictures(scorer: Scorer, share: float, match: str) -> dict[str, dict[str, float]]:
    """The rows whose names hold ``match``; ``share`` < 1 takes only a part of the cases."""
    config = load_world_config(ROOT / "configs" / "tiny_world.yaml")
    split = split_world(config)
    styles = STYLES[: config.pool.shipped_styles]
    rng = np.random.default_rng(1)

    def some(items: list[Any]) -> list[Any]:
        return items[: max(4, round(len(items) * share))]

    base, shipped = some(split.base), some(split.shipped)
    pairs = []
    for i, subject in enumerate(some(split.shipped * 2)):
        style = styles[(i + i // len(styles)) % len(styles)]
        pairs.append((subject.name, style.name, [subject.slug, style.slug]))
    looks = [
        (split.base[int(rng.integers(len(split.base)))].name, s.name, [s.slug])
        for s in styles
        for _ in range(max(2, round(8 * share)))
    ]
    one = [(s.name, None, [s.slug]) for s in shipped]
    plain = [(s.name, None, []) for s in shipped]
    distracted = [
        (s.name, None, [s.slug, styles[i % len(styles)].slug]) for i, s in enumerate(shipped)
    ]
    rows: dict[str, dict[str, float]] = {}
    plan = (
        ("base subjects, base model", [(s.name, None, []) for s in base], "sum"),
        ("LoRA subjects, base model", plain, "sum"),
        ("LoRA subjects, their LoRA", one, "sum"),
        ("LoRA subjects, their LoRA, gated", one, "gated"),
        ("base subjects, a style LoRA", looks, "sum"),
        ("base subjects, a style LoRA, gated", looks, "gated"),
        ("subject + style, sum", pairs, "sum"),
        ("subject + style, gated", pairs, "gated"),
        ("subject asked, style attached too, sum", distracted, "sum"),
        ("subject asked, style attached too, gated", distracted, "gated"),
    )
    for name, cases, strategy in plan:
        if match not in name:
            continue
        started = time.monotonic()
        rows[name] = accuracy(scorer, cases, strategy)
        print(f"{name}: {rows[name]} {time.monotonic() - started:.0f} s", file=sys.stderr)
    return rows


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Peak signal-to-noise ratio of two pictures in dB."""
    error = np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def storage_psnr(scorer: Scorer, config: Any) -> dict[str, float]:
    """How close pictures from float8 storage are to those from bfloat16 storage."""
    other = load_pipeline(dataclasses.replace(config, storage="bfloat16"))
    texts = [prompt(s, c) for s, c in (("owl", "blue"), ("crab", "white"), ("bus", "green"))]
    values = [psnr(draw(scorer.pipe, t, i), draw(other, t, i)) for i, t in enumerate(texts)]
    return {"mean_db": float(np.mean(values)), "min_db": min(values), "pictures": len(values)}


def detach_restores(scorer: Scorer) -> bool:
    """Whether the same seed gives the same bytes before an attach and after the detach."""
    text = prompt("owl", "blue")
    before = draw(scorer.pipe, text, 0).tobytes()
    scorer.picture(text, list(scorer.pool.names)[:3], "gated", 0)
    return draw(scorer.pipe, text, 0).tobytes() == before


def contact_sheet(scorer: Scorer, path: Path) -> None:
    """Rows are prompts; columns base, each adapter alone, plain sum, gated."""
    cases = (
        ("elephant", "neon", "blue"),
        ("rocket", "watercolor", "orange"),
        ("teapot", "blueprint", "teal"),
        ("dragon", "pixel-art", "green"),
        ("mushroom", "sepia", "yellow"),
        ("tyrannosaurus", "stained-glass", "purple"),
    )
    rows = []
    for seed, (subject, style, colour) in enumerate(cases):
        text = prompt(subject, colour, style.replace("-", " "))
        columns = (([], "sum"), ([subject], "sum"), ([style], "sum"))
        both = (([subject, style], "sum"), ([subject, style], "gated"))
        pictures = [scorer.picture(text, n, s, seed) for n, s in (*columns, *both)]
        rows.append(np.concatenate([np.asarray(p) for p in pictures], 1))
    sheet = Image.fromarray(np.concatenate(rows))
    labelled = Image.new("RGB", (sheet.width, sheet.height + LABEL_HEIGHT), "white")
    labelled.paste(sheet, (0, LABEL_HEIGHT))
    pen = ImageDraw.Draw(labelled)
    width = sheet.width // len(COLUMNS)
    for i, name in enumerate(COLUMNS):
        pen.text(((i + 0.5) * width, LABEL_HEIGHT / 2), name, "black", anchor="mm")
    path.parent.mkdir(parents=True, exist_ok=True)
    labelled.save(path, optimize=True)


def print_table(rows: dict[str, dict[str, float]], other: dict[str, Any]) -> None:
    """The same numbers for people."""
    console = Console(width=110)
    if retrieval := other.pop("retrieval", None):
        console.print(retrieval_table(retrieval))
    for name, value in other.items():
        console.print(f"{name}: {value}")
    if not rows:
        return
    table = Table(title="tiny world, generated pictures")
    for column in ("case", "subject", "style", "both", "pictures"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for name, row in rows.items():
        cells = [f"{row[c]:.3f}" for c in ("subject", "style", "both")]
        table.add_row(name, *cells, str(int(row["pictures"])))
    console.print(table)


def retrieval_table(result: dict[str, Any]) -> Table:
    """One line for each question and group of concepts; see `train.tiny_world.retrieval`."""
    table = Table(title="retrieval on the shipped pool")
    for column in ("pool", "question", "concepts", "numbers"):
        table.add_column(column)
    for pool, questions in result.items():
        for question, groups in questions.items():
            for group, numbers in groups.items():
                cells = ", ".join(f"{name} {round(value, 3):g}" for name, value in numbers.items())
                table.add_row(pool, question, group, cells)
    return table


def main() -> None:
    """Parses the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the pictures")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--match", default="", help="only rows about pictures that hold this text")
    only.add_argument("--retrieval", action="store_true", help="only retrieval, no pictures")
    parser.add_argument("--gate", type=Path, help="gates to use in place of the shipped ones")
    parser.add_argument("--encoder", type=Path, help="retriever to use in place of the shipped one")
    parser.add_argument("--sheet", type=Path, help="also write the contact sheet here")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    world = load_world_config(ROOT / "configs" / "tiny_world.yaml")
    retriever = read_config(ROOT / "configs" / "train" / "retriever.yaml")
    pool = Pool(ROOT / "lora_pool" / "tiny")
    if args.retrieval:
        found = evaluate_retrieval(pool, world, retriever, args.encoder)
        report({}, {"retrieval": found}, args.out)
        return
    with quiet():
        config = load_config("tiny")
        pipe = load_pipeline(config)
    shipped = ROOT / "autolora/families/tiny/weights/gate.safetensors"
    gates = load_gates(args.gate or config.gate or shipped)
    scorer = Scorer(pipe, pool, load_probe(), gates)
    if args.sheet:
        contact_sheet(scorer, args.sheet)
    rows = evaluate_pictures(scorer, 0.1 if args.quick else 1.0, args.match)
    if args.match:
        report(rows, {}, args.out)
        return
    other = {
        "retrieval": evaluate_retrieval(pool, world, retriever, args.encoder),
        "float8 storage against bfloat16": storage_psnr(scorer, config),
        "detach restores the base to the byte": detach_restores(scorer),
        "probe on held-out renders": json.loads(probe_note()),
    }
    report(rows, other, args.out)


def report(rows: dict[str, dict[str, float]], other: dict[str, Any], out: Path | None) -> None:
    """Prints the table, then everything as one JSON line, which ``out`` receives too."""
    print_table(rows, dict(other))
    result = json.dumps({"rows": rows, **other})
    if out:
        out.write_text(result + "\n", encoding="utf-8")
    print(result)


def probe_note() -> str:
    """The probe's accuracy on held-out renders, from its own header."""
    from safetensors import safe_open

    from train.tiny_world.probes import PROBE_FILE

    with safe_open(str(PROBE_FILE), framework="pt") as file:
        return str(file.metadata()["held_out"])


if __name__ == "__main__":
    main()
