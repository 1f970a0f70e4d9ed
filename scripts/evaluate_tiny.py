"""Measures the tiny world on generated pictures, scored by two judges trained on renders.

    python scripts/evaluate_tiny.py [--quick] [--sheet docs/images/contact-sheet.png]
    python scripts/evaluate_tiny.py --match people
    python scripts/evaluate_tiny.py --retrieval

Prints one table and, on the last line, the same as JSON. Every share has a 95 % interval. Subjects
and styles are those of the committed pool; the prompts of people (tests/data/people_prompts.yaml)
were used in no training and go through search, choice and fusion as a user's would. Retrieval is
measured on that pool as it is and on a copy without any names or metadata, apart for concepts that
the retriever was trained on and for those it never saw.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from autolora import AutoLoRAPipeline, Pool
from autolora.config import load_config
from autolora.families.load import load_pipeline, quiet
from autolora.fusion import load_gates
from train.retrieval.config import load_config as read_config
from train.tiny_world.captions import prompt
from train.tiny_world.compositions import bare_name, paint, plain_composition
from train.tiny_world.evaluation import (
    Case,
    Scorer,
    case,
    colours,
    pair_case,
    read_people_prompts,
    sharpness,
    to_tensor,
)
from train.tiny_world.export import draw
from train.tiny_world.probes import JUDGE_FILE, PROBE_FILE, held_out, load_judge
from train.tiny_world.retrieval import evaluate_retrieval
from train.tiny_world.styles import STYLES, Style
from train.tiny_world.world import Split, split_world

ROOT = Path(__file__).resolve().parents[1]
PEOPLE = ROOT / "tests" / "data" / "people_prompts.yaml"
LABEL_HEIGHT = 20  # pixels above the contact sheet


class Pictures:
    """The rows of the table that are about pictures."""

    def __init__(self, scorer: Scorer, split: Split, share: float, strategy: str) -> None:
        self.scorer, self.split, self.share, self.strategy = scorer, split, share, strategy
        names = set(scorer.pool.names)
        self.subjects = [s for s in split.shipped if s.slug in names]
        self.styles = [s for s in STYLES if s.slug in names]

    def rows(self, pipeline: AutoLoRAPipeline) -> dict[str, Callable[[], dict[str, Any]]]:
        """Every row by its name, as something to run."""
        count, default = self.scorer.count, self.strategy
        table: dict[str, Callable[[], dict[str, Any]]] = {
            "base subjects, base model": lambda: count(self._alone(self.split.base, False), "sum"),
            "LoRA subjects, base model": lambda: count(self._alone(self.subjects, False), "sum"),
            "LoRA subjects, their LoRA": lambda: count(self._alone(self.subjects, True), "sum"),
            f"LoRA subjects, their LoRA, {default}": lambda: count(
                self._alone(self.subjects, True), default
            ),
        }
        for style in self.styles:
            table[f"style alone: {style.name}"] = lambda s=style: count(self._styled(s), "sum")
        for strategy in ("sum", default):
            table[f"subject + style, {strategy}"] = lambda how=strategy: count(self._pairs(), how)
            table[f"two subjects side by side, {strategy}"] = lambda how=strategy: count(
                self._two(), how
            )
        table["prompts as people type them, all visible"] = lambda: self._people(pipeline)
        table["sharpness, base subjects"] = self._sharpness
        return table

    def _some(self, items: list[Any]) -> list[Any]:
        return items[: max(4, round(len(items) * self.share))]

    def _alone(self, subjects: list[Any], own: bool) -> list[Case]:
        chosen = self._some(subjects)
        return [
            case(s, c, adapters=[s.slug] if own else [])
            for s, c in zip(chosen, colours(len(chosen), len(chosen)), strict=True)
        ]

    def _styled(self, style: Style) -> list[Case]:
        rng = np.random.default_rng(1)
        order = self._some([self.split.base[i] for i in rng.permutation(len(self.split.base))[:24]])
        tints = colours(len(order), 1)
        return [case(s, c, style.name, [style.slug]) for s, c in zip(order, tints, strict=True)]

    def _pairs(self) -> list[Case]:
        cases = []
        subjects = self._some(self.subjects * 2)
        for i, (subject, colour) in enumerate(
            zip(subjects, colours(len(subjects), 2), strict=True)
        ):
            style = self.styles[(i + i // len(self.styles)) % len(self.styles)]
            cases.append(case(subject, colour, style.name, [subject.slug, style.slug]))
        return cases

    def _two(self) -> list[Case]:
        rng = np.random.default_rng(3)
        order = [self.subjects[i] for i in rng.permutation(len(self.subjects))]
        pairs = self._some(list(zip(order, order[1:] + order[:1], strict=True)))
        return [pair_case(a, b, [a.slug, b.slug]) for a, b in pairs]

    def _people(self, pipeline: AutoLoRAPipeline) -> dict[str, Any]:
        cases = self._some(read_people_prompts(PEOPLE))
        return self.scorer.judge_all(cases, lambda one, seed: pipeline(one.text, seed=seed).image)

    def _sharpness(self) -> dict[str, Any]:
        rng = np.random.default_rng(4)
        subjects = self._some(
            [self.split.base[i] for i in rng.permutation(len(self.split.base))[:48]]
        )
        size = self.scorer.pipe.dit.config.size
        drawn, renders = [], []
        for seed, subject in enumerate(subjects):
            text = prompt(bare_name(subject), "white")
            drawn.append(to_tensor(self.scorer.picture(text, [], "sum", seed)))
            picture = paint(plain_composition(subject, "white"), size, rng)[0]
            renders.append(torch.from_numpy(picture).permute(2, 0, 1).float() * 2 - 1)
        return sharpness(torch.stack(drawn), torch.stack(renders))


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


def contact_sheet(scorer: Scorer, path: Path, strategy: str) -> None:
    """Rows are prompts; columns base, each adapter alone, plain sum, the default strategy."""
    titles = ("base model", "subject LoRA", "style LoRA", "both, sum", f"both, {strategy}")
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
        both = (([subject, style], "sum"), ([subject, style], strategy))
        pictures = [scorer.picture(text, n, s, seed) for n, s in (*columns, *both)]
        rows.append(np.concatenate([np.asarray(p) for p in pictures], 1))
    sheet = Image.fromarray(np.concatenate(rows))
    labelled = Image.new("RGB", (sheet.width, sheet.height + LABEL_HEIGHT), "white")
    labelled.paste(sheet, (0, LABEL_HEIGHT))
    pen = ImageDraw.Draw(labelled)
    width = sheet.width // len(titles)
    for i, name in enumerate(titles):
        pen.text(((i + 0.5) * width, LABEL_HEIGHT / 2), name, "black", anchor="mm")
    path.parent.mkdir(parents=True, exist_ok=True)
    labelled.save(path, optimize=True)


def print_table(rows: dict[str, dict[str, Any]], other: dict[str, Any]) -> None:
    """The same numbers for people: each share by each judge, with its interval."""
    console = Console(width=120)
    if retrieval := other.pop("retrieval", None):
        console.print(retrieval_table(retrieval))
    for name, value in other.items():
        console.print(f"{name}: {value}")
    if not rows:
        return
    table = Table(title="tiny world, generated pictures: probe / independent judge")
    for column in ("case", "subject", "style", "both", "pictures"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for name, row in rows.items():
        if "pictures" not in row:
            console.print(f"{name}: {row}")
            continue
        cells = [_cell(row[question]) for question in ("subject", "style", "both")]
        table.add_row(name, *cells, str(row["pictures"]))
    console.print(table)


def _cell(shares: dict[str, list[float]]) -> str:
    return " / ".join(f"{p:.2f} ({low:.2f}-{high:.2f})" for p, low, high in shares.values())


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
    retriever = read_config(ROOT / "configs" / "train" / "retriever.yaml")
    pool = Pool(ROOT / "lora_pool" / "tiny")
    if args.retrieval:
        found = evaluate_retrieval(pool, retriever, args.encoder)
        report({}, {"retrieval": found}, args.out)
        return
    with quiet():
        config = load_config("tiny")
        pipe = load_pipeline(config)
    shipped = ROOT / "autolora/families/tiny/weights/gate.safetensors"
    gates = load_gates(args.gate or config.gate or shipped)
    judges = {path.stem: load_judge(path) for path in (PROBE_FILE, JUDGE_FILE)}
    scorer = Scorer(pipe, pool, judges, gates)
    if args.sheet:
        contact_sheet(scorer, args.sheet, config.strategy)
    pictures = Pictures(scorer, split_world(), 0.1 if args.quick else 1.0, config.strategy)
    rows: dict[str, Any] = {}
    for name, run in pictures.rows(AutoLoRAPipeline.from_config("tiny")).items():
        if args.match in name:
            started = time.monotonic()
            rows[name] = run()
            print(f"{name}: {rows[name]} {time.monotonic() - started:.0f} s", file=sys.stderr)
    if args.match:
        report(rows, {}, args.out)
        return
    other = {
        "retrieval": evaluate_retrieval(pool, retriever, args.encoder),
        "float8 storage against bfloat16": storage_psnr(scorer, config),
        "detach restores the base to the byte": detach_restores(scorer),
        "judges on held-out renders": {p.stem: held_out(p) for p in (PROBE_FILE, JUDGE_FILE)},
    }
    report(rows, other, args.out)


def report(rows: dict[str, dict[str, Any]], other: dict[str, Any], out: Path | None) -> None:
    """Prints the table, then everything as one JSON line, which ``out`` receives too."""
    print_table(rows, dict(other))
    result = json.dumps({"rows": rows, **other})
    if out:
        out.write_text(result + "\n", encoding="utf-8")
    print(result)


if __name__ == "__main__":
    main()
