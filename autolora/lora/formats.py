"""The file formats of LoRAs: prefix x module names x suffix.

A key is a prefix, a module path and a suffix: ``transformer.`` + ``transformer_blocks.3.attn.to_q``
+ ``.lora_A.weight``. Prefixes are in `autolora.families.prefixes`, module paths in each family's
layer table, and suffixes here; every combination of the three is read. A `Format` only names the
combination that a program writes, for reports and for `save_lora`.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from autolora.errors import FamilyError, LoRAFormatError, shown
from autolora.families.detect import (
    Detection,
    Shape,
    choose,
    detect,
    is_published,
    layer_table,
    tables,
    text_layer,
    title,
)
from autolora.families.layers import CANONICAL, LayerTable, Module, Share, Spelling
from autolora.families.prefixes import FLAT, inner_paths
from autolora.safetensors_io import TensorInfo, read_header

AlphaPlace = Literal["tensor", "optional tensor", "header", "nowhere"]

DENOISER = "denoiser"
"""The part of a base model that adapters mainly change; other parts are text encoders."""

Part = str
"""`DENOISER`, or the name of a text encoder such as ``clip`` or ``t5``."""


@dataclass(frozen=True)
class KeyMatch:
    """A key that names a tensor of a canonical layer.

    Attributes:
        key: The key in the file.
        format: Name of the format.
        module: The layers that its module stands for.
        role: What the tensor is: ``A``, ``B``, ``mid``, ``alpha``, ``bias`` (of B), ``magnitude``,
            ``diff``, ``diff_b``, or LyCORIS' name of a factor, such as ``lokr_w2_a``.
        prefix: What stands before the module path.
        path: Module path between prefix and suffix.
        adapter: PEFT adapter name in the key, if any.
        part: The part of the base model that the layers are in.
    """

    key: str
    format: str
    module: Module
    role: str
    prefix: str
    path: str
    adapter: str | None
    part: Part = DENOISER

    @property
    def reads_peft(self) -> bool:
        """Whether a PEFT configuration in the header, or beside the file, may hold its alpha."""
        return not self.prefix.startswith(FLAT)


@dataclass(frozen=True)
class Format:
    """One file format, as programs write it.

    Attributes:
        name: Short name, as reports show it and `save_lora` takes it.
        dialect: Whose module paths; ``native`` is the one that trainers use for a family.
        prefix: What stands before the module path.
        joint: What joins the parts of a module path.
        factor_names: Spelling of A and B that the writing programs use.
        alpha: Where the writing programs put alpha.
    """

    name: str
    dialect: str
    prefix: str
    joint: str = "."
    factor_names: tuple[str, str] = ("lora_A", "lora_B")
    alpha: AlphaPlace = "nowhere"

    def dialect_of(self, table: LayerTable) -> str | None:
        """The dialect of a family's layer table; None where the family has no such names."""
        wanted = table.native if self.dialect == "native" else self.dialect
        if wanted == "diffusers" and wanted not in table.dialects:
            return CANONICAL
        return wanted if wanted in table.dialects else None

    def module_paths(
        self, table: LayerTable, layer: str
    ) -> list[tuple[str, Spelling, tuple[Share, ...]]]:
        """Spell a canonical layer in this format.

        Args:
            table: The family's layers.
            layer: Canonical layer name.

        Returns:
            Module path, this layer's place in it, and all layers that it holds, for each part
            that the format divides the layer into; empty when it has no name for the layer.
        """
        dialect = self.dialect_of(table)
        if dialect is None:
            return []
        prefix = self.prefix
        if prefix == "transformer." and table.unet:
            prefix = "unet."
        return [
            (prefix + path.replace(".", self.joint), spelling, shares)
            for path, spelling, shares in table.spell(layer, dialect)
        ]


_KOHYA_NAMES = ("lora_down", "lora_up")

FORMATS: tuple[Format, ...] = (
    Format("kohya", "native", "lora_unet_", "_", _KOHYA_NAMES, "tensor"),
    Format("diffusers", "diffusers", "transformer.", alpha="header"),
    Format("peft", "diffusers", "base_model.model."),
    Format("ai-toolkit", "native", "diffusion_model.", alpha="optional tensor"),
    Format("fal", "native", "base_model.model."),
    Format("xlabs", "xlabs", "", factor_names=("down", "up")),
    Format("onetrainer", "diffusers", "lora_transformer_", "_", _KOHYA_NAMES, "tensor"),
    Format("onetrainer-bfl", "onetrainer", "transformer.", ".", _KOHYA_NAMES, "tensor"),
    Format("lycoris", "diffusers", "lycoris_", "_", _KOHYA_NAMES, "tensor"),
    Format("lycoris-bfl", "native", "lycoris_", "_", _KOHYA_NAMES, "tensor"),
    Format("bfl", "native", "", alpha="optional tensor"),
    Format("diffsynth", CANONICAL, ""),
)
"""Every format that can be written."""

