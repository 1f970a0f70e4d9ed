"""The layers of FLUX.1, and what each training program calls them.

Canonical names are the module paths of DiffSynth's ``FluxDiT``. Facts: the reference code of Black
Forest Labs (fused q/k/v, ``linear1`` = q, k, v, mlp; ``adaLN_modulation`` shift before scale),
diffusers' ``FluxTransformer2DModel`` (split q/k/v, ``norm_out`` scale before shift), x-flux'
attention processors (1 = image, 2 = text).
"""

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Size:
    """Widths of a FLUX-like transformer: its linear layers follow from them."""

    width: int = 64
    double: int = 2
    single: int = 2
    channels: int = 16
    context: int = 40
    pooled: int = 24
    time: int = 32


SMALL = Size()
FLUX = Size(3072, 1, 1, 64, 4096, 768, 256)
"""The true widths, with one block of each kind."""


@dataclass(frozen=True)
class Module:
    """A linear layer of a training program.

    Attributes:
        path: Its module path there.
        layer: Canonical layer that it is, or is a part of.
        rows: Canonical output rows (start, stop) that its own rows are, in its order.
        inputs: Input features.
    """

    path: str
    layer: str
    rows: tuple[tuple[int, int], ...]
    inputs: int

    @property
    def outputs(self) -> int:
        return sum(stop - start for start, stop in self.rows)


def canonical_shapes(size: Size) -> dict[str, tuple[int, int]]:
    """Weight shapes ``(out, in)`` of all linear layers by canonical name."""
    d = size.width
    shapes: dict[str, tuple[int, int]] = {}
    for i in range(size.double):
        for stream in "ab":
            shapes |= {
                f"blocks.{i}.attn.{stream}_to_qkv": (3 * d, d),
                f"blocks.{i}.attn.{stream}_to_out": (d, d),
                f"blocks.{i}.ff_{stream}.0": (4 * d, d),
                f"blocks.{i}.ff_{stream}.2": (d, 4 * d),
                f"blocks.{i}.norm1_{stream}.linear": (6 * d, d),
            }
    for i in range(size.single):
        shapes |= {
            f"single_blocks.{i}.to_qkv_mlp": (7 * d, d),
            f"single_blocks.{i}.proj_out": (d, 5 * d),
            f"single_blocks.{i}.norm.linear": (3 * d, d),
        }
    for name in ("time", "guidance"):
        shapes[f"{name}_embedder.timestep_embedder.0"] = (d, size.time)
        shapes[f"{name}_embedder.timestep_embedder.2"] = (d, d)
    shapes |= {
        "pooled_text_embedder.0": (d, size.pooled),
        "pooled_text_embedder.2": (d, d),
        "context_embedder": (d, size.context),
        "x_embedder": (d, size.channels),
        "final_norm_out.linear": (2 * d, d),
        "final_proj_out": (size.channels, d),
    }
    return shapes


def _whole(size: Size, names: dict[str, str]) -> list[Module]:
    shapes = canonical_shapes(size)
    return [
        Module(path, layer, ((0, shapes[layer][0]),), shapes[layer][1])
        for path, layer in names.items()
    ]


def canonical(size: Size) -> list[Module]:
    """DiffSynth: the canonical names themselves."""
    return _whole(size, {layer: layer for layer in canonical_shapes(size)})


