"""The file formats of FLUX.1 LoRAs, as tables.

A key is a prefix, a module path and a suffix: ``transformer.`` + ``transformer_blocks.3.attn.to_q``
+ ``.lora_A.weight``. A `Naming` translates module paths of one code base to canonical layers; a
`Format` is a naming with the prefixes and spelling that a program writes; a suffix says what the
tensor is, and is read alike in every format. A new format is one entry in `FORMATS`, with a new
naming only where module paths are new.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Literal

from autolora.families.flux1.dialects import (
    BFL,
    CLIP,
    DIFFSYNTH,
    DIFFUSERS,
    ONETRAINER_BFL,
    T5,
    XLABS,
    Naming,
    Target,
)
from autolora.families.flux1.tables import parse_layer

AlphaPlace = Literal["tensor", "optional tensor", "header", "nowhere"]


@dataclass(frozen=True)
class KeyMatch:
    """A key that names a tensor of a canonical layer.

    Attributes:
        key: The key in the file.
        format: Format that knows the key.
        target: Canonical layer and slices.
        role: What the tensor is: ``A``, ``B``, ``alpha``, ``bias`` (of B), ``magnitude``,
            ``diff``, ``diff_b``, or LyCORIS' name of a factor, such as ``lokr_w2_a``.
        prefix: The format's prefix that the key has.
        path: Module path between prefix and suffix.
        adapter: PEFT adapter name in the key, if any.
    """

    key: str
    format: "Format"
    target: Target
    role: str
    prefix: str
    path: str
    adapter: str | None


@dataclass(frozen=True)
class Format:
    """One file format.

    Attributes:
        name: Short name, as reports show it and `save_lora` takes it.
        naming: Table of module paths.
        prefixes: What may stand before the module path.
        joint: What joins the parts of a module path.
        factor_names: Spelling of A and B that the writing programs use.
        alpha: Where the writing programs put alpha.
    """

    name: str
    naming: Naming
    prefixes: tuple[str, ...]
    joint: str = "."
    factor_names: tuple[str, str] = ("lora_A", "lora_B")
    alpha: AlphaPlace = "nowhere"

    @cached_property
    def _targets(self) -> Naming:
        return {path.replace(".", self.joint): target for path, target in self.naming.items()}

    @property
    def reads_peft(self) -> bool:
        """Whether a PEFT configuration in the header, or beside the file, may hold its alpha."""
        return self.joint == "."

    def locate(self, template: str) -> tuple[str, str, Target] | None:
        """Find the kind of layer that a key's module path names.

        Args:
            template: The key without its suffix, with ``{i}`` for the block number.

        Returns:
            Prefix, template without it, and target of the table; None when this format does not
            know the path.
        """
        for prefix in self.prefixes:
            if template.startswith(prefix):
                inner = template[len(prefix) :]
                if (target := self._targets.get(inner)) is not None:
                    return prefix, inner, target
        return None

    def module_paths(self, layer: str) -> list[tuple[str, tuple[str, ...]]]:
        """Spell a canonical layer in this format, with the first of its prefixes.

        Args:
            layer: Canonical layer name.

        Returns:
            Module path and slices of each part that the format divides the layer into; empty when
            it has no name for the layer.
        """
        parsed = parse_layer(layer)
        if parsed is None:
            return []
        return [
            (self.prefixes[0] + path.replace("{i}", str(parsed.block)), target.slices)
            for path, target in self._targets.items()
            if target.layer == parsed.type.template
        ]


_KOHYA_NAMES = ("lora_down", "lora_up")

FORMATS: tuple[Format, ...] = (
    Format("kohya", BFL, ("lora_unet_",), "_", _KOHYA_NAMES, "tensor"),
    Format(
        "diffusers",
        DIFFUSERS,
        ("transformer.", "base_model.model.transformer.", "diffusion_model.", ""),
        alpha="header",
    ),
    Format("peft", DIFFUSERS, ("base_model.model.",)),
    Format(
        "ai-toolkit",
        BFL,
        ("diffusion_model.", "model.diffusion_model."),
        alpha="optional tensor",
    ),
    Format("fal", BFL, ("base_model.model.",)),
    Format("xlabs", XLABS, ("", "diffusion_model."), factor_names=("down", "up")),
    Format("onetrainer", DIFFUSERS, ("lora_transformer_",), "_", _KOHYA_NAMES, "tensor"),
    Format("onetrainer-bfl", ONETRAINER_BFL, ("transformer.",), ".", _KOHYA_NAMES, alpha="tensor"),
    Format("lycoris", DIFFUSERS, ("lycoris_", "lora_unet_"), "_", _KOHYA_NAMES, "tensor"),
    Format("lycoris-bfl", BFL, ("lycoris_",), "_", _KOHYA_NAMES, "tensor"),
    Format("bfl", BFL, ("", "transformer."), alpha="optional tensor"),
    Format("diffsynth", DIFFSYNTH, ("", "dit.", "pipe.dit.")),
)
"""Every format of transformer layers that is read, in the order in which a key is tried."""

_TE = ("lora_te1_", "lora_te2_", "lora_te3_", "lora_te_", "lycoris_te1_", "lycoris_te2_")
_TEXT_ENCODER = ("text_encoder.", "base_model.model.text_encoder.")
_TEXT_ENCODER_2 = ("text_encoder_2.", "base_model.model.text_encoder_2.")

TEXT_ENCODERS: tuple[Format, ...] = (
    Format("kohya CLIP", CLIP, _TE, "_"),
    Format("kohya T5", T5, _TE, "_"),
    Format("CLIP", CLIP, (*_TEXT_ENCODER, "text_encoders.clip_l.transformer.", "clip_l.")),
    Format("T5", T5, (*_TEXT_ENCODER_2, "text_encoders.t5xxl.transformer.", "t5xxl.")),
)
"""Text-encoder layers. kohya numbers T5 as 3 and OneTrainer as 2: the layer's name decides."""

