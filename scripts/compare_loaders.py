"""Compares loaders: every LoRA format as AutoLoRA, DiffSynth and diffusers with PEFT read it.

    python scripts/compare_loaders.py [--only TEXT] [--out docs/formats.md]

Files of every format come from an independent writer (``tests/lora/truth``) that knows the
dense weight change in float64. Each loader gets the same file through its public entrance, in
float32, and its change of every layer is compared with the truth. Files have width 64 and two
blocks of each kind. Where diffusers' converter has the sizes of FLUX.1 written into its code, two
files have the true width, and the others leave out the layer that it splits by them; where it asks
for all 57 blocks it gets them. Files of the other families are small ones of
``tests/lora/truth/families.py``. Without diffusers, the other two are compared. Prints a Markdown
table; the last line is JSON. ``--out`` replaces the table between the markers of a page.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor

from scripts.compare import families
from scripts.compare.files import Entry, entries
from scripts.compare.loaders import Loader, NeverEnds, at_most, loaders, quiet
from scripts.compare.outcome import Outcome, measured
from tests.lora.truth import TruthFile
from tests.lora.truth.families import FAMILY_CASES

PATIENCE = 60.0  # seconds of processor time for one file; the longest needs some ten
BEGIN, END = "<!-- compare_loaders: begin -->", "<!-- compare_loaders: end -->"


def truths(entry: Entry, truth: TruthFile) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """Layers to compare, by what they belong to."""
    listed = [
        layer
        for layer in truth.layers
        if not entry.first_block or "blocks." not in layer or "blocks.0." in layer
    ]
    parts: dict[str, dict[str, Callable[[], Tensor]]] = {
        "transformer": {layer: lambda layer=layer: truth.dense(layer) for layer in listed}
    }
    for which, modules in truth.text.items():
        parts[which] = {
            f"{which}:{path}": lambda weights=weights: torch.from_numpy(weights.change())
            for path, weights in modules.items()
        }
    return parts


def outcomes(loader: Loader, entry: Entry, truth: TruthFile, path: Path) -> dict[str, Outcome]:
    """How a loader does on a file, by what its layers belong to."""
    try:
        with quiet():
            with at_most(PATIENCE):
                change = loader.load(path, truth)
            return {part: measured(layers, change) for part, layers in truths(entry, truth).items()}
    except NeverEnds as error:
        return {"transformer": Outcome(raised=str(error), hangs=True)}
    except Exception as error:  # whatever a loader raises is its result
        # A key in quotes says less than the type, so both are kept; paths are not.
        text = str(error).replace(f"{path.parent}/", "").replace(f"{ROOT}/", "")
        first = text.strip().split("\n")[0][:100].strip()
        raised = f"{type(error).__name__}: {first}"
        return {"transformer": Outcome(raised=raised)}


def compared(entry: Entry, found: list[Loader]) -> dict[str, Any]:
    """One row: all loaders on one file."""
    truth = entry.make()
    row: dict[str, Any] = {"case": entry.case.name, "size": entry.about, "loaders": {}}
    for loader in found:
        with tempfile.TemporaryDirectory() as folder:
            # Each loader has its own copy: some change the tensors they are given.
            by_part = outcomes(loader, entry, truth, truth.save(Path(folder)))
        row["loaders"][loader.name] = {part: o.to_dict() for part, o in by_part.items()}
        gc.collect()
    return row


def family_row(name: str, found: list[Loader]) -> dict[str, Any]:
    """One row of a file for another family than FLUX.1."""
    file = FAMILY_CASES[name]()
    row: dict[str, Any] = {"case": name, "size": "small", "loaders": {}}
    layers = {layer: lambda change=change: change for layer, change in file.changes.items()}
    for loader in found:
        load = families.LOADERS[loader.name.split()[0]]
        with tempfile.TemporaryDirectory() as folder:
            path = file.save(Path(folder))
            try:
                with quiet(), at_most(PATIENCE):
                    outcome = measured(layers, load(path, file))
            except Exception as error:  # whatever a loader raises is its result
                text = str(error).replace(f"{path.parent}/", "").strip().split("\n")[0][:100]
                outcome = Outcome(raised=f"{type(error).__name__}: {text.strip()}")
        row["loaders"][loader.name] = {"transformer": outcome.to_dict()}
    gc.collect()
    return row


def cell(parts: dict[str, dict[str, Any]]) -> str:
    names = {"transformer": "", "clip": "CLIP: ", "t5": "T5: "}
    words = [names[part] + outcome["words"] for part, outcome in parts.items()]
    return "; ".join(words).replace("|", "\\|")


def table(rows: list[dict[str, Any]], found: list[Loader]) -> str:
    lines = [
        "| file | width | " + " | ".join(loader.name for loader in found) + " |",
        "|---|---|" + "---|" * len(found),
    ]
    for row in rows:
        cells = (cell(row["loaders"][loader.name]) for loader in found)
        lines.append(f"| {row['case']} | {row['size']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(rows: list[dict[str, Any]], found: list[Loader]) -> dict[str, dict[str, int]]:
    """Files by how the transformer's layers came out."""
    counts: dict[str, dict[str, int]] = {}
    for loader in found:
        kinds = {"exact": 0, "rounded": 0, "wrong or incomplete": 0, "nothing": 0, "error": 0}
        for row in rows:
            outcome = row["loaders"][loader.name]["transformer"]
            if outcome["raised"]:
                kinds["error"] += 1
            elif outcome["exact"] == outcome["layers"]:
                kinds["exact"] += 1
            elif outcome["dropped"] == outcome["layers"]:
                kinds["nothing"] += 1
            elif outcome["exact"] + outcome["rounded"] == outcome["layers"]:
                kinds["rounded"] += 1
            else:
                kinds["wrong or incomplete"] += 1
        counts[loader.name] = kinds
    return counts


