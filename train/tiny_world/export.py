"""Writes the pools as people have them: mixed formats, covers, captions, scattered metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from autolora.families.tiny.pipeline import TinyFluxPipeline, assemble
from autolora.fusion import attach, detach
from autolora.lora import LoRA, save_lora
from train.tiny_world.captions import cover_captions, prompt
from train.tiny_world.checkpoint import progress
from train.tiny_world.compositions import (
    bare_name,
    describe,
    paint,
    paint_styled,
    plain_composition,
)
from train.tiny_world.loras import Job
from train.tiny_world.scenes import COLOURS
from train.tiny_world.subjects import Subject
from train.tiny_world.world import Split, WorldConfig

FORMATS = ("kohya", "diffusers", "ai-toolkit", "diffsynth")
# Where the words of a LoRA stand: in the header, in a sidecar of one of two kinds, or nowhere.
METADATA = ("header", "a1111", "civitai", "none")
COVER_STEPS, COVER_GUIDANCE = 20, 3.0


def write_json(path: Path, value: Any) -> None:
    """Writes JSON to a temporary file, then replaces ``path``."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def _words(job: Job) -> dict[str, Any]:
    kind = "style" if job.style else "subject"
    triggers = [job.concept]
    about = f"{job.concept} style" if job.style else f"draws {job.concept}"
    tags = [kind, *(job.style.words if job.style else ("emoji", "drawing"))]
    return {"title": job.concept.title(), "triggers": triggers, "about": about, "tags": tags}


def _header(job: Job, where: str, file_format: str) -> dict[str, Any]:
    """What the file's own header says; trainers write some of it even where nobody else did."""
    header: dict[str, Any] = {}
    if file_format == "kohya":
        header |= {"ss_network_module": "networks.lora_flux", "ss_base_model_version": "flux1"}
    if file_format == "ai-toolkit":
        header |= {"software": {"name": "ai-toolkit"}}
    if where == "header":
        words = _words(job)
        header |= {
            "modelspec.title": words["title"],
            "modelspec.trigger_phrase": ", ".join(words["triggers"]),
            "modelspec.description": words["about"],
            "modelspec.tags": ", ".join(words["tags"]),
            "modelspec.architecture": "flux-1-dev/lora",
        }
    return header


def _sidecar(job: Job, where: str, stem: Path) -> None:
    words = _words(job)
    if where == "a1111":
        content = {
            "description": words["about"],
            "sd version": "Flux",
            "activation text": ", ".join(words["triggers"]),
            "preferred weight": 1.0,
            "notes": "",
        }
        write_json(stem.with_name(stem.name + ".json"), content)
    elif where == "civitai":
        content = {
            "name": "v1.0",
            "baseModel": "Flux.1 D",
            "trainedWords": words["triggers"],
            "model": {"name": words["title"], "type": "LORA", "tags": words["tags"]},
            "description": words["about"],
        }
        write_json(stem.with_name(stem.name + ".civitai.info"), content)


def _cover_plan(
    job: Job, split: Split, config: WorldConfig
) -> Iterator[tuple[Subject, str, list[str]]]:
    """Subject, colour and three captions of each cover."""
    rng = np.random.default_rng((config.seed, job.seed, 9))
    colours = rng.permutation(list(COLOURS))
    for i in range(config.pool.covers):
        colour = str(colours[i])
        subject = job.subject or split.base[int(rng.integers(len(split.base)))]
        yield subject, colour, cover_captions(bare_name(subject), colour, rng, job.style)


def draw(pipe: TinyFluxPipeline, text: str, seed: int) -> Image.Image:
    """One picture at the trained size."""
    size = pipe.dit.config.size
    return pipe(
        text,
        cfg_scale=COVER_GUIDANCE,
        height=size,
        width=size,
        num_inference_steps=COVER_STEPS,
        seed=seed,
        t5_sequence_length=pipe.dit.config.text_length,
        progress_bar_cmd=lambda steps: steps,
    )


