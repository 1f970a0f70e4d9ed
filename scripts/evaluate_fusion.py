"""Compares strategies where several adapters are attached, some of them not wanted.

    python scripts/evaluate_fusion.py --only relevance
    python scripts/evaluate_fusion.py --quick --only interference --strategies sum gated autolora
    python scripts/evaluate_fusion.py --model tiny --out fusion.json

Adapters are those of the committed pool, which neither the shipped gates nor the threshold's two
constants were trained on picture by picture. `autolora` decides by responses alone here: that names
and trigger words stand in the prompt is not used. Rows:

* together: 1 to 3 wanted (subject; subject and style; two subjects; two subjects and a style);
* interference: 1 or 2 wanted among 1, 3, 8 and 20 others;
* strengths: 2 wanted and 1 other, scaled by 0.3 to 4 at random; and one adapter from 0 to 1.5;
* wrong: what the search likes best for prompts that no adapter fits;
* loss: the share of the gap between plain sum and wanted adapters alone that is closed, as mean
  squared difference of velocities, and the flow-matching loss over that of the wanted alone;
* cost: process time of a step over the bare step, interleaved;
* relevance: how well the relevance tells wanted from other adapters (area under the ROC curve).

Prints a table and, on the last line, the same as JSON. Shares have 95 % intervals (Wilson).
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from autolora import AutoLoRAPipeline, Pool
from autolora.config import load_config
from autolora.errors import ConfigError
from autolora.families.load import load_pipeline, quiet
from autolora.fusion import (
    GateBank,
    Response,
    Strategy,
    attached,
    get_strategy,
    load_gates,
    stepping,
    strategy_names,
)
from autolora.generate.relevance import Relevance, calibrate
from autolora.generate.reproduce import shipped_gate
from autolora.lora import LoRA
from train.flow import add_noise, predict_velocity
from train.lora import encode_text, guidance_input, load_picture
from train.tiny_world.captions import prompt
from train.tiny_world.compositions import bare_name
from train.tiny_world.evaluation import Case, Scorer, case, colours, pair_case
from train.tiny_world.export import draw
from train.tiny_world.probes import (
    JUDGE_FILE,
    PLAIN,
    PROBE_FILE,
    Judge,
    fit_feature_judge,
    labelled_renders,
    load_judge,
    through_autoencoder,
)
from train.tiny_world.styles import STYLES
from train.tiny_world.world import split_world

ROOT = Path(__file__).resolve().parents[1]
OTHERS = (1, 3, 8, 20)
SIZES = (0.3, 4.0)
SWEEP = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
ALONE = "wanted alone"
"""In place of a strategy: the plain sum of the wanted adapters, which nothing can beat."""

Strengths = dict[str, float]


def judges(fit: bool, pool: Pool, pipe: Any) -> dict[str, Judge]:
    """Whichever judges can be read, or one fitted now to the subjects and styles of the pool.

    Raises:
        ConfigError: None can be read, and none shall be fitted.
    """
    if fit:
        names = {s.slug for s in split_world().shipped} & set(pool.names)
        subjects = [s for s in split_world().shipped if s.slug in names]
        plain = labelled_renders(subjects, 12, 0)
        soft = through_autoencoder(plain, pipe.vae_encoder.float(), pipe.vae_decoder.float())
        pipe.vae_encoder.to(pipe.torch_dtype), pipe.vae_decoder.to(pipe.torch_dtype)
        parts = zip(vars(plain).values(), vars(soft).values(), strict=True)
        both = type(plain)(*(torch.cat(pair) for pair in parts))
        looks = [PLAIN, *(style.name for style in STYLES)]
        fitted = fit_feature_judge(both, ([s.name for s in subjects], looks), torch.device("cpu"))
        return {"fitted": fitted}
    found: dict[str, Judge] = {}
    for path in (PROBE_FILE, JUDGE_FILE):
        try:
            found[path.stem] = load_judge(path)
        except ConfigError as error:
            print(f"left out: {error}", file=sys.stderr)
    if not found:
        raise ConfigError("No judge can be read; build them, or fit one by --fit-judge.")
    return found


class Fuser:
    """Attaches adapters by any strategy, with all that the strategy wants to know."""

    def __init__(self, pipe: Any, pool: Pool, gates: GateBank | None) -> None:
        self.pipe, self.pool, self.gates = pipe, pool, gates
        self.relevance = Relevance(pipe, pipe.family.text_layer)
        self.model = pipe.family.model(pipe)

    def lora(self, name: str) -> LoRA:
        """An adapter of the pool."""
        return self.pool.load(name)

    def chosen(self, strategy: Strategy, text: str, strengths: Strengths) -> Strengths:
        """The strengths that act once the strategy has seen the prompt."""
        if not strategy.chooses:
            return strengths
        words = {name: self.relevance.of(self.lora(name), text) for name in strengths}
        kept = strategy.choose({n: None if w is None else Response(w) for n, w in words.items()})
        return {name: value if kept[name] else 0.0 for name, value in strengths.items()}

    @contextmanager
    def acting(self, name: str, text: str, strengths: Strengths) -> Iterator[None]:
        """Attach for the length of a ``with`` block."""
        strategy = get_strategy(name)
        acting = self.chosen(strategy, text, strengths)
        pairs = [(self.lora(lora), value) for lora, value in acting.items()]
        if strategy.calibrates:
            calibrate(self.pipe, strategy, pairs, {n: self.lora(n) for n in acting})
        with (
            attached(self.model, pairs, strategy, self.gates),
            stepping(self.pipe, self.model, strategy),
        ):
            yield

    def picture(self, name: str, text: str, strengths: Strengths, seed: int) -> Image.Image:
        """Draw a picture."""
        with self.acting(name, text, strengths):
            return draw(self.pipe, text, seed)


class Bed:
    """The rows about pictures."""

    def __init__(self, fuser: Fuser, scorer: Scorer, count: int) -> None:
        self.fuser, self.scorer, self.count = fuser, scorer, count
        names = set(fuser.pool.names)
        self.subjects = [s for s in split_world().shipped if s.slug in names]
        self.styles = [s for s in STYLES if s.slug in names]

    def wanted(self, number: int, seed: int = 2) -> list[Case]:
        """Cases with so many wanted adapters; 2 is a subject and a style."""
        rng = np.random.default_rng((seed, number))
        cases = []
        for colour in colours(self.count, seed):
            subject, other = (self.subjects[i] for i in rng.permutation(len(self.subjects))[:2])
            style = self.styles[int(rng.integers(len(self.styles)))]
            if number == 1:
                cases.append(case(subject, colour, adapters=[subject.slug]))
            elif number == 2:
                names = [subject.slug, style.slug]
                cases.append(case(subject, colour, style.name, names))
            else:
                pair = pair_case(subject, other, [subject.slug, other.slug])
                text = f"{pair.text}, {style.name} style"
                names = (*pair.adapters, style.slug)
                cases.append(Case(text, pair.subjects, style.name, names))
        return cases

    def side_by_side(self) -> list[Case]:
        """Two subjects beside each other."""
        rng = np.random.default_rng(3)
        order = [self.subjects[i] for i in rng.permutation(len(self.subjects))][: self.count + 1]
        pairs = itertools.pairwise(order)
        return [pair_case(a, b, [a.slug, b.slug]) for a, b in pairs]

    def others(self, one: Case, number: int, seed: int) -> list[str]:
        """Adapters that a case does not ask for."""
        rng = np.random.default_rng((7, seed))
        names = sorted(set(self.fuser.pool.names) - set(one.adapters))
        return [names[i] for i in rng.permutation(len(names))[:number]]

    def run(
        self, cases: Sequence[Case], strategy: str, strengths: Callable[[Case, int], Strengths]
    ) -> dict[str, Any]:
        """Draw and judge one row."""

        def make(one: Case, seed: int) -> Image.Image:
            if strategy == ALONE:
                return self.fuser.picture("sum", one.text, dict.fromkeys(one.adapters, 1.0), seed)
            return self.fuser.picture(strategy, one.text, strengths(one, seed), seed)

        return self.scorer.judge_all(cases, make)

    def together(self, strategy: str) -> Iterator[tuple[str, Any]]:
        """Wanted adapters only."""
        kinds = {str(n): self.wanted(n) for n in (1, 2, 3)}
        kinds = {**kinds, "2 side by side": self.side_by_side()}
        for kind, cases in kinds.items():
            yield f"{kind} wanted", self.run(cases, strategy, lambda c, _: _all(c.adapters))

    def interference(
        self, strategy: str, wanted: Sequence[int], others: Sequence[int]
    ) -> Iterator[tuple[str, Any]]:
        """Wanted adapters among others."""
        for number in wanted:
            for count in others if strategy != ALONE else others[:1]:
                name = f"{number} wanted" + (f" + {count} others" if strategy != ALONE else "")
                yield (
                    name,
                    self.run(
                        self.wanted(number),
                        strategy,
                        lambda c, seed, n=count: _all((*c.adapters, *self.others(c, n, seed))),
                    ),
                )

    def strengths(self, strategy: str) -> Iterator[tuple[str, Any]]:
        """Adapters of very different size, and one from off to too much."""

        def unequal(one: Case, seed: int) -> Strengths:
            rng = np.random.default_rng((11, seed))
            names = (*one.adapters, *self.others(one, 1, seed))
            return {n: float(np.exp(rng.uniform(*np.log(SIZES)))) for n in names}

        yield "2 wanted + 1, unequal", self.run(self.wanted(2), strategy, unequal)
        for value in SWEEP:
            row = self.run(self.wanted(1), strategy, lambda c, _, v=value: _all(c.adapters, v))
            yield f"1 wanted at {value:g}", row

    def wrong(self, strategy: str) -> Iterator[tuple[str, Any]]:
        """What the search likes best where it should like nothing."""
        pipeline = AutoLoRAPipeline.from_config("tiny")
        found = []
        for subject, colour in zip(split_world().base, colours(9999, 5), strict=False):
            text = prompt(bare_name(subject), colour)
            hits = pipeline.search(text, 3)
            best = tuple(hit.name for hit in hits)
            found.append((hits[0].score, Case(text, (subject.name,), PLAIN, best)))
            if len(found) == 20 * self.count:
                break
        worst = sorted(found, key=lambda entry: -entry[0])[: max(4, len(found) // 20)]
        cases = [one for _, one in worst]
        yield "3 wrong ones", self.run(cases, strategy, lambda c, _: _all(c.adapters))


def _all(names: Sequence[str], value: float = 1.0) -> Strengths:
    return dict.fromkeys(names, value)


def _velocity(pipe: Any, noisy: Tensor, sigma: Tensor, texts: tuple[Tensor, Tensor]) -> Tensor:
    """The model's prediction with whatever is attached, float32."""
    inputs = (part.to(pipe.device, pipe.torch_dtype) for part in (noisy, sigma, *texts))
    extra = guidance_input(pipe.dit, 1, noisy.device)
    return predict_velocity(pipe.dit, *inputs, **extra).float()