# Where a path has its block number; the lookbehinds are the words that stand before one.
_BLOCK_INDEX = re.compile(
    r"(?:(?<=blocks[._])|(?<=layers[._])|(?<=block[._]))(?:0|[1-9]\d{0,5})(?=[._])", re.ASCII
)

_MAX_PATH = 256  # longest module path that is looked up, and remembered

_ADAPTER = r"(?:\.(?P<adapter>[^.]+))?"
_SUFFIXES: tuple[tuple[re.Pattern[str], str | None], ...] = tuple(
    (re.compile(rf"(?P<path>.+){suffix}", re.DOTALL), role)
    for suffix, role in (
        (rf"\.lora[_.](?P<role>A|B|down|up){_ADAPTER}\.weight", None),
        (r"\.alpha", "alpha"),
        (r"\.(?P<role>down|up)\.weight", None),
        (rf"\.lora[_.](?:B|up){_ADAPTER}\.bias", "bias"),
        (r"\.(?P<role>lokr_(?:w[12](?:_[ab])?|t[12])|hada_(?:w[12]_[ab]|t[12]))", None),
        (r"\.(?:dora_scale|magnitude)", "magnitude"),
        (
            r"\.lora_magnitude_vector(?:\.(?!weight$)(?P<adapter>[^.]+))?(?:\.weight)?",
            "magnitude",
        ),
        (r"\.(?:diff_b|b_norm|bias\.diff)", "diff_b"),
        (r"\.(?:weight|scale)\.diff", "diff"),
        (r"\.(?:diff|w_norm)", "diff"),
    )
)
_ROLES: Mapping[str, str] = {"down": "A", "up": "B"}


def match_keys(keys: Iterable[str]) -> dict[str, KeyMatch]:
    """Find what the keys of a file are.

    Some module paths belong to several formats; they are read in the one that knows most of the
    file's keys.

    Args:
        keys: All keys of a file.

    Returns:
        Layer and role by key; keys that no format knows are left out.
    """
    located: dict[str, list[tuple[Format, str, str, Target]]] = {}
    candidates: dict[str, list[KeyMatch]] = {}
    for key in keys:
        if (split := _split(key)) is not None:
            path, role, adapter = split
            if path not in located:
                located[path] = _locate(path)
            candidates[key] = [
                KeyMatch(key, entry, target, role, prefix, inner, adapter)
                for entry, prefix, inner, target in located[path]
                if role == "diff" or not target.is_norm
            ]
    known = Counter(match.format.name for matches in candidates.values() for match in matches)
    return {
        key: max(matches, key=lambda match: known[match.format.name])
        for key, matches in candidates.items()
        if matches
    }


def _split(key: str) -> tuple[str, str, str | None] | None:
    """Module path, role and adapter name of a key; None when its suffix is no known one."""
    for pattern, role in _SUFFIXES:
        if found := pattern.fullmatch(key):
            groups = found.groupdict()
            spelled = role or str(groups["role"])
            return found["path"], _ROLES.get(spelled, spelled), groups.get("adapter")
    return None


def _locate(path: str) -> list[tuple[Format, str, str, Target]]:
    """What a module path is in each format that knows it, in the order of the tables."""
    if "{i}" in path or len(path) > _MAX_PATH:
        return []
    found = _BLOCK_INDEX.search(path)
    if found is None:
        return list(_locate_template(path))
    start, end, index = found.start(), found.end(), found.group()
    return [
        (entry, prefix, inner.replace("{i}", index), _in_block(target, index))
        for entry, prefix, inner, target in _locate_template(f"{path[:start]}{{i}}{path[end:]}")
    ]


@lru_cache(maxsize=4096)
def _locate_template(template: str) -> tuple[tuple[Format, str, str, Target], ...]:
    """The same of a path with ``{i}``: a file has hundreds of paths, and few but for the number."""
    return tuple(
        (entry, *found)
        for entry in (*FORMATS, *TEXT_ENCODERS)
        if (found := entry.locate(template)) is not None
    )


@lru_cache(maxsize=4096)
def _in_block(target: Target, index: str) -> Target:
    return replace(target, layer=target.layer.replace("{i}", index))


def format_named(name: str) -> Format | None:
    """Look up a format.

    Args:
        name: Its short name.

    Returns:
        The table entry, or None.
    """
    return next((entry for entry in FORMATS if entry.name == name), None)