def export_pool(
    jobs: list[Job],
    loras: list[LoRA],
    modules: dict[str, Any],
    split: Split,
    config: WorldConfig,
    folder: Path,
) -> None:
    """Writes every LoRA in one of the four formats with covers, captions and metadata.

    Args:
        jobs: What each LoRA teaches.
        loras: The trained LoRAs, in the same order.
        modules: ``dit``, ``encoder`` and ``decoder`` of the tiny FLUX.
        split: The subjects.
        config: Of the world.
        folder: The pool's folder; existing files are replaced.
    """
    pipe = assemble(modules["dit"], modules["encoder"], modules["decoder"])
    folder.mkdir(parents=True, exist_ok=True)
    pairs = list(zip(jobs, loras, strict=True))
    for i, (job, lora) in enumerate(progress(pairs, "pool", total=len(pairs))):
        file_format = FORMATS[i % len(FORMATS)]
        where = METADATA[(i // len(FORMATS) + i) % len(METADATA)]
        factors = {layer: lora.factors(layer) for layer in lora.layers}
        alpha = (2.0, 4.0, 8.0)[i % 3] if file_format != "diffsynth" else None
        header = _header(job, where, file_format)
        save_lora(
            folder / f"{job.name}.safetensors",
            factors,
            file_format,
            alpha=alpha,
            metadata=header,
            dtype=torch.bfloat16,
        )
        _sidecar(job, where, folder / job.name)
        captions: dict[str, list[str]] = {}
        attach(pipe.dit, [(lora, 1.0)], strategy="sum")
        try:
            for n, (_, _, three) in enumerate(_cover_plan(job, split, config)):
                name = f"{job.name}.cover-{n}.png"
                draw(pipe, three[1], seed=n).save(folder / name, optimize=True)
                captions[name] = three
        finally:
            detach(pipe.dit)
        write_json(folder / f"{job.name}.captions.json", captions)


def _render_cover(
    job: Job, subject: Subject, colour: str, rng: np.random.Generator, size: int, file: Path
) -> None:
    """A cover of the larger pool: the drawing itself, since its covers only train."""
    what = plain_composition(subject, colour)
    picture = paint_styled(what, job.style, size, rng) if job.style else paint(what, size, rng)[0]
    Image.fromarray((picture * 255).astype(np.uint8)).save(file)


def write_extras(jobs: list[Job], split: Split, config: WorldConfig, folder: Path) -> None:
    """Writes covers, captions, concepts and recipes beside the LoRAs of a training pool.

    Covers are renders, not generated pictures. ``concepts.json`` says which concept each LoRA
    teaches. ``recipes.json`` lists pictures that a subject and a style make together, for training
    the gates.
    """
    present = {p.stem for p in folder.glob("*.safetensors")}
    jobs = [job for job in jobs if job.name in present]
    size = config.model.size
    for job in progress(jobs, "covers", total=len(jobs)):
        rng = np.random.default_rng((config.seed, job.seed, 10))
        captions = {}
        for n, (subject, colour, three) in enumerate(_cover_plan(job, split, config)):
            name = f"{job.name}.cover-{n}.png"
            _render_cover(job, subject, colour, rng, size, folder / name)
            captions[name] = three
        write_json(folder / f"{job.name}.captions.json", captions)
    write_json(folder / "concepts.json", {job.name: job.concept for job in jobs})
    _write_recipes(jobs, config, folder)


def _write_recipes(jobs: list[Job], config: WorldConfig, folder: Path) -> None:
    rng = np.random.default_rng((config.seed, 11))
    subjects, styles = [j for j in jobs if j.subject], [j for j in jobs if j.style]
    recipes: dict[str, Any] = {}
    (folder / "recipes").mkdir(exist_ok=True)
    for n in range(config.pool.recipes if subjects and styles else 0):
        subject = subjects[int(rng.integers(len(subjects)))]
        style = styles[int(rng.integers(len(styles)))]
        if subject.subject is None or style.style is None:
            continue
        colour = str(rng.choice(list(COLOURS)))
        name = f"recipes/{n:03d}.png"
        _render_cover(style, subject.subject, colour, rng, config.model.size, folder / name)
        captions = [
            describe(plain_composition(subject.subject, colour), rng, style.style),
            prompt(subject.concept, colour, style.concept),
        ]
        recipes[name] = {"loras": [subject.name, style.name], "captions": captions}
    write_json(folder / "recipes.json", recipes)