@torch.no_grad()
def loss_rows(fuser: Fuser, bed: Bed, strategies: Sequence[str], count: int) -> dict[str, Any]:
    """Gap to the wanted adapters alone, on covers of the pool with 1 to 4 others attached.

    Strategies that act by step are left out: there are no steps here.
    """
    pipe, folder = fuser.pipe, fuser.pool.folder
    usable = [n for n in strategies if n != ALONE and not get_strategy(n).by_step]
    sums: dict[str, list[tuple[float, float]]] = {name: [] for name in ("sum", *usable)}
    generator = torch.Generator().manual_seed(0)
    rng = np.random.default_rng(13)
    for _ in range(count):
        name = str(rng.choice(sorted(fuser.pool.names)))
        cover, (_, text, *_) = next(
            iter(json.loads((folder / f"{name}.captions.json").read_text()).items())
        )
        image = pipe.preprocess_image(load_picture(folder / cover, pipe.dit.config.size))
        latents = pipe.vae_encoder(image.to(pipe.device, pipe.torch_dtype)).float()
        noise = torch.randn(latents.shape, generator=generator)
        sigma = torch.rand((1,), generator=generator)
        texts = encode_text(pipe, text, pipe.dit.config.text_length)
        velocity = partial(_velocity, pipe, add_noise(latents, noise, sigma), sigma, texts)
        one = Case(text, (), PLAIN, (name,))
        others = bed.others(one, 1 + int(rng.integers(4)), int(rng.integers(2**31)))
        with fuser.acting("sum", text, {name: 1.0}):
            teacher = velocity()
        own = float((teacher - (noise - latents)).pow(2).mean())
        for strategy, rows in sums.items():
            with fuser.acting(strategy, text, _all((name, *others))):
                found = velocity()
            gap = float((found - teacher).pow(2).mean())
            rows.append((gap, float((found - (noise - latents)).pow(2).mean()) / own))
    plain = float(np.mean([gap for gap, _ in sums["sum"]]))
    return {
        name: {
            "gap closed": round(1 - float(np.mean([g for g, _ in rows])) / plain, 3),
            "loss over wanted alone": round(float(np.mean([r for _, r in rows])), 3),
            "draws": len(rows),
        }
        for name, rows in sums.items()
    }


