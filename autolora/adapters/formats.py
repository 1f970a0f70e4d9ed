"""The file formats of FLUX.1 LoRAs, as tables.

A key is a prefix, a module path and a suffix: ``transformer.`` + ``transformer_blocks.3.attn.to_q``
+ ``.lora_A.weight``. A `Naming` translates module paths of one code base to canonical layers; a
`Format` is a naming with the prefixes and spelling that a program writes. A new format is one entry
in `FORMATS`, with a new naming only where module paths are new.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from autolora.flux.layers import LAYER_TYPES, parse_layer

Role = Literal["A", "B", "alpha"]


@dataclass(frozen=True)
class Target:
    """Where a module path leads.

    Attributes:
        layer: Canonical layer name, with ``{i}`` for the block in a naming's table.
        slices: Output slices that its rows stand for, in order; empty for all rows as they are.
    """

    layer: str
    slices: tuple[str, ...] = ()


@dataclass(frozen=True)
class KeyMatch:
    """A key that names a factor, or the alpha, of a canonical layer.

    Attributes:
        key: The key in the file.
        format: Format that knows the key.
        target: Canonical layer and slices.
        role: Which factor it is.
        prefix: The format's prefix that the key has.
        path: Module path between prefix and suffix.
        adapter: PEFT adapter name in the key, if any.
    """

    key: str
    format: "Format"
    target: Target
    role: Role
    prefix: str
    path: str
    adapter: str | None


Naming = Mapping[str, Target]


def _naming(rows: str) -> Naming:
    """Read a table of ``foreign path, canonical name, [slices]`` with ``{i}`` for the block."""
    table: dict[str, Target] = {}
    for row in rows.split("\n"):
        if row.strip():
            foreign, layer, *slices = row.split()
            table[foreign] = Target(layer, tuple(slices))
    return table


BFL = _naming("""
    double_blocks.{i}.img_attn.qkv     blocks.{i}.attn.a_to_qkv
    double_blocks.{i}.txt_attn.qkv     blocks.{i}.attn.b_to_qkv
    double_blocks.{i}.img_attn.proj    blocks.{i}.attn.a_to_out
    double_blocks.{i}.txt_attn.proj    blocks.{i}.attn.b_to_out
    double_blocks.{i}.img_mlp.0        blocks.{i}.ff_a.0
    double_blocks.{i}.img_mlp.2        blocks.{i}.ff_a.2
    double_blocks.{i}.txt_mlp.0        blocks.{i}.ff_b.0
    double_blocks.{i}.txt_mlp.2        blocks.{i}.ff_b.2
    double_blocks.{i}.img_mod.lin      blocks.{i}.norm1_a.linear
    double_blocks.{i}.txt_mod.lin      blocks.{i}.norm1_b.linear
    single_blocks.{i}.linear1          single_blocks.{i}.to_qkv_mlp
    single_blocks.{i}.linear2          single_blocks.{i}.proj_out
    single_blocks.{i}.modulation.lin   single_blocks.{i}.norm.linear
    img_in                             x_embedder
    txt_in                             context_embedder
    time_in.in_layer                   time_embedder.timestep_embedder.0
    time_in.out_layer                  time_embedder.timestep_embedder.2
    guidance_in.in_layer               guidance_embedder.timestep_embedder.0
    guidance_in.out_layer              guidance_embedder.timestep_embedder.2
    vector_in.in_layer                 pooled_text_embedder.0
    vector_in.out_layer                pooled_text_embedder.2
    final_layer.linear                 final_proj_out
    final_layer.adaLN_modulation.1     final_norm_out.linear
""")
"""Module paths of Black Forest Labs' reference code: fused q/k/v, as the canonical layers are."""

DIFFUSERS = _naming("""
    transformer_blocks.{i}.attn.to_q              blocks.{i}.attn.a_to_qkv  q
    transformer_blocks.{i}.attn.to_k              blocks.{i}.attn.a_to_qkv  k
    transformer_blocks.{i}.attn.to_v              blocks.{i}.attn.a_to_qkv  v
    transformer_blocks.{i}.attn.add_q_proj        blocks.{i}.attn.b_to_qkv  q
    transformer_blocks.{i}.attn.add_k_proj        blocks.{i}.attn.b_to_qkv  k
    transformer_blocks.{i}.attn.add_v_proj        blocks.{i}.attn.b_to_qkv  v
    transformer_blocks.{i}.attn.to_out.0          blocks.{i}.attn.a_to_out
    transformer_blocks.{i}.attn.to_add_out        blocks.{i}.attn.b_to_out
    transformer_blocks.{i}.ff.net.0.proj          blocks.{i}.ff_a.0
    transformer_blocks.{i}.ff.net.2               blocks.{i}.ff_a.2
    transformer_blocks.{i}.ff_context.net.0.proj  blocks.{i}.ff_b.0
    transformer_blocks.{i}.ff_context.net.2       blocks.{i}.ff_b.2
    transformer_blocks.{i}.norm1.linear           blocks.{i}.norm1_a.linear
    transformer_blocks.{i}.norm1_context.linear   blocks.{i}.norm1_b.linear
    single_transformer_blocks.{i}.attn.to_q       single_blocks.{i}.to_qkv_mlp  q
    single_transformer_blocks.{i}.attn.to_k       single_blocks.{i}.to_qkv_mlp  k
    single_transformer_blocks.{i}.attn.to_v       single_blocks.{i}.to_qkv_mlp  v
    single_transformer_blocks.{i}.proj_mlp        single_blocks.{i}.to_qkv_mlp  mlp
    single_transformer_blocks.{i}.proj_out        single_blocks.{i}.proj_out
    single_transformer_blocks.{i}.norm.linear     single_blocks.{i}.norm.linear
    x_embedder                                    x_embedder
    context_embedder                              context_embedder
    time_text_embed.timestep_embedder.linear_1    time_embedder.timestep_embedder.0
    time_text_embed.timestep_embedder.linear_2    time_embedder.timestep_embedder.2
    time_text_embed.guidance_embedder.linear_1    guidance_embedder.timestep_embedder.0
    time_text_embed.guidance_embedder.linear_2    guidance_embedder.timestep_embedder.2
    time_text_embed.text_embedder.linear_1        pooled_text_embedder.0
    time_text_embed.text_embedder.linear_2        pooled_text_embedder.2
    proj_out                                      final_proj_out
    norm_out.linear                               final_norm_out.linear  scale shift
""")
"""Module paths of diffusers' FluxTransformer2DModel: split q/k/v, and ``norm_out`` scale first."""

