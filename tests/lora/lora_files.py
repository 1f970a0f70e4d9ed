"""An independent writer of LoRA files, and the dense truth of what it wrote.

It shares no table with the package: module paths and row offsets are spelled out here again, from
the layouts of the programs that write such files. Sizes are in units of the model width.
"""

import json
import struct
from dataclasses import dataclass, field

import torch
from safetensors.torch import save_file

WIDTH = 8
BLOCKS = (0, 11)

# Canonical layer: (output units, input units). Layers outside the blocks have their own widths.
DOUBLE = {
    "attn.{s}_to_qkv": (3, 1),
    "attn.{s}_to_out": (1, 1),
    "ff_{s}.0": (4, 1),
    "ff_{s}.2": (1, 4),
    "norm1_{s}.linear": (6, 1),
}
SINGLE = {"to_qkv_mlp": (7, 1), "proj_out": (1, 5), "norm.linear": (3, 1)}
OUTER = {
    "x_embedder": (1, 2),
    "context_embedder": (1, 3),
    "time_embedder.timestep_embedder.0": (1, 2),
    "time_embedder.timestep_embedder.2": (1, 1),
    "guidance_embedder.timestep_embedder.0": (1, 2),
    "guidance_embedder.timestep_embedder.2": (1, 1),
    "pooled_text_embedder.0": (1, 3),
    "pooled_text_embedder.2": (1, 1),
    "final_norm_out.linear": (2, 1),
    "final_proj_out": (2, 1),
}