def bfl(size: Size) -> list[Module]:
    """The reference code, whose names kohya, ai-toolkit, ComfyUI and fal use."""
    names: dict[str, str] = {}
    for i in range(size.double):
        for stream, ours in (("img", "a"), ("txt", "b")):
            names |= {
                f"double_blocks.{i}.{stream}_attn.qkv": f"blocks.{i}.attn.{ours}_to_qkv",
                f"double_blocks.{i}.{stream}_attn.proj": f"blocks.{i}.attn.{ours}_to_out",
                f"double_blocks.{i}.{stream}_mlp.0": f"blocks.{i}.ff_{ours}.0",
                f"double_blocks.{i}.{stream}_mlp.2": f"blocks.{i}.ff_{ours}.2",
                f"double_blocks.{i}.{stream}_mod.lin": f"blocks.{i}.norm1_{ours}.linear",
            }
    for i in range(size.single):
        names |= {
            f"single_blocks.{i}.linear1": f"single_blocks.{i}.to_qkv_mlp",
            f"single_blocks.{i}.linear2": f"single_blocks.{i}.proj_out",
            f"single_blocks.{i}.modulation.lin": f"single_blocks.{i}.norm.linear",
        }
    for theirs, ours in (
        ("time_in", "time_embedder.timestep_embedder"),
        ("guidance_in", "guidance_embedder.timestep_embedder"),
        ("vector_in", "pooled_text_embedder"),
    ):
        names[f"{theirs}.in_layer"] = f"{ours}.0"
        names[f"{theirs}.out_layer"] = f"{ours}.2"
    names |= {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "final_layer.linear": "final_proj_out",
        "final_layer.adaLN_modulation.1": "final_norm_out.linear",
    }
    return _whole(size, names)


def diffusers(size: Size) -> list[Module]:
    """diffusers' transformer: q, k, v and the MLP apart, the last modulation turned around."""
    d = size.width
    names: dict[str, str] = {}
    parts: list[Module] = []
    for i in range(size.double):
        there, here = f"transformer_blocks.{i}", f"blocks.{i}"
        for n, letter in enumerate("qkv"):
            rows = ((n * d, (n + 1) * d),)
            parts.append(Module(f"{there}.attn.to_{letter}", f"{here}.attn.a_to_qkv", rows, d))
            parts.append(
                Module(f"{there}.attn.add_{letter}_proj", f"{here}.attn.b_to_qkv", rows, d)
            )
        names |= {
            f"{there}.attn.to_out.0": f"{here}.attn.a_to_out",
            f"{there}.attn.to_add_out": f"{here}.attn.b_to_out",
            f"{there}.ff.net.0.proj": f"{here}.ff_a.0",
            f"{there}.ff.net.2": f"{here}.ff_a.2",
            f"{there}.ff_context.net.0.proj": f"{here}.ff_b.0",
            f"{there}.ff_context.net.2": f"{here}.ff_b.2",
            f"{there}.norm1.linear": f"{here}.norm1_a.linear",
            f"{there}.norm1_context.linear": f"{here}.norm1_b.linear",
        }
    for i in range(size.single):
        there, here = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        fused = f"{here}.to_qkv_mlp"
        for n, letter in enumerate("qkv"):
            parts.append(Module(f"{there}.attn.to_{letter}", fused, ((n * d, (n + 1) * d),), d))
        parts.append(Module(f"{there}.proj_mlp", fused, ((3 * d, 7 * d),), d))
        names[f"{there}.proj_out"] = f"{here}.proj_out"
        names[f"{there}.norm.linear"] = f"{here}.norm.linear"
    for theirs, ours in (
        ("timestep_embedder", "time_embedder.timestep_embedder"),
        ("guidance_embedder", "guidance_embedder.timestep_embedder"),
        ("text_embedder", "pooled_text_embedder"),
    ):
        names[f"time_text_embed.{theirs}.linear_1"] = f"{ours}.0"
        names[f"time_text_embed.{theirs}.linear_2"] = f"{ours}.2"
    names |= {
        "x_embedder": "x_embedder",
        "context_embedder": "context_embedder",
        "proj_out": "final_proj_out",
    }
    turned = ((d, 2 * d), (0, d))
    parts.append(Module("norm_out.linear", "final_norm_out.linear", turned, d))
    return parts + _whole(size, names)


def onetrainer_bfl(size: Size) -> list[Module]:
    """OneTrainer's newer files: the reference names, fused layers in numbered parts."""
    d = size.width
    modules: list[Module] = []
    for module in bfl(size):
        if module.path.endswith((".qkv", ".linear1")):
            stops = [0, d, 2 * d, 3 * d, 7 * d][: 4 if module.path.endswith(".qkv") else 5]
            modules += [
                Module(f"{module.path}.{n}", module.layer, ((start, stop),), d)
                for n, (start, stop) in enumerate(pairwise(stops))
            ]
        else:
            modules.append(module)
    return modules