def cost_rows(fuser: Fuser, strategies: Sequence[str], rounds: int) -> dict[str, Any]:
    """Process time of a picture with three adapters over one with none, interleaved medians."""
    names = list(fuser.pool.names)[:3]
    ratios: dict[str, list[float]] = {name: [] for name in strategies if name != ALONE}
    for seed in range(rounds):
        times = {}
        for name in ("", *ratios):
            with fuser.acting(name or "sum", "a hill", _all(names if name else [])):
                started = time.process_time()
                draw(fuser.pipe, "a hill", seed)
                times[name] = time.process_time() - started
        for name, values in ratios.items():
            values.append(times[name] / times[""])
    return {name: round(float(np.median(values)), 3) for name, values in ratios.items()}


def relevance_rows(fuser: Fuser, bed: Bed, count: int) -> dict[str, Any]:
    """Areas under the ROC curve of the relevance of wanted against other adapters."""
    styles = {style.slug for style in bed.styles}
    bed = Bed(fuser, bed.scorer, count)
    cases = [*bed.wanted(1, 5)[: count // 4], *bed.wanted(2, 5)]
    scores: dict[tuple[str, bool], list[float]] = {}
    kept = {True: [0, 0], False: [0, 0]}
    strategy = get_strategy("autolora")
    for one in cases:
        found = {n: fuser.relevance.of(fuser.lora(n), one.text) for n in fuser.pool.names}
        for name, words in found.items():
            if words is None:
                continue
            wanted = name in one.adapters
            kind = "style" if name in styles else "subject"
            scores.setdefault((kind, wanted), []).append(max(words))
            alone = strategy.choose({name: Response(words)})[name]
            kept[wanted][0] += alone
            kept[wanted][1] += 1
    rows: dict[str, Any] = {"prompts": len(cases)}
    for kind in ("subject", "style"):
        yes, no = (np.array(scores[kind, wanted]) for wanted in (True, False))
        wins = (yes[:, None] > no[None]).mean() + 0.5 * (yes[:, None] == no[None]).mean()
        rows[kind] = {
            "auc": round(float(wins), 4),
            "wanted, 5 % and median": [round(float(np.quantile(yes, q)), 2) for q in (0.05, 0.5)],
            "others, median and 95 %": [round(float(np.quantile(no, q)), 2) for q in (0.5, 0.95)],
        }
    rows["kept, looked at one by one"] = {
        "wanted" if w else "others": round(right / max(1, total), 4)
        for w, (right, total) in kept.items()
    }
    return rows


ROWS = ("relevance", "together", "interference", "strengths", "wrong", "loss", "cost")


def rows_of(
    kind: str, bed: Bed, strategies: Sequence[str], args: argparse.Namespace
) -> Iterator[tuple[str, Any]]:
    """All rows of a kind by name, drawn one after the other."""
    if kind == "relevance":
        yield kind, relevance_rows(bed.fuser, bed, 24 if args.quick else 96)
    elif kind == "loss":
        yield kind, loss_rows(bed.fuser, bed, strategies, bed.count)
    elif kind == "cost":
        yield kind, cost_rows(bed.fuser, strategies, 2 if args.quick else 9)
    else:
        for strategy in strategies:
            if kind == "interference":
                found = bed.interference(strategy, args.wanted, args.others)
            else:
                found = getattr(bed, kind)(strategy)
            for name, row in found:
                yield f"{name}, {strategy}", row


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="configuration of the base model")
    parser.add_argument("--quick", action="store_true", help="few pictures, 0 to 3 others")
    parser.add_argument(
        "--pictures",
        type=int,
        help="pictures, or draws of the loss, per row (64, or 8 with --quick)",
    )
    parser.add_argument("--only", nargs="+", choices=ROWS, default=ROWS, help="which rows")
    parser.add_argument("--wanted", nargs="+", type=int, choices=(1, 2), default=(1, 2))
    parser.add_argument("--others", nargs="+", type=int, help="unwanted ones beside them")
    names = (ALONE, *strategy_names())
    parser.add_argument("--strategies", nargs="+", choices=names, default=names)
    parser.add_argument("--no-gates", action="store_true", help="leave trained gates out")
    parser.add_argument("--fit-judge", action="store_true", help="fit a judge to the pool now")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    args.others = args.others or (OTHERS[:2] if args.quick else OTHERS)
    return args


def main() -> None:
    """Run the bed and print its rows."""
    args = parse()
    config = load_config(args.model)
    with quiet():
        pipe = load_pipeline(config)
    pool = Pool(ROOT / "lora_pool" / "tiny")
    path = config.gate or shipped_gate(config)
    gates = None if path is None or args.no_gates else load_gates(path)
    pictures = {"together", "interference", "strengths", "wrong"} & set(args.only)
    looking = judges(args.fit_judge, pool, pipe) if pictures else {}
    fuser = Fuser(pipe, pool, gates)
    count = args.pictures or (8 if args.quick else 64)
    bed = Bed(fuser, Scorer(pipe, pool, looking, gates), count)
    rows: dict[str, Any] = {}
    for kind in args.only:
        for name, row in rows_of(kind, bed, args.strategies, args):
            rows[name] = row
            print(f"{name}: {row}", file=sys.stderr, flush=True)
    result = json.dumps({"model": args.model, "gates": gates is not None, "rows": rows})
    if args.out:
        args.out.write_text(result + "\n", encoding="utf-8")
    print(result)


if __name__ == "__main__":
    main()