def summary_table(counts: dict[str, dict[str, int]]) -> str:
    kinds = list(next(iter(counts.values())))
    lines = ["| loader | " + " | ".join(kinds) + " |", "|---|" + "---|" * len(kinds)]
    lines += [
        f"| {name} | " + " | ".join(str(by_kind[kind]) for kind in kinds) + " |"
        for name, by_kind in counts.items()
    ]
    return "\n".join(lines)


def provenance() -> dict[str, str]:
    """Command, commit, date, machine and versions."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    changed = " with local changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        named = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        cpu = named[0].partition(":")[2].strip() if named else cpu
    packages = ("torch", "diffsynth", "diffusers", "peft", "transformers", "safetensors")
    return {
        "command": " ".join(["python scripts/compare_loaders.py", *sys.argv[1:]]),
        "commit": (git("rev-parse", "--short", "HEAD") or "unknown") + changed,
        "date": datetime.date.today().isoformat(),
        "machine": f"{cpu}, CPU only, float32",
        "versions": ", ".join(f"{name} {known}" for name in packages if (known := installed(name))),
    }


def installed(package: str) -> str:
    """Version of a package; empty where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def write_page(page: Path, content: str) -> None:
    """Replace what is between the markers of a page, or start a page."""
    section = f"{BEGIN}\n{content}\n{END}"
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and not end:
        sys.exit(f"{page}: the marker {END} is missing; put it back where the table ends.")
    temporary = page.with_suffix(".tmp")
    temporary.write_text(before + section + (after if begin else "\n"), encoding="utf-8")
    temporary.replace(page)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", help="files whose name holds this text")
    parser.add_argument("--out", type=Path, help="page whose marked section is replaced")
    return parser.parse_args()


def main() -> None:
    args = parsed()
    torch.set_grad_enabled(False)
    chosen = [entry for entry in entries() if args.only in entry.case.name]
    others = [name for name in FAMILY_CASES if args.only in name]
    if not chosen and not others:
        sys.exit(f"No file is called anything with {args.only!r}; leave out --only to compare all.")
    found, missing = loaders()
    if missing:
        print(missing, file=sys.stderr)
    rows = []
    for entry in chosen:
        rows.append(compared(entry, found))
        print(f"{entry.case.name} done", file=sys.stderr, flush=True)
    rows += [family_row(name, found) for name in others]
    facts, counts = provenance(), summary(rows, found)
    stated = "; ".join(f"{name} {value}" for name, value in facts.items() if name != "command")
    content = "\n\n".join(
        [f"`{facts['command']}`; {stated}", summary_table(counts), table(rows, found)]
    )
    print(content)
    if args.out:
        write_page(args.out, content)
    print(json.dumps({"facts": facts, "summary": counts, "rows": rows}))


if __name__ == "__main__":
    main()