def xlabs(size: Size) -> list[Module]:
    """x-flux' attention processors; those of single blocks leave the MLP rows alone."""
    d = size.width
    modules: list[Module] = []
    for i in range(size.double):
        for n, stream in ((1, "a"), (2, "b")):
            there, here = f"double_blocks.{i}.processor", f"blocks.{i}.attn"
            modules.append(
                Module(f"{there}.qkv_lora{n}", f"{here}.{stream}_to_qkv", ((0, 3 * d),), d)
            )
            modules.append(Module(f"{there}.proj_lora{n}", f"{here}.{stream}_to_out", ((0, d),), d))
    for i in range(size.single):
        there, here = f"single_blocks.{i}.processor", f"single_blocks.{i}"
        modules.append(Module(f"{there}.qkv_lora", f"{here}.to_qkv_mlp", ((0, 3 * d),), d))
        modules.append(Module(f"{there}.proj_lora", f"{here}.proj_out", ((0, d),), 5 * d))
    return modules


def norms(size: Size, of: str = "bfl") -> dict[str, str]:
    """Normalization of queries and keys: DiffSynth's paths by those of ``bfl`` or ``diffusers``.

    Each has one weight, a vector over the features of a head.
    """
    paths: dict[str, str] = {}
    for i in range(size.double):
        for stream, ours, added in (("img", "a", ""), ("txt", "b", "added_")):
            for word, letter in (("query", "q"), ("key", "k")):
                bfl_path = f"double_blocks.{i}.{stream}_attn.norm.{word}_norm"
                other = f"transformer_blocks.{i}.attn.norm_{added}{letter}"
                path = bfl_path if of == "bfl" else other
                paths[path] = f"blocks.{i}.attn.norm_{letter}_{ours}"
    for i in range(size.single):
        for word, letter in (("query", "q"), ("key", "k")):
            bfl_path = f"single_blocks.{i}.norm.{word}_norm"
            other = f"single_transformer_blocks.{i}.attn.norm_{letter}"
            paths[bfl_path if of == "bfl" else other] = f"single_blocks.{i}.norm_{letter}_a"
    return paths


CLIP_WIDTH, T5_WIDTH = 24, 40


def clip(spelling: str = "text_model.encoder.layers.{i}.{part}") -> list[Module]:
    """The CLIP text encoder by Hugging Face's names, with DiffSynth's as `Module.layer`."""
    d = CLIP_WIDTH
    rows: list[Module] = []
    for i in range(2):
        for part, ours, out, inner in (
            ("self_attn.q_proj", "attn.to_q", d, d),
            ("self_attn.k_proj", "attn.to_k", d, d),
            ("self_attn.v_proj", "attn.to_v", d, d),
            ("self_attn.out_proj", "attn.to_out", d, d),
            ("mlp.fc1", "fc1", 4 * d, d),
            ("mlp.fc2", "fc2", d, 4 * d),
        ):
            path = spelling.format(i=i, part=part)
            rows.append(Module(path, f"encoders.{i}.{ours}", ((0, out),), inner))
    return rows


def t5() -> list[Module]:
    """The T5 encoder, whose names DiffSynth keeps."""
    d = T5_WIDTH
    rows: list[Module] = []
    for i in range(2):
        for part, out, inner in (
            ("layer.0.SelfAttention.q", 2 * d, d),
            ("layer.0.SelfAttention.k", 2 * d, d),
            ("layer.0.SelfAttention.v", 2 * d, d),
            ("layer.0.SelfAttention.o", d, 2 * d),
            ("layer.1.DenseReluDense.wi_0", 3 * d, d),
            ("layer.1.DenseReluDense.wi_1", 3 * d, d),
            ("layer.1.DenseReluDense.wo", d, 3 * d),
        ):
            path = f"encoder.block.{i}.{part}"
            rows.append(Module(path, path, ((0, out),), inner))
    return rows
