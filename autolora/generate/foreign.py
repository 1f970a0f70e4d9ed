"""Settings in pictures that other programs made: A1111, Forge, ComfyUI, SwarmUI, InvokeAI, Fooocus.

`read_found` says what a picture's texts hold, in one form for all programs; `take_over` turns it
into what can be asked for here, with its LoRAs matched to the pool. See docs/compatibility.md.
Nothing here needs torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from autolora.config import PipelineConfig, guidance_problem, size_problem, steps_problem
from autolora.errors import GenerationError, shown
from autolora.generate.comfy import WORKFLOW_CHUNK, how_made, read_workflow
from autolora.generate.picture_texts import PARAMETERS_CHUNK
from autolora.infotext import Parameters, json_value, read_parameters
from autolora.lora import Pool
from autolora.lora.fields import finite_number, mapping
from autolora.lora.hashes import clean_hash, find_by_hash, has_hash
from autolora.lora.names import parameter_name, plain_path
from autolora.prompt_syntax import escape, parse_prompt, plain_text
from autolora.request import MAX_SEED
from autolora.unit import MAX_STRENGTH, LoRAUnit

_LORA_KINDS = frozenset({"lora", "lycoris", "locon", "loha", "lokr", "dora"})
_PAIR = re.compile(r"\s*(.+?):\s*([0-9a-fA-F]{8,64})(?::\s*(-?[\d.]+))?\s*(?:,|$)")
_WEIGHTED = re.compile(r"\s*(.+?)\s*:\s*(-?\d*\.?\d+)\s*(?:,|$)")
_MAX_LORAS = 64


@dataclass(frozen=True)
class FoundLoRA:
    """A LoRA that a picture names.

    Attributes:
        name: As it stands there: a file, a path or a title.
        strength: Its strength, where that is said.
        hashes: Beginnings of SHA-256 hashes that it is known by.
    """

    name: str
    strength: float | None = None
    hashes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """What a picture says about how it was made, by whichever program.

    Attributes:
        program: Its name.
        prompt: The prompt as it stands there.
        negative_prompt: What the picture was not to show.
        seed: Seed of the noise.
        steps: Denoising steps.
        width: Pixels.
        height: Pixels.
        guidance: Guidance scale, the distilled one where there are two.
        loras: What took part.
        settings: Everything else, as text by name.
    """

    program: str
    prompt: str = ""
    negative_prompt: str = ""
    seed: int | None = None
    steps: int | None = None
    width: int | None = None
    height: int | None = None
    guidance: float | None = None
    loras: tuple[FoundLoRA, ...] = ()
    settings: dict[str, str] = field(default_factory=dict)


def read_found(texts: Mapping[str, str]) -> Found | None:
    """Read the settings in the texts of a picture.

    Args:
        texts: Of `autolora.generate.picture_texts.read_texts`.

    Returns:
        What they say, or None where they say nothing that is understood.
    """
    for name in ("invokeai_metadata", "sd-metadata"):
        if data := mapping(json_value(texts.get(name))):
            return _invokeai(data)
    parameters = texts.get(PARAMETERS_CHUNK, "")
    if data := mapping(json_value(parameters)):
        if swarm := mapping(data.get("sui_image_params")):
            return _swarmui(swarm, data)
        return _fooocus(data)
    found = _a1111(read_parameters(parameters)) if parameters.strip() else None
    nodes = read_workflow(texts.get(WORKFLOW_CHUNK, ""))
    if nodes and (found is None or not found.settings):
        made = how_made(nodes)
        loras = tuple(FoundLoRA(name, strength) for name, strength in made.loras)
        numbers = _numbers(made.values)
        return Found("ComfyUI", made.prompt, made.negative_prompt, **numbers, loras=loras)
    return found


def found_in_text(text: str) -> Found:
    """Read generation parameters that somebody pasted."""
    return _a1111(read_parameters(text))


def found_in_parameters(parameters: Parameters) -> Found:
    """Take settings from generation parameters of A1111's kind."""
    return _a1111(parameters)


# Programs


def _a1111(parameters: Parameters) -> Found:
    settings = dict(parameters.settings)
    width, _, height = settings.get("Size", "").lower().partition("x")
    values = {
        "seed": settings.get("Seed"),
        "steps": settings.get("Steps"),
        "guidance": settings.get("Distilled CFG Scale") or settings.get("CFG scale"),
        "width": width.strip(),
        "height": height.strip(),
    }
    prompt, negative = parameters.prompt, parameters.negative_prompt
    if settings.get("Raw prompt"):  # Fooocus: the prompt before its styles
        prompt, negative = settings["Raw prompt"], settings.get("Raw negative prompt", negative)
    loras = _with_hashes(_tagged(prompt), settings)
    rest = {
        name: value
        for name, value in settings.items()
        if name not in ("Seed", "Steps", "CFG scale", "Distilled CFG Scale", "Size")
    }
    return Found(
        _program(settings), prompt, negative, **_numbers(values), loras=loras, settings=rest
    )