_TEXT_FORMATS: Mapping[str, str] = {"clip": "CLIP", "clip_g": "CLIP-G", "t5": "T5"}

_MAX_PATH = 256  # longest module path that is looked up, and remembered

_ADAPTER = r"(?:\.(?P<adapter>[^.]+))?"
_SUFFIXES: tuple[tuple[re.Pattern[str], str | None], ...] = tuple(
    (re.compile(rf"(?P<path>.+){suffix}", re.DOTALL), role)
    for suffix, role in (
        (rf"\.lora[_.](?P<role>A|B|down|up|mid){_ADAPTER}\.weight", None),
        (r"\.alpha", "alpha"),
        (r"\.lora_linear_layer\.(?P<role>down|up)\.weight", None),
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
_PROCESSOR = re.compile(r"\.processor\.(?:(to_[qkv])|(to_out))_lora$")


def split_key(key: str) -> tuple[str, str, str | None] | None:
    """Module path, role and adapter name of a key; None when its suffix is no known one."""
    for pattern, role in _SUFFIXES:
        if found := pattern.fullmatch(key):
            groups = found.groupdict()
            spelled = role or str(groups["role"])
            return _plain(found["path"]), _ROLES.get(spelled, spelled), groups.get("adapter")
    return None


def _plain(path: str) -> str:
    """A module path without the attention processor that old versions of diffusers put in."""
    found = _PROCESSOR.search(path)
    if found is None:
        return path
    return f"{path[: found.start()]}.{found[1] or 'to_out.0'}"


def match_keys(keys: Iterable[str], table: LayerTable) -> dict[str, KeyMatch]:
    """Find what the keys of a file are.

    Some module paths belong to several dialects; they are read in the one that knows most of the
    file's keys.

    Args:
        keys: All keys of a file.
        table: The layers of the family that it is for.

    Returns:
        Layers and role by key; keys that are unknown are left out.
    """
    located: dict[str, list[tuple[str, str, str, Module, Part]]] = {}
    candidates: dict[str, list[KeyMatch]] = {}
    for key in keys:
        split = split_key(key)
        if split is None:
            continue
        path, role, adapter = split
        if path not in located:
            located[path] = list(_locate(path, table))
        candidates[key] = [
            KeyMatch(key, name, module, role, prefix, inner, adapter, part)
            for name, prefix, inner, module, part in located[path]
            if role == "diff" or not module.shares[0].row.is_norm
        ]
    votes = Counter(
        dialect for found in candidates.values() for dialect in {m.module.dialect for m in found}
    )
    return {
        key: max(found, key=lambda match: votes[match.module.dialect])
        for key, found in candidates.items()
        if found
    }


def _locate(path: str, table: LayerTable) -> Iterator[tuple[str, str, str, Module, Part]]:
    """What a module path is in each dialect that knows it, with format, prefix and inner path."""
    if len(path) > _MAX_PATH:
        return
    seen = set()
    for prefix, inner in inner_paths(path):
        for module in table.find(inner):
            if module.dialect not in seen:
                seen.add(module.dialect)
                yield _format_name(table, module.dialect, prefix), prefix, inner, module, DENOISER
    if not seen and (found := text_layer(table.text_encoders, path)) is not None:
        encoder, prefix, inner, module = found
        spelled = _TEXT_FORMATS.get(encoder.name, encoder.name)
        name = f"kohya {spelled}" if prefix.endswith("_") else spelled
        yield name, prefix, inner, module, encoder.name


@lru_cache(maxsize=256)
def _format_name(table: LayerTable, dialect: str, prefix: str) -> str:
    """The name that people know a combination of dialect and prefix by."""
    native = dialect == table.native
    if dialect in ("xlabs", "onetrainer"):
        return {"onetrainer": "onetrainer-bfl"}.get(dialect, dialect)
    if prefix.startswith("lora_unet_"):
        return "kohya" if native else "lycoris"
    if prefix.startswith("lycoris_"):
        return "lycoris-bfl" if dialect == "original" else "lycoris"
    if prefix.startswith(FLAT):
        return "onetrainer"
    if dialect == CANONICAL and "diffusers" in table.dialects:
        return "diffsynth"
    if "diffusion_model." in prefix and native:
        return "ai-toolkit"
    if dialect == "original":
        return "fal" if "base_model." in prefix else "bfl"
    return "peft" if prefix == "base_model.model." else "diffusers"


def format_named(name: str) -> Format | None:
    """Look up a format.

    Args:
        name: Its short name.

    Returns:
        The table entry, or None.
    """
    return next((entry for entry in FORMATS if entry.name == name), None)


def detect_family(
    tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], wanted: str | None = None
) -> Detection:
    """Find the base-model family that a file is for, from its header alone.

    Args:
        tensors: Element type and shape by key.
        metadata: The header's text entries.
        wanted: Name of a family that is taken wherever names and sizes allow it.
    """
    return detect(module_shapes(tensors), metadata, wanted)


@dataclass(frozen=True)
class Description:
    """What a file's header tells of it.

    Attributes:
        family: Name of the base-model family; None where it is another model's or ambiguous.
        title: What to call the base model, or those that it may be; empty where nothing tells.
        format: Name of the file format; empty where the family is not known.
        problem: Why the file cannot be used, as a sentence; empty where nothing speaks against it.
    """

    family: str | None = None
    title: str = ""
    format: str = ""
    problem: str = ""


def describe(
    path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]
) -> Description:
    """Tell family and format of a file from its header, without reading its weights.

    Args:
        path: The file, for sentences.
        tensors: Element type and shape by key.
        metadata: The header's text entries.
    """
    found = settled(path, detect_family(tensors, metadata))
    if found.family is None:
        error = family_error(path, found)
        title_ = found.title or " or ".join(found.candidates)
        return Description(None, title_, "", "" if error is None else str(error))
    names = Counter(
        match.format for match in match_keys(tensors, layer_table(found.family)).values()
    )
    return Description(found.family, found.title, names.most_common(1)[0][0] if names else "")


