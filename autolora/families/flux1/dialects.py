"""Module paths of the code bases that LoRAs are trained in, translated to canonical layers.

One row is ``foreign path, canonical name, [slices]`` with ``{i}`` for the block. Slices name the
output rows that a module stands for, in the module's own order; none means all rows as they are.
Text encoders are translated to the module paths of DiffSynth's CLIP and T5.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from autolora.families.flux1.tables import LAYER_TYPES

Part = Literal["dit", "clip", "t5"]


@dataclass(frozen=True)
class Target:
    """Where a module path leads.

    Attributes:
        layer: Canonical layer name, with ``{i}`` for the block in a naming's table.
        slices: Output slices that its rows stand for, in order; empty for all rows as they are.
        part: The model that the layer is in: the transformer or one of the text encoders.
        is_norm: Whether it is a normalization layer, whose only weight is a vector.
    """

    layer: str
    slices: tuple[str, ...] = ()
    part: Part = "dit"
    is_norm: bool = False


Naming = Mapping[str, Target]


def _naming(rows: str, part: Part = "dit") -> Naming:
    table: dict[str, Target] = {}
    for row in rows.split("\n"):
        if row.strip():
            foreign, layer, *slices = row.split()
            is_norm = part == "dit" and layer not in LAYER_TYPES
            table[foreign] = Target(layer, tuple(slices), part, is_norm)
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
    double_blocks.{i}.img_attn.norm.query_norm  blocks.{i}.attn.norm_q_a
    double_blocks.{i}.img_attn.norm.key_norm    blocks.{i}.attn.norm_k_a
    double_blocks.{i}.txt_attn.norm.query_norm  blocks.{i}.attn.norm_q_b
    double_blocks.{i}.txt_attn.norm.key_norm    blocks.{i}.attn.norm_k_b
    single_blocks.{i}.norm.query_norm           single_blocks.{i}.norm_q_a
    single_blocks.{i}.norm.key_norm             single_blocks.{i}.norm_k_a
""")
"""Black Forest Labs' reference code: fused q/k/v, as the canonical layers are."""

_SPLIT_QKV = ("q", "k", "v")
_SPLIT_QKV_MLP = (*_SPLIT_QKV, "mlp")


def _split_fused(naming: Naming) -> Naming:
    """The same paths with a number for each part of a fused layer: ``qkv.0``, ``linear1.3``."""
    table: dict[str, Target] = {}
    for path, target in naming.items():
        if path.endswith((".qkv", ".linear1")):
            parts = _SPLIT_QKV if path.endswith(".qkv") else _SPLIT_QKV_MLP
            table |= {f"{path}.{n}": Target(target.layer, (part,)) for n, part in enumerate(parts)}
        else:
            table[path] = target
    return table


ONETRAINER_BFL = _split_fused(BFL)
"""OneTrainer's output for the reference code: its names, but q/k/v (and mlp) apart by number."""

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
    transformer_blocks.{i}.attn.norm_q            blocks.{i}.attn.norm_q_a
    transformer_blocks.{i}.attn.norm_k            blocks.{i}.attn.norm_k_a
    transformer_blocks.{i}.attn.norm_added_q      blocks.{i}.attn.norm_q_b
    transformer_blocks.{i}.attn.norm_added_k      blocks.{i}.attn.norm_k_b
    single_transformer_blocks.{i}.attn.norm_q     single_blocks.{i}.norm_q_a
    single_transformer_blocks.{i}.attn.norm_k     single_blocks.{i}.norm_k_a
""")
"""diffusers' FluxTransformer2DModel: split q/k/v, and ``norm_out`` with its scale rows first."""

XLABS = _naming("""
    double_blocks.{i}.processor.qkv_lora1   blocks.{i}.attn.a_to_qkv
    double_blocks.{i}.processor.qkv_lora2   blocks.{i}.attn.b_to_qkv
    double_blocks.{i}.processor.proj_lora1  blocks.{i}.attn.a_to_out
    double_blocks.{i}.processor.proj_lora2  blocks.{i}.attn.b_to_out
    single_blocks.{i}.processor.qkv_lora    single_blocks.{i}.to_qkv_mlp  q k v
    single_blocks.{i}.processor.proj_lora   single_blocks.{i}.proj_out
""")
"""XLabs' x-flux: attention processors of the reference code, 1 for the image and 2 for the text."""

_NORMS = """
    blocks.{i}.attn.norm_q_a   blocks.{i}.attn.norm_q_a
    blocks.{i}.attn.norm_k_a   blocks.{i}.attn.norm_k_a
    blocks.{i}.attn.norm_q_b   blocks.{i}.attn.norm_q_b
    blocks.{i}.attn.norm_k_b   blocks.{i}.attn.norm_k_b
    single_blocks.{i}.norm_q_a single_blocks.{i}.norm_q_a
    single_blocks.{i}.norm_k_a single_blocks.{i}.norm_k_a
"""
DIFFSYNTH: Naming = {template: Target(template) for template in LAYER_TYPES} | dict(_naming(_NORMS))
"""The canonical names themselves."""

_CLIP_LAYER = """
    {root}encoder.layers.{i}.self_attn.q_proj    encoders.{i}.attn.to_q
    {root}encoder.layers.{i}.self_attn.k_proj    encoders.{i}.attn.to_k
    {root}encoder.layers.{i}.self_attn.v_proj    encoders.{i}.attn.to_v
    {root}encoder.layers.{i}.self_attn.out_proj  encoders.{i}.attn.to_out
    {root}encoder.layers.{i}.mlp.fc1             encoders.{i}.fc1
    {root}encoder.layers.{i}.mlp.fc2             encoders.{i}.fc2
"""
CLIP = _naming("".join(_CLIP_LAYER.replace("{root}", r) for r in ("text_model.", "")), "clip")
"""transformers' CLIPTextModel, whose ``text_model`` level is gone since its version 5."""

T5: Naming = {
    path: Target(path, part="t5")
    for path in (
        *(f"encoder.block.{{i}}.layer.0.SelfAttention.{letter}" for letter in "qkvo"),
        *(f"encoder.block.{{i}}.layer.1.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")),
    )
}
"""transformers' T5EncoderModel, which DiffSynth uses as it is."""