def _program(settings: Mapping[str, str]) -> str:
    version = settings.get("Version", "")
    if "Civitai resources" in settings:
        return "Civitai"
    for start, name in (
        ("f", "Forge"),
        ("neo", "Forge"),
        ("Fooocus", "Fooocus"),
        ("ComfyUI", "ComfyUI"),
    ):
        if version.startswith(start):
            return name
    return "A1111" if version.startswith("v") or not version else version


def _swarmui(values: Mapping[str, Any], data: Mapping[str, Any]) -> Found:
    names, weights = (_listed(values.get(key)) for key in ("loras", "loraweights"))
    known: dict[str, str] = {}
    models = data.get("sui_models")
    for model in models if isinstance(models, list) else ():
        if digits := clean_hash(mapping(model).get("hash")):
            known[plain_path(str(mapping(model).get("name", "")))] = digits
    loras = []
    for position, name in enumerate(names[:_MAX_LORAS]):
        digits = known.get(plain_path(name), "")
        strength = finite_number(weights[position]) if position < len(weights) else None
        loras.append(FoundLoRA(name, strength, (digits,) if digits else ()))
    guidance = values.get("fluxguidancescale") or values.get("cfgscale")
    prompt, negative = (_text(values.get(key)) for key in ("prompt", "negativeprompt"))
    kept = ("prompt", "negativeprompt", "loras", "loraweights", *_NUMBER_NAMES)
    return Found(
        "SwarmUI",
        prompt,
        negative,
        **_numbers({**values, "guidance": guidance}),
        loras=_merged([*loras, *_tagged(prompt)]),
        settings=_rest(values, kept),
    )


def _fooocus(data: Mapping[str, Any]) -> Found | None:
    """Read Fooocus' own scheme, and that of its kin with capital letters."""
    values = {str(name).lower().replace(" ", "_"): value for name, value in data.items()}
    prompt = _text(values.get("prompt"))
    if not prompt and "steps" not in values:
        return None
    size = re.findall(r"\d{1,6}", _text(values.get("resolution")))
    width, height = size[:2] if len(size) >= 2 else (values.get("width"), values.get("height"))
    loras = [_fooocus_lora(entry) for entry in _items(values.get("loras"))]
    for name, value in values.items():
        if re.fullmatch(r"lora_(?:combined_)?\d+", name) and isinstance(value, str):
            parts = value.split(" : ")
            if len(parts) > 1 and parts[0] != "False":
                loras.append(FoundLoRA(parts[-2], finite_number(parts[-1])))
    negative = _text(values.get("negative_prompt", values.get("negative")))
    guidance = values.get("guidance_scale", values.get("cfg"))
    numbers = _numbers({**values, "width": width, "height": height, "guidance": guidance})
    kept = ("prompt", "negative_prompt", "negative", "loras", "resolution", *_NUMBER_NAMES)
    found = _merged(lora for lora in loras if lora is not None and lora.name != "None")
    program = _text(values.get("software")) or "Fooocus"
    return Found(program, prompt, negative, **numbers, loras=found, settings=_rest(values, kept))


def _fooocus_lora(entry: object) -> FoundLoRA | None:
    """Read ``[name, strength, hash]``, or ``[hash, "strength - name"]`` of RuinedFooocus."""
    if not isinstance(entry, list) or len(entry) < 2 or not isinstance(entry[0], str):
        return None
    digits = tuple(filter(None, (clean_hash(value) for value in entry[2:3])))
    if finite_number(entry[1]) is None:
        strength, _, name = str(entry[1]).partition(" - ")
        digits = tuple(filter(None, (clean_hash(entry[0]),)))
        return FoundLoRA(name.strip(), finite_number(strength), digits) if name else None
    return FoundLoRA(entry[0], finite_number(entry[1]), digits)


def _invokeai(data: Mapping[str, Any]) -> Found:
    inner = mapping(data.get("image")) or data
    guidance = inner.get("guidance", inner.get("cfg_scale"))
    prompts = inner.get("positive_prompt", inner.get("prompt"))
    if isinstance(prompts, list):
        prompts = mapping(prompts[0]).get("prompt") if prompts else ""
    loras = []
    for entry in _items(inner.get("loras")):
        model = mapping(mapping(entry).get("model") or mapping(entry).get("lora"))
        name = model.get("name", model.get("model_name"))
        strength = finite_number(mapping(entry).get("weight"))
        # Its hashes are of BLAKE3, which says nothing here.
        if isinstance(name, str):
            loras.append(FoundLoRA(name, strength))
    kept = ("positive_prompt", "negative_prompt", "prompt", "loras", "cfg_scale", *_NUMBER_NAMES)
    return Found(
        "InvokeAI",
        _text(prompts),
        _text(inner.get("negative_prompt")),
        **_numbers({**inner, "guidance": guidance}),
        loras=_merged(loras),
        settings=_rest(inner, kept),
    )