DIFFSYNTH: Naming = {template: Target(template) for template in LAYER_TYPES}
"""The canonical names themselves."""


@dataclass(frozen=True)
class Format:
    """One file format.

    Attributes:
        name: Short name, as reports show it and `save_lora` takes it.
        naming: Table of module paths.
        prefixes: What may stand before the module path.
        joint: What joins the parts of a module path.
        factor_names: Spelling of A and B that the writing programs use.
        peft_header: Whether alpha may be in a PEFT configuration instead of tensors.
    """

    name: str
    naming: Naming
    prefixes: tuple[str, ...]
    joint: str = "."
    factor_names: tuple[str, str] = ("lora_A", "lora_B")
    peft_header: bool = False

    @cached_property
    def _targets(self) -> Naming:
        return {path.replace(".", self.joint): target for path, target in self.naming.items()}

    def locate(self, path: str) -> tuple[str, str, Target] | None:
        """Find the layer that a key's module path names.

        Args:
            path: The key without its suffix.

        Returns:
            Prefix, path without it, and target; None when this format does not know the path.
        """
        for prefix in self.prefixes:
            if path.startswith(prefix):
                inner = path[len(prefix) :]
                found = _BLOCK_INDEX.search(inner)
                span = found.span() if found else (0, 0)
                template = f"{inner[: span[0]]}{{i}}{inner[span[1] :]}" if found else inner
                target = self._targets.get(template)
                if target is not None and (found is not None) == ("{i}" in template):
                    index = found.group() if found else ""
                    layer = target.layer.replace("{i}", index)
                    return prefix, inner, Target(layer, target.slices)
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


FORMATS: tuple[Format, ...] = (
    Format("kohya", BFL, ("lora_unet_",), joint="_", factor_names=("lora_down", "lora_up")),
    Format(
        "diffusers",
        DIFFUSERS,
        ("transformer.", "base_model.model.transformer.", "base_model.model.", ""),
        peft_header=True,
    ),
    Format("ai-toolkit", BFL, ("diffusion_model.",)),
    Format("diffsynth", DIFFSYNTH, ("", "dit.", "pipe.dit.")),
)
"""Every format that is read, in the order in which a key is tried."""

_BLOCK_INDEX = re.compile(r"(?<=blocks[._])(?:0|[1-9]\d{0,5})(?=[._])", re.ASCII)

_FACTOR = re.compile(
    r"(?P<path>.+)\.lora[_.](?P<role>A|B|down|up)(?:\.(?P<adapter>[^.]+))?\.weight", re.DOTALL
)
_ALPHA = re.compile(r"(?P<path>.+)\.alpha", re.DOTALL)
_ROLES: Mapping[str, Role] = {"A": "A", "down": "A", "B": "B", "up": "B"}


def match_keys(keys: Iterable[str]) -> dict[str, KeyMatch]:
    """Find what the keys of a file are.

    Some module paths belong to several formats; they are read in the one that knows most of the
    file's keys.

    Args:
        keys: All keys of a file.

    Returns:
        Layer and role by key; keys that no format knows are left out.
    """
    candidates = {key: matches for key in keys if (matches := _candidates(key))}
    known = Counter(match.format.name for matches in candidates.values() for match in matches)
    return {
        key: max(matches, key=lambda match: known[match.format.name])
        for key, matches in candidates.items()
    }


def _candidates(key: str) -> list[KeyMatch]:
    """What a key is in each format that knows it, in the order of the table."""
    role: Role = "alpha"
    adapter = None
    if found := _FACTOR.fullmatch(key):
        role, adapter = _ROLES[found["role"]], found["adapter"]
    elif not (found := _ALPHA.fullmatch(key)):
        return []
    matches: list[KeyMatch] = []
    for entry in FORMATS:
        if located := entry.locate(found["path"]):
            prefix, path, target = located
            matches.append(KeyMatch(key, entry, target, role, prefix, path, adapter))
    return matches


def format_named(name: str) -> Format | None:
    """Look up a format.

    Args:
        name: Its short name.

    Returns:
        The table entry, or None.
    """
    return next((entry for entry in FORMATS if entry.name == name), None)