def settled(path: Path, found: Detection) -> Detection:
    """Let the files beside a LoRA decide where its own names, sizes and header do not.

    Args:
        path: The file.
        found: What it may be for.

    Returns:
        The model that its user or a model page names, where that is one of several.
    """
    if not found.candidates:
        return found
    from autolora.lora.metadata import Metadata

    return choose(found, Metadata.read(path).base_model or "")


def describe_file(path: Path) -> Description:
    """Tell family and format of a file from its header.

    Args:
        path: The file; one that cannot be read is described by its problem.
    """
    try:
        header = read_header(path)
    except LoRAFormatError as error:
        return Description(problem=str(error))
    return describe(path, header.tensors, header.metadata)


def family_error(path: Path, found: Detection) -> FamilyError | None:
    """Say that a file is for a model that is not read, or may be for several.

    Args:
        path: The file.
        found: What it is for.

    Returns:
        The error; None where nothing tells what it is for, or a family does.
    """
    if found.candidates:
        listed = " or ".join(f"family={name!r}" for name in found.families)
        return FamilyError(
            f"{shown(path)} may be for {' or '.join(found.candidates)}, whose layers of these "
            f"names and sizes are alike; say which with {listed} (--family), or for good with "
            f"base_model in {shown(path.stem)}.autolora.yaml.",
            candidates=found.candidates,
            families=found.families,
        )
    if found.family is None and found.title:
        return FamilyError(
            f"{shown(path)} is an adapter for {found.title}, not for {supported_titles()}; "
            "use one made for one of these.",
            found.title,
        )
    return None


def supported_titles() -> str:
    """Titles of the families that people have adapters for, as part of a sentence."""
    *names, last = (title(name) for name in tables() if is_published(name))
    return f"{', '.join(names)} or {last}"


def module_shapes(tensors: Mapping[str, TensorInfo]) -> dict[str, Shape | None]:
    """The size of every module's weight change, as far as the shapes of its tensors show it.

    Args:
        tensors: Element type and shape by key.

    Returns:
        Output rows, and input channels times the kernel's height and width, by the module's path
        in the file, 0 for what does not show; None where nothing shows.
    """
    roles: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, info in tensors.items():
        split = split_key(key)
        if split is not None:
            path, role, _ = split
            roles.setdefault(path, {})[role] = info.shape
    return {
        path: _change_shape(found)
        for path, found in roles.items()
        if found.keys() - {"alpha", "magnitude"}
    }


def _change_shape(roles: Mapping[str, tuple[int, ...]]) -> Shape | None:
    def sides(shape: tuple[int, ...] | None) -> tuple[int, int]:
        return (shape[0], math.prod(shape[1:])) if shape else (0, 0)

    def matrix(name: str) -> tuple[int, int]:
        if name in roles:
            return sides(roles[name])
        a, b = sides(roles.get(f"{name}_a")), sides(roles.get(f"{name}_b"))
        core = roles.get(name.replace("_w", "_t"))
        return (a[0], b[1]) if core is None else (a[1], b[1] * math.prod(core[2:]))

    if "A" in roles or "B" in roles:
        kernel = math.prod(roles["mid"][2:]) if "mid" in roles else 1
        shape = (sides(roles.get("B"))[0], sides(roles.get("A"))[1] * kernel)
    elif any(role.startswith("lokr_") for role in roles):
        one, two = matrix("lokr_w1"), matrix("lokr_w2")
        shape = (one[0] * two[0], one[1] * two[1])
    elif any(role.startswith("hada_") for role in roles):
        shape = matrix("hada_w1")
    elif len(roles.get("diff", ())) > 1:
        shape = sides(roles["diff"])
    else:
        shape = (math.prod(roles.get("diff_b", roles.get("bias", (0,)))), 0)
    return shape if any(shape) else None