_NUMBER_NAMES = ("seed", "steps", "width", "height", "guidance")


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """Seed, steps, size and guidance, where they are numbers."""
    numbers: dict[str, Any] = {name: _whole(values.get(name)) for name in _NUMBER_NAMES[:-1]}
    return {**numbers, "guidance": finite_number(values.get("guidance"))}


def _whole(value: object) -> int | None:
    """A whole number of at most 20 digits, from JSON or text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, int):
        return value if abs(value) < 10**20 else None
    found = re.fullmatch(r"\s*(-?[0-9]{1,20})(?:\.0*)?\s*", str(value))
    return int(found.group(1)) if found else None


def _text(value: object) -> str:
    return value.strip() if isinstance(value, str) else ""


def _items(value: object) -> list[Any]:
    return value[:_MAX_LORAS] if isinstance(value, list) else []


def _listed(value: object) -> list[str]:
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return [str(part) for part in value] if isinstance(value, list) else []


def _rest(values: Mapping[str, Any], kept: Iterable[str]) -> dict[str, str]:
    known = set(kept)
    return {
        str(name): value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in values.items()
        if name not in known and value not in (None, "", [], {})
    }


# LoRAs


def _tagged(prompt: str) -> list[FoundLoRA]:
    try:
        tags = parse_prompt(prompt).loras if prompt.strip() else ()
    except GenerationError:
        return []
    return [FoundLoRA(tag.name, tag.strength) for tag in tags]


def _with_hashes(tagged: list[FoundLoRA], settings: Mapping[str, str]) -> tuple[FoundLoRA, ...]:
    """Add what the settings say of hashes and strengths to what the tags name."""
    loras = list(tagged)
    for name, digits, strength in _PAIR.findall(settings.get("Lora hashes", "")):
        loras.append(FoundLoRA(name, finite_number(strength), (clean_hash(digits),)))
    hashes = mapping(json_value(settings.get("Hashes")))
    for key, value in hashes.items():
        kind, _, name = str(key).partition(":")
        if kind.lower() in _LORA_KINDS and name:
            digits = clean_hash(value)
            loras.append(FoundLoRA(name, None, (digits,) if digits else ()))
    for name, strength in _WEIGHTED.findall(settings.get("Lora weights", "")):
        loras.append(FoundLoRA(name, finite_number(strength)))
    return _with_resources(_merged(loras), json_value(settings.get("Civitai resources")))


def _with_resources(loras: tuple[FoundLoRA, ...], resources: object) -> tuple[FoundLoRA, ...]:
    """Add Civitai's list, which names the same LoRAs by their titles."""
    titled = []
    for entry in map(mapping, _items(resources)):
        kind = str(entry.get("type") or "").lower()
        address = re.match(r"urn:air:[^:]*:(\w+):", str(entry.get("air") or ""))
        if kind in _LORA_KINDS or (address and address.group(1).lower() in _LORA_KINDS):
            name = _text(entry.get("modelName")) or f"version {entry.get('modelVersionId', '?')}"
            digits = clean_hash(entry.get("hash"))
            weight = finite_number(entry.get("weight"))
            titled.append(FoundLoRA(name, weight, (digits,) if digits else ()))
    if loras and len(titled) == len(loras):
        # The same ones in the same order; the weights may stand only here.
        pairs = zip(loras, titled, strict=True)
        return tuple(
            replace(lora, strength=other.strength) if lora.strength is None else lora
            for lora, other in pairs
        )
    return loras if loras else _merged(titled)


def _merged(loras: Iterable[FoundLoRA]) -> tuple[FoundLoRA, ...]:
    """Join what is said of one name in several places."""
    merged: dict[str, FoundLoRA] = {}
    for lora in loras:
        key = parameter_name(plain_path(lora.name)).rpartition("/")[2].casefold()
        known = merged.get(key)
        if known is None:
            merged[key] = lora
            continue
        strength = lora.strength if known.strength is None else known.strength
        hashes = tuple(dict.fromkeys((*known.hashes, *lora.hashes)))
        merged[key] = replace(known, strength=strength, hashes=hashes)
    return tuple(merged.values())[:_MAX_LORAS]


# Taking over