def pack(header, data=b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(shape=(1, 2), begin=0, end=8, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def canonical_shapes() -> dict[str, tuple[int, int]]:
    """Weight shapes of a small FLUX by canonical name."""
    units = dict(OUTER)
    for i in BLOCKS:
        for s in "ab":
            units |= {f"blocks.{i}." + part.format(s=s): size for part, size in DOUBLE.items()}
        units |= {f"single_blocks.{i}." + part: size for part, size in SINGLE.items()}
    return {layer: (out * WIDTH, inn * WIDTH) for layer, (out, inn) in units.items()}


@dataclass(frozen=True)
class Module:
    """A module of another program: its path, and where its output rows go.

    ``rows`` lists (first unit in the canonical output, number of units), in the module's order.
    """

    path: str
    layer: str
    rows: tuple[tuple[int, int], ...]


def diffusers_modules() -> list[Module]:
    rows: list[Module] = []
    for i in BLOCKS:
        block, to = f"transformer_blocks.{i}.", f"blocks.{i}."
        for n, letter in enumerate("qkv"):
            rows.append(Module(f"{block}attn.to_{letter}", f"{to}attn.a_to_qkv", ((n, 1),)))
            rows.append(Module(f"{block}attn.add_{letter}_proj", f"{to}attn.b_to_qkv", ((n, 1),)))
        for path, part, size in (
            ("attn.to_out.0", "attn.a_to_out", 1),
            ("attn.to_add_out", "attn.b_to_out", 1),
            ("ff.net.0.proj", "ff_a.0", 4),
            ("ff.net.2", "ff_a.2", 1),
            ("ff_context.net.0.proj", "ff_b.0", 4),
            ("ff_context.net.2", "ff_b.2", 1),
            ("norm1.linear", "norm1_a.linear", 6),
            ("norm1_context.linear", "norm1_b.linear", 6),
        ):
            rows.append(Module(block + path, to + part, ((0, size),)))
        block, to = f"single_transformer_blocks.{i}.", f"single_blocks.{i}."
        for n, letter in enumerate("qkv"):
            rows.append(Module(f"{block}attn.to_{letter}", f"{to}to_qkv_mlp", ((n, 1),)))
        rows.append(Module(f"{block}proj_mlp", f"{to}to_qkv_mlp", ((3, 4),)))
        rows.append(Module(f"{block}proj_out", f"{to}proj_out", ((0, 1),)))
        rows.append(Module(f"{block}norm.linear", f"{to}norm.linear", ((0, 3),)))
    for path, layer in (
        ("x_embedder", "x_embedder"),
        ("context_embedder", "context_embedder"),
        ("time_text_embed.timestep_embedder.linear_1", "time_embedder.timestep_embedder.0"),
        ("time_text_embed.timestep_embedder.linear_2", "time_embedder.timestep_embedder.2"),
        ("time_text_embed.guidance_embedder.linear_1", "guidance_embedder.timestep_embedder.0"),
        ("time_text_embed.guidance_embedder.linear_2", "guidance_embedder.timestep_embedder.2"),
        ("time_text_embed.text_embedder.linear_1", "pooled_text_embedder.0"),
        ("time_text_embed.text_embedder.linear_2", "pooled_text_embedder.2"),
    ):
        rows.append(Module(path, layer, ((0, 1),)))
    rows.append(Module("proj_out", "final_proj_out", ((0, 2),)))
    # diffusers keeps the scale rows first, the reference code the shift rows.
    rows.append(Module("norm_out.linear", "final_norm_out.linear", ((1, 1), (0, 1))))
    return rows


def bfl_modules() -> list[Module]:
    shapes = canonical_shapes()
    names: dict[str, str] = {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "final_layer.linear": "final_proj_out",
        "final_layer.adaLN_modulation.1": "final_norm_out.linear",
    }
    for ours, theirs in (("time", "time"), ("guidance", "guidance")):
        names[f"{theirs}_in.in_layer"] = f"{ours}_embedder.timestep_embedder.0"
        names[f"{theirs}_in.out_layer"] = f"{ours}_embedder.timestep_embedder.2"
    names["vector_in.in_layer"] = "pooled_text_embedder.0"
    names["vector_in.out_layer"] = "pooled_text_embedder.2"
    for i in BLOCKS:
        for s, stream in (("a", "img"), ("b", "txt")):
            block, to = f"double_blocks.{i}.{stream}_", f"blocks.{i}."
            names |= {
                f"{block}attn.qkv": f"{to}attn.{s}_to_qkv",
                f"{block}attn.proj": f"{to}attn.{s}_to_out",
                f"{block}mlp.0": f"{to}ff_{s}.0",
                f"{block}mlp.2": f"{to}ff_{s}.2",
                f"{block}mod.lin": f"{to}norm1_{s}.linear",
            }
        block, to = f"single_blocks.{i}.", f"single_blocks.{i}."
        names |= {
            f"{block}linear1": f"{to}to_qkv_mlp",
            f"{block}linear2": f"{to}proj_out",
            f"{block}modulation.lin": f"{to}norm.linear",
        }
    return [Module(path, layer, ((0, shapes[layer][0] // WIDTH),)) for path, layer in names.items()]


def onetrainer_bfl_modules() -> list[Module]:
    """The reference code's modules, with a number for each part of a fused one."""
    rows: list[Module] = []
    for module in bfl_modules():
        parts = {"qkv": (1, 1, 1), "linear1": (1, 1, 1, 4)}.get(module.path.split(".")[-1])
        if parts is None:
            rows.append(module)
            continue
        for n, size in enumerate(parts):
            rows.append(Module(f"{module.path}.{n}", module.layer, ((n, size),)))
    return rows


def xlabs_modules() -> list[Module]:
    rows: list[Module] = []
    for i in BLOCKS:
        block = f"double_blocks.{i}.processor."
        for number, s in (("1", "a"), ("2", "b")):
            rows.append(
                Module(f"{block}qkv_lora{number}", f"blocks.{i}.attn.{s}_to_qkv", ((0, 3),))
            )
            rows.append(
                Module(f"{block}proj_lora{number}", f"blocks.{i}.attn.{s}_to_out", ((0, 1),))
            )
        block = f"single_blocks.{i}.processor."
        rows.append(Module(f"{block}qkv_lora", f"single_blocks.{i}.to_qkv_mlp", ((0, 3),)))
        rows.append(Module(f"{block}proj_lora", f"single_blocks.{i}.proj_out", ((0, 1),)))
    return rows


def canonical_modules() -> list[Module]:
    return [
        Module(layer, layer, ((0, out // WIDTH),)) for layer, (out, _) in canonical_shapes().items()
    ]


_KOHYA = ("lora_down.weight", "lora_up.weight", "alpha")
_PEFT = ("lora_A.weight", "lora_B.weight", "alpha")

# How each kind of file spells a key: modules, prefix, joint of path parts, A, B, alpha.
SPELLINGS = {
    "kohya": (bfl_modules, "lora_unet_", "_", *_KOHYA),
    "diffusers": (diffusers_modules, "transformer.", ".", *_PEFT),
    "peft": (diffusers_modules, "base_model.model.", ".", *_PEFT),
    "ai-toolkit": (bfl_modules, "diffusion_model.", ".", *_PEFT),
    "fal": (bfl_modules, "base_model.model.", ".", *_PEFT),
    "xlabs": (xlabs_modules, "", ".", "down.weight", "up.weight", "alpha"),
    "onetrainer": (diffusers_modules, "lora_transformer_", "_", *_KOHYA),
    "onetrainer-bfl": (onetrainer_bfl_modules, "transformer.", ".", *_KOHYA),
    "lycoris": (diffusers_modules, "lycoris_", "_", *_KOHYA),
    "lycoris-bfl": (bfl_modules, "lycoris_", "_", *_KOHYA),
    "bfl": (bfl_modules, "", ".", *_PEFT),
    "diffsynth": (canonical_modules, "", ".", *_PEFT),
}


@dataclass
class LoRAFile:
    """Tensors of a file, and the weight changes they stand for."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    truth: dict[str, torch.Tensor] = field(default_factory=dict)

    def save(self, path, metadata=None):
        save_file(self.tensors, path, metadata=metadata)
        return path


def make_file(
    spelling,
    *,
    ranks=(4,),
    alphas=(None,),
    dtype=torch.float32,
    keep=lambda path: True,
    prefix=None,
    adapter="",
    seed=0,
) -> LoRAFile:
    """Draw random factors for every module of a format.

    Ranks and alphas are dealt in turn to the modules; an alpha of None writes none and counts as
    the rank. `truth` is computed in float64 from the values as they are stored.
    """
    modules, own_prefix, joint, down, up, alpha_name = SPELLINGS[spelling]
    prefix = own_prefix if prefix is None else prefix
    if adapter:
        down, up = (name.replace(".weight", f".{adapter}.weight") for name in (down, up))
    random = torch.Generator().manual_seed(seed)
    shapes = canonical_shapes()
    made = LoRAFile()
    for n, module in enumerate(module for module in modules() if keep(module.path)):
        out_features, in_features = shapes[module.layer]
        rank, alpha = ranks[n % len(ranks)], alphas[n % len(alphas)]
        units = sum(size for _, size in module.rows)
        A = torch.randn(rank, in_features, generator=random).to(dtype)
        B = torch.randn(units * WIDTH, rank, generator=random).to(dtype)
        key = prefix + module.path.replace(".", joint)
        made.tensors[f"{key}.{down}"] = A
        made.tensors[f"{key}.{up}"] = B
        if alpha is not None:
            made.tensors[f"{key}.{alpha_name}"] = torch.tensor(float(alpha))
        product = (rank if alpha is None else alpha) / rank * (B.double() @ A.double())
        dense = made.truth.setdefault(
            module.layer, torch.zeros(out_features, in_features, dtype=torch.float64)
        )
        read = 0
        for first, size in module.rows:
            dense[first * WIDTH : (first + size) * WIDTH] += product[
                read * WIDTH : (read + size) * WIDTH
            ]
            read += size
    return made


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the truth, in float64."""
    return float((value.double() - truth).norm() / truth.norm())


def assert_same_deltas(lora, truth, tolerance=1e-6):
    """Every layer is there and nothing else; `delta` and `factors` both give the truth."""
    assert lora.layers == sorted(truth)
    for layer, dense in truth.items():
        delta = lora.delta(layer)
        assert delta.dtype == torch.float32
        assert lora.shape(layer) == tuple(dense.shape) == tuple(delta.shape)
        assert relative_error(delta, dense) <= tolerance, layer
        A, B = lora.factors(layer)
        assert A.dtype == B.dtype == torch.float32
        assert A.shape == (lora.rank(layer), dense.shape[1])
        assert B.shape == (dense.shape[0], lora.rank(layer))
        assert relative_error(B.double() @ A.double(), dense) <= tolerance, layer