@dataclass(frozen=True)
class Taken:
    """What of a picture's settings can be asked for here.

    Attributes:
        prompt: The prompt, escaped, without tags.
        negative_prompt: The negative prompt, escaped.
        seed: None, like the others, where it is not said or not possible here.
        steps: Denoising steps.
        size: Width and height in pixels.
        guidance: Guidance scale.
        loras: LoRAs of the pool with their strength.
        missing: Names of LoRAs that the pool does not have.
        notes: What is not as in the picture, one sentence each.
    """

    prompt: str
    negative_prompt: str
    seed: int | None
    steps: int | None
    size: tuple[int, int] | None
    guidance: float | None
    loras: tuple[LoRAUnit, ...]
    missing: tuple[str, ...]
    notes: tuple[str, ...]


def take_over(found: Found, pool: Pool | None, config: PipelineConfig | None = None) -> Taken:
    """Turn a picture's settings into what can be asked for here.

    Args:
        found: What the picture says.
        pool: The LoRAs that there are; None knows none.
        config: The base model, whose bounds sizes must be in.

    Returns:
        The settings, with notes on what could not be taken over.
    """
    notes: list[str] = []
    prompt, negative = _words(found, notes)
    loras, missing = match_loras(found.loras, pool, notes)
    size = None if found.width is None or found.height is None else (found.width, found.height)
    if size is not None and (problem := size_problem(*size)):
        notes.append(_not_taken("size", f"{size[0]}x{size[1]}", problem))
        size = None
    steps = _possible("number of steps", found.steps, steps_problem, notes)
    guidance = _possible("guidance", found.guidance, guidance_problem, notes)
    seed = found.seed
    if seed is not None and not 0 <= seed <= MAX_SEED:
        notes.append(_not_taken("seed", seed, f"it must be between 0 and {MAX_SEED}"))
        seed = None
    if missing:
        where = "the pool" if pool is not None else "a pool"
        notes.append(f"Not in {where}: {shown(', '.join(missing), 300)}.")
    if found.program != "AutoLoRA":
        notes.append(
            f"Made by {shown(found.program, 40)}: these settings give a like picture, not the same."
        )
    return Taken(prompt, negative, seed, steps, size, guidance, loras, missing, tuple(notes))


def _words(found: Found, notes: list[str]) -> tuple[str, str]:
    """The prompts without syntax, as far as they can be read."""
    prompt = negative = ""
    try:
        if found.prompt.strip():
            parsed = parse_prompt(found.prompt)
            prompt = parsed.text
            notes += parsed.notes
        negative, more = plain_text(found.negative_prompt, "The negative prompt")
        notes += more
    except GenerationError as error:
        notes.append(f"A prompt of the picture was not taken over: {error}")
    return escape(prompt), escape(negative)


def _possible(what: str, value: Any, check: Any, notes: list[str]) -> Any:
    if value is None or not (problem := check(value)):
        return value
    notes.append(_not_taken(what, value, problem))
    return None


def _not_taken(what: str, value: object, problem: str) -> str:
    return f"The picture's {what}, {shown(value, 40)}, was not taken over: {problem}."


def match_loras(
    loras: Iterable[FoundLoRA], pool: Pool | None, notes: list[str]
) -> tuple[tuple[LoRAUnit, ...], tuple[str, ...]]:
    """Find the LoRAs that a picture names in a pool: by hash, then by name, then by title.

    Args:
        loras: What the picture names.
        pool: The pool; None has nothing.
        notes: Receives what is not the same.

    Returns:
        What there is, each once, and the names of what is missing.
    """
    asked: dict[str, LoRAUnit] = {}
    missing: list[str] = []
    for lora in loras:
        name = None if pool is None else _match(lora, pool, notes)
        if name is None:
            missing.append(shown(lora.name, 80))
            continue
        strength = lora.strength
        if strength is not None and abs(strength) > MAX_STRENGTH:
            notes.append(_not_taken(f"strength of {shown(name, 60)}", f"{strength:g}", "too large"))
            strength = None
        asked.setdefault(name, LoRAUnit(name, strength))
    return tuple(asked.values()), tuple(missing)


def _match(lora: FoundLoRA, pool: Pool, notes: list[str]) -> str | None:
    named = pool.find(lora.name)
    for digits in lora.hashes:
        entry = find_by_hash(pool, digits, named)
        if entry is not None:
            return entry.name
    if not named:
        named = [
            entry for entry in pool if _title(pool, entry.name) == lora.name.casefold().strip()
        ]
    if len(named) != 1:
        if named:
            notes.append(
                f"{shown(lora.name, 80)} may be any of {len(named)} LoRAs; none was taken."
            )
        return None
    entry = named[0]
    if lora.hashes and not any(has_hash(entry, digits) for digits in lora.hashes):
        notes.append(f"{shown(entry.name, 80)} is another file than in the picture.")
    return entry.name


def _title(pool: Pool, name: str) -> str:
    return pool.metadata(name).title.casefold().strip()
