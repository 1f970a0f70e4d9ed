"""Files of FLUX.2, Z-Image, Qwen-Image and SDXL, in the spelling of every program, with the truth.

Names and shapes are spelled out from the models' published code; nothing here knows the package
under test. Widths are small, so that a file takes milliseconds; the ratios are the true ones.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Generator, Tensor

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Unit:
    """A module of a training program.

    Attributes:
        path: Its name there.
        outputs: Canonical layer and its output rows (start, stop), in the order of the module's.
        inputs: Input channels.
        kernel: Side of a square kernel, 0 for a linear layer.
    """

    path: str
    outputs: tuple[tuple[str, int, int], ...]
    inputs: int
    kernel: int = 0

    @property
    def rows(self) -> int:
        return sum(stop - start for _, start, stop in self.outputs)

    @property
    def columns(self) -> int:
        return self.inputs * max(self.kernel, 1) ** 2


Layers = dict[str, tuple[int, ...]]
D = 24


def same(layers: Layers) -> list[Unit]:
    """Every layer under its own name."""
    return [
        Unit(name, ((name, 0, shape[0]),), shape[1], shape[2] if len(shape) > 2 else 0)
        for name, shape in layers.items()
    ]


def renamed(layers: Layers, names: dict[str, str]) -> list[Unit]:
    """Layers under other names: theirs by ours."""
    return [Unit(names[unit.path], unit.outputs, unit.inputs, unit.kernel) for unit in same(layers)]


# ---------------------------------------------------------------- FLUX.2


def flux2() -> Layers:
    layers: Layers = {}
    for i in range(2):
        block = f"transformer_blocks.{i}"
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
            layers[f"{block}.attn.{name}"] = (D, D)
        layers[f"{block}.attn.to_out.0"] = layers[f"{block}.attn.to_add_out"] = (D, D)
        for ff in ("ff", "ff_context"):
            layers[f"{block}.{ff}.linear_in"] = (6 * D, D)
            layers[f"{block}.{ff}.linear_out"] = (D, 3 * D)
        layers[f"single_transformer_blocks.{i}.attn.to_qkv_mlp_proj"] = (9 * D, D)
        layers[f"single_transformer_blocks.{i}.attn.to_out"] = (D, 4 * D)
    layers["double_stream_modulation_img.linear"] = (6 * D, D)
    layers["single_stream_modulation.linear"] = (3 * D, D)
    layers["context_embedder"] = (D, 60)
    layers["norm_out.linear"] = (2 * D, D)
    return layers


def flux2_bfl() -> list[Unit]:
    units = []
    for i in range(2):
        there, here = f"double_blocks.{i}", f"transformer_blocks.{i}"
        for stream, names, out, ff in (
            ("img", ("to_q", "to_k", "to_v"), "to_out.0", "ff"),
            ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "ff_context"),
        ):
            shares = tuple((f"{here}.attn.{name}", 0, D) for name in names)
            units += [
                Unit(f"{there}.{stream}_attn.qkv", shares, D),
                Unit(f"{there}.{stream}_attn.proj", ((f"{here}.attn.{out}", 0, D),), D),
                Unit(f"{there}.{stream}_mlp.0", ((f"{here}.{ff}.linear_in", 0, 6 * D),), D),
                Unit(f"{there}.{stream}_mlp.2", ((f"{here}.{ff}.linear_out", 0, D),), 3 * D),
            ]
        single = f"single_transformer_blocks.{i}.attn"
        units += [
            Unit(f"single_blocks.{i}.linear1", ((f"{single}.to_qkv_mlp_proj", 0, 9 * D),), D),
            Unit(f"single_blocks.{i}.linear2", ((f"{single}.to_out", 0, D),), 4 * D),
        ]
    # The reference code has shift before scale, diffusers scale before shift.
    turned = (("norm_out.linear", D, 2 * D), ("norm_out.linear", 0, D))
    return [
        *units,
        Unit(
            "double_stream_modulation_img.lin",
            (("double_stream_modulation_img.linear", 0, 6 * D),),
            D,
        ),
        Unit("single_stream_modulation.lin", (("single_stream_modulation.linear", 0, 3 * D),), D),
        Unit("txt_in", (("context_embedder", 0, D),), 60),
        Unit("final_layer.adaLN_modulation.1", turned, D),
    ]


# ---------------------------------------------------------------- Z-Image


def z_image() -> Layers:
    layers: Layers = {}
    for block in ("layers.0", "layers.1", "noise_refiner.0", "context_refiner.1"):
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            layers[f"{block}.attention.{name}"] = (D, D)
        layers[f"{block}.feed_forward.w1"] = layers[f"{block}.feed_forward.w3"] = (64, D)
        layers[f"{block}.feed_forward.w2"] = (D, 64)
        if "context" not in block:
            layers[f"{block}.adaLN_modulation.0"] = (4 * D, 16)
    return layers


def z_image_fused() -> list[Unit]:
    units = []
    for unit in same(z_image()):
        if unit.path.endswith("to_q"):
            block = unit.path.removesuffix("to_q")
            shares = tuple((f"{block}to_{letter}", 0, D) for letter in "qkv")
            units.append(Unit(f"{block}qkv", shares, D))
        elif unit.path.endswith("to_out.0"):
            units.append(Unit(unit.path.replace("to_out.0", "out"), unit.outputs, D))
        elif "attention.to_" not in unit.path:
            units.append(unit)
    return units


# ---------------------------------------------------------------- Qwen-Image


def qwen_image() -> Layers:
    layers: Layers = {}
    for i in (0, 1, 59):
        block = f"transformer_blocks.{i}"
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
            layers[f"{block}.attn.{name}"] = (D, D)
        layers[f"{block}.attn.to_out.0"] = layers[f"{block}.attn.to_add_out"] = (D, D)
        for stream in ("img", "txt"):
            layers[f"{block}.{stream}_mlp.net.0.proj"] = (4 * D, D)
            layers[f"{block}.{stream}_mlp.net.2"] = (D, 4 * D)
            layers[f"{block}.{stream}_mod.1"] = (6 * D, D)
    layers |= {"img_in": (D, 8), "txt_in": (D, 40), "norm_out.linear": (2 * D, D)}
    return layers


# ---------------------------------------------------------------- SDXL

WIDE, DEEP, CROSS, EMBEDDED = 16, 32, 40, 24


def _attention(here: str, width: int, blocks: int) -> Layers:
    layers: Layers = {f"{here}.proj_in": (width, width)}
    for i in range(blocks):
        block = f"{here}.transformer_blocks.{i}"
        for name in ("attn1", "attn2"):
            inner = width if name == "attn1" else CROSS
            layers |= {
                f"{block}.{name}.to_q": (width, width),
                f"{block}.{name}.to_k": (width, inner),
                f"{block}.{name}.to_v": (width, inner),
                f"{block}.{name}.to_out.0": (width, width),
            }
        layers[f"{block}.ff.net.0.proj"] = (8 * width, width)
        layers[f"{block}.ff.net.2"] = (width, 4 * width)
    return layers | {f"{here}.proj_out": (width, width)}


def sdxl_attention() -> Layers:
    return (
        _attention("down_blocks.1.attentions.1", WIDE, 2)
        | _attention("mid_block.attentions.0", DEEP, 1)
        | _attention("up_blocks.0.attentions.2", DEEP, 1)
    )


def sdxl_resnets() -> Layers:
    return {
        "down_blocks.1.resnets.1.conv1": (WIDE, WIDE, 3, 3),
        "down_blocks.1.resnets.1.time_emb_proj": (WIDE, EMBEDDED),
        "down_blocks.1.resnets.1.conv2": (WIDE, WIDE, 3, 3),
        "down_blocks.2.resnets.0.conv_shortcut": (DEEP, WIDE, 1, 1),
        "down_blocks.1.downsamplers.0.conv": (WIDE, WIDE, 3, 3),
        "up_blocks.0.resnets.1.conv1": (DEEP, 2 * DEEP, 3, 3),
        "up_blocks.0.upsamplers.0.conv": (DEEP, DEEP, 3, 3),
        "conv_in": (8, 4, 3, 3),
        "time_embedding.linear_1": (EMBEDDED, 8),
    }


_SGM = {
    "down_blocks.1.attentions.1": "input_blocks.5.1",
    "mid_block.attentions.0": "middle_block.1",
    "up_blocks.0.attentions.2": "output_blocks.2.1",
    "down_blocks.1.resnets.1.conv1": "input_blocks.5.0.in_layers.2",
    "down_blocks.1.resnets.1.time_emb_proj": "input_blocks.5.0.emb_layers.1",
    "down_blocks.1.resnets.1.conv2": "input_blocks.5.0.out_layers.3",
    "down_blocks.2.resnets.0.conv_shortcut": "input_blocks.7.0.skip_connection",
    "down_blocks.1.downsamplers.0.conv": "input_blocks.6.0.op",
    "up_blocks.0.resnets.1.conv1": "output_blocks.1.0.in_layers.2",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
}


def sgm(layers: Layers) -> list[Unit]:
    """The names of Stability's checkpoint, which kohya's trainer writes."""
    names = {}
    for layer in layers:
        ours, theirs = next(pair for pair in _SGM.items() if layer.startswith(pair[0]))
        names[layer] = theirs + layer.removeprefix(ours)
    return renamed(layers, names)


# ---------------------------------------------------------------- what is trained

Trained = tuple[dict[str, Tensor], Array]
"""Tensors by suffix, and the change ``[rows, columns]`` that they stand for."""

Train = Callable[[Generator, Unit, int], Trained]
ALPHAS = (2.0, 8.0, 1.0, 3.0)


def array(tensor: Tensor) -> Array:
    return tensor.to(torch.float64).numpy()


def _draw(random: Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=random)


def _kernel(unit: Unit, tensor: Tensor) -> Tensor:
    return tensor.reshape(len(tensor), -1, unit.kernel, unit.kernel) if unit.kernel else tensor


def lora(names: str = "lora_A.weight lora_B.weight", alpha: bool = False, rank: int = 4) -> Train:
    down, up = names.split()

    def train(random: Generator, unit: Unit, n: int) -> Trained:
        A, B = _draw(random, rank, unit.columns), _draw(random, unit.rows, rank)
        tensors = {down: _kernel(unit, A), up: B[..., None, None] if unit.kernel else B}
        value = ALPHAS[n % len(ALPHAS)] if alpha else float(rank)
        if alpha:
            tensors["alpha"] = torch.tensor(value)
        return tensors, value / rank * array(B) @ array(A)

    return train


def diagonal(random: Generator, unit: Unit, n: int) -> Trained:
    """A fused module made of split ones: A stacked, B block-diagonal, alpha times their number."""
    count, rank = len(unit.outputs), 2
    A, B = _draw(random, rank * count, unit.columns), torch.zeros(unit.rows, rank * count)
    part = unit.rows // count
    for i in range(count):
        B[i * part : (i + 1) * part, i * rank : (i + 1) * rank] = _draw(random, part, rank)
    alpha = 3.0 * count
    tensors = {"lora_down.weight": A, "lora_up.weight": B, "alpha": torch.tensor(alpha)}
    return tensors, alpha / (rank * count) * array(B) @ array(A)


def tucker(random: Generator, unit: Unit, n: int) -> Trained:
    """LoCon with a core: ``up[o,r] mid[r,s,h,w] down[s,i]``."""
    if not unit.kernel:
        return lora("lora_down.weight lora_up.weight", alpha=True)(random, unit, n)
    k, rank, alpha = unit.kernel, 3, 2.0
    down, up = _draw(random, rank, unit.inputs), _draw(random, unit.rows, rank)
    mid = _draw(random, rank, rank, k, k)
    change = np.einsum("or,rshw,si->oihw", array(up), array(mid), array(down))
    tensors = {
        "lora_down.weight": down[..., None, None],
        "lora_mid.weight": mid,
        "lora_up.weight": up[..., None, None],
        "alpha": torch.tensor(alpha),
    }
    return tensors, alpha / rank * change.reshape(unit.rows, -1)


def loha(core: bool = False) -> Train:
    def train(random: Generator, unit: Unit, n: int) -> Trained:
        rank, alpha, k = 2, 3.0, max(unit.kernel, 1)
        tensors: dict[str, Tensor] = {}
        sides = []
        for side in "12":
            if core and unit.kernel > 1:
                a, b = _draw(random, rank, unit.rows), _draw(random, rank, unit.inputs)
                t = _draw(random, rank, rank, k, k)
                tensors[f"hada_t{side}"] = t
                whole = np.einsum("rshw,rp,sq->pqhw", array(t), array(a), array(b))
            else:
                a, b = _draw(random, unit.rows, rank), _draw(random, rank, unit.columns)
                whole = array(a) @ array(b)
            tensors |= {f"hada_w{side}_a": a, f"hada_w{side}_b": b}
            sides.append(whole.reshape(unit.rows, -1))
        tensors["alpha"] = torch.tensor(alpha)
        return tensors, alpha / rank * sides[0] * sides[1]

    return train


def lokr(kind: str = "full") -> Train:
    def train(random: Generator, unit: Unit, n: int) -> Trained:
        p, q, rank, k = 2, 2, 2, unit.kernel
        rows, inputs = unit.rows // p, unit.inputs // q
        w1 = _draw(random, p, q)
        tensors = {"lokr_w1": w1, "alpha": torch.tensor(1e10 if kind == "full" else 3.0)}
        scale = 1.0 if kind == "full" else 3.0 / rank
        size = max(k, 1) ** 2
        if kind == "full":
            tensors["lokr_w2"] = _kernel(unit, _draw(random, rows, inputs * size))
            w2 = array(tensors["lokr_w2"]).reshape(rows, -1)
        elif kind == "core" and k > 1:
            a, b = _draw(random, rank, rows), _draw(random, rank, inputs)
            t = _draw(random, rank, rank, k, k)
            tensors |= {"lokr_w2_a": a, "lokr_w2_b": b, "lokr_t2": t}
            w2 = np.einsum("rshw,rp,sq->pqhw", array(t), array(a), array(b)).reshape(rows, -1)
        else:
            a, b = _draw(random, rows, rank), _draw(random, rank, inputs * size)
            tensors |= {"lokr_w2_a": a, "lokr_w2_b": b}
            w2 = array(a) @ array(b)
        if k:
            wide = np.einsum("ac,bdk->abcdk", array(w1), w2.reshape(rows, inputs, -1))
            return tensors, scale * wide.reshape(unit.rows, -1)
        return tensors, scale * np.kron(array(w1), w2)

    return train


# ---------------------------------------------------------------- files


@dataclass
class FamilyFile:
    """A file and the truth of what it says.

    Attributes:
        family: The family that it is for.
        layers: Weight shapes of the layers that it changes.
        tensors: What it holds.
        metadata: Its header.
        changes: Change by canonical layer, float64 in the weight's shape.
    """

    family: str
    layers: Layers
    tensors: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    changes: dict[str, Tensor] = field(default_factory=dict)

    def add(self, units: list[Unit], key: Callable[[str, str], str], train: Train) -> "FamilyFile":
        """Train units and store them; `key` makes a key of path and suffix."""
        random = Generator().manual_seed(len(units))
        for n, unit in enumerate(units):
            tensors, change = train(random, unit, n)
            for suffix, tensor in tensors.items():
                name = key(unit.path, suffix)
                assert name not in self.tensors, name
                self.tensors[name] = tensor.contiguous()
            self.note(unit, change)
        return self

    def note(self, unit: Unit, change: Array) -> None:
        first = 0
        for layer, start, stop in unit.outputs:
            shape = self.layers[layer]
            whole = self.changes.setdefault(layer, torch.zeros(*shape, dtype=torch.float64))
            part = change[first : first + stop - start].reshape(stop - start, *shape[1:])
            whole[start:stop] += torch.from_numpy(part)
            first += stop - start

    def save(self, folder: Path) -> Path:
        path = folder / "lora.safetensors"
        save_file(self.tensors, path, self.metadata or None)
        return path


def flat(prefix: str, end: str = "") -> Callable[[str, str], str]:
    return lambda path, suffix: f"{prefix}{path.replace('.', '_')}{end}.{suffix}"


def dotted(prefix: str = "") -> Callable[[str, str], str]:
    return lambda path, suffix: f"{prefix}{path}.{suffix}"


DOWN_UP = "lora_down.weight lora_up.weight"
DEFAULT = "lora_A.default.weight lora_B.default.weight"
Make = Callable[[], FamilyFile]


def _header(file: FamilyFile, prefix: str) -> FamilyFile:
    """Alpha and rank in the header, as diffusers and PEFT write them; twice the change."""
    file.metadata["lora_adapter_metadata"] = json.dumps(
        {f"{prefix}.lora_alpha": 8, f"{prefix}.r": 4}
    )
    file.changes = {layer: 2 * change for layer, change in file.changes.items()}
    return file


def _cases() -> Iterator[tuple[str, Make]]:
    for family, layers, native in (
        ("flux2", flux2, flux2_bfl),
        ("z_image", z_image, None),
        ("qwen_image", qwen_image, None),
        ("sdxl", sdxl_attention, lambda: sgm(sdxl_attention())),
    ):
        yield from _common(family, layers, native or (lambda layers=layers: same(layers())))
    yield from _flux2_cases()
    yield from _z_image_cases()
    yield from _qwen_image_cases()
    yield from _sdxl_cases()


def _common(
    family: str, layers: Callable[[], Layers], native: Callable[[], list[Unit]]
) -> Iterator[tuple[str, Make]]:
    """What the same programs write for every family."""

    def make(units: Callable[[], list[Unit]], key: Callable[[str, str], str], train: Train) -> Make:
        return lambda: FamilyFile(family, layers()).add(units(), key, train)

    own = "unet" if family == "sdxl" else "transformer"

    def canonical() -> list[Unit]:
        return same(layers())

    yield f"{family}/kohya", make(native, flat("lora_unet_"), lora(DOWN_UP, alpha=True))
    yield f"{family}/two underscores", make(native, flat("lora_unet__"), lora(DOWN_UP, alpha=True))
    yield (
        f"{family}/flattened diffusion_model",
        make(native, flat("lora_unet_model_diffusion_model_"), lora(DOWN_UP)),
    )
    yield (
        f"{family}/underscore at the end",
        make(canonical, flat("lora_unet_", "_"), lora(DOWN_UP, alpha=True)),
    )
    yield f"{family}/ai-toolkit", make(native, dotted("diffusion_model."), lora())
    yield f"{family}/comfyui", make(native, dotted("diffusion_model."), lora(alpha=True))
    yield f"{family}/OneTrainer original", make(native, dotted(), lora(alpha=True))
    yield (
        f"{family}/OneTrainer legacy",
        make(canonical, dotted(f"{own}."), lora(DOWN_UP, alpha=True)),
    )
    yield (
        f"{family}/diffusers",
        lambda: _header(make(canonical, dotted(f"{own}."), lora())(), own),
    )
    yield f"{family}/DiffSynth", make(canonical, dotted(), lora(DEFAULT))
    yield f"{family}/PEFT", make(canonical, dotted("base_model.model."), lora())
    yield f"{family}/fal", make(native, dotted("base_model.model."), lora())
    yield (
        f"{family}/PEFT inside",
        make(canonical, dotted(f"{own}.base_model.model."), lora()),
    )
    yield (
        f"{family}/PEFT outside",
        make(canonical, dotted(f"base_model.model.{own}."), lora()),
    )
    yield f"{family}/LoKr, whole", make(native, dotted("diffusion_model."), lokr())
    yield f"{family}/LoKr, lycoris", make(canonical, flat("lycoris_"), lokr("factored"))
    yield f"{family}/LoHa", make(native, flat("lora_unet_"), loha())


def _flux2_cases() -> Iterator[tuple[str, Make]]:
    def expanded() -> FamilyFile:
        return FamilyFile("flux2", flux2()).add(same(flux2()), dotted("diffusion_model."), lora())

    def cut() -> FamilyFile:
        file = expanded()
        for key in [key for key in file.tensors if ".transformer_blocks." in key]:
            file.tensors[key.replace("transformer", "sformer")] = file.tensors.pop(key)
        return file

    def fused() -> FamilyFile:
        units = [unit for unit in flux2_bfl() if len(unit.outputs) == 3]
        rest = [unit for unit in flux2_bfl() if len(unit.outputs) != 3]
        file = FamilyFile("flux2", flux2()).add(units, flat("lora_unet_"), diagonal)
        return file.add(rest, flat("lora_unet_"), lora(DOWN_UP, alpha=True))

    yield "flux2/diffusers names under diffusion_model", expanded
    yield "flux2/cut names", cut
    yield "flux2/split q, k, v stored as a block diagonal", fused


def _z_image_cases() -> Iterator[tuple[str, Make]]:
    def fused(key: Callable[[str, str], str], train: Train) -> Make:
        return lambda: FamilyFile("z_image", z_image()).add(z_image_fused(), key, train)

    def anime() -> FamilyFile:
        """Split modules with dots in their names, and the same change again in fused ones."""
        file = FamilyFile("z_image", z_image())
        names = "lora.down.weight lora.up.weight"
        spelled = [
            Unit(unit.path.replace("to_", "to."), unit.outputs, unit.inputs)
            for unit in same(z_image())
        ]
        file.add(spelled, dotted(), lora(names))
        for block in ("layers.0", "layers.1", "noise_refiner.0", "context_refiner.1"):
            downs, ups = [], torch.zeros(3 * D, 12)
            for n, letter in enumerate("qkv"):
                path = f"{block}.attention.to.{letter}.lora"
                downs.append(file.tensors[f"{path}.down.weight"])
                ups[n * D : (n + 1) * D, 4 * n : 4 * n + 4] = file.tensors[f"{path}.up.weight"]
            file.tensors[f"{block}.attention.qkv.lora.down.weight"] = torch.cat(downs)
            file.tensors[f"{block}.attention.qkv.lora.up.weight"] = ups
            for name in ("down", "up"):
                tensor = file.tensors[f"{block}.attention.to.out.0.lora.{name}.weight"]
                file.tensors[f"{block}.attention.out.lora.{name}.weight"] = tensor.clone()
        return file

    yield (
        "z_image/fused for ComfyUI, dense",
        fused(dotted("diffusion_model."), lora(DOWN_UP, alpha=True)),
    )
    yield "z_image/fused for ComfyUI, block diagonal", fused(flat("lora_unet_"), diagonal)
    yield "z_image/fused LoKr", fused(dotted("diffusion_model."), lokr())
    yield "z_image/fused and split at once", anime


def _qwen_image_cases() -> Iterator[tuple[str, Make]]:
    yield (
        "qwen_image/lightx2v",
        lambda: FamilyFile("qwen_image", qwen_image()).add(
            same(qwen_image()), dotted(), lora(DOWN_UP, alpha=True)
        ),
    )


def _sdxl_cases() -> Iterator[tuple[str, Make]]:
    everything = sdxl_attention() | sdxl_resnets()

    def make(key: Callable[[str, str], str], train: Train, names: str = "sgm") -> Make:
        units = sgm(everything) if names == "sgm" else same(everything)
        return lambda: FamilyFile("sdxl", everything).add(units, key, train)

    def processors() -> FamilyFile:
        layers = {name: shape for name, shape in everything.items() if ".attn" in name}

        def key(path: str, suffix: str) -> str:
            block, _, name = path.removesuffix(".0").rpartition(".")
            return f"unet.{block}.processor.{name}_lora.{suffix}"

        file = FamilyFile("sdxl", layers)
        return file.add(same(layers), key, lora("down.weight up.weight"))

    def one_by_one() -> FamilyFile:
        """Input and output of transformers as 1 x 1 convolutions, as extracted files have them."""
        file = make(flat("lora_unet_"), lora(DOWN_UP, alpha=True))()
        for name, tensor in file.tensors.items():
            if "proj_in.lora" in name or "proj_out.lora" in name:
                file.tensors[name] = tensor[..., None, None].contiguous()
        return file

    yield "sdxl/LoCon", make(flat("lora_unet_"), lora(DOWN_UP, alpha=True))
    yield "sdxl/LoCon by diffusers' names", make(flat("lora_unet_"), lora(DOWN_UP, True), "own")
    yield "sdxl/LoCon, PEFT names", make(dotted("unet."), lora(), "own")
    yield "sdxl/LoCon with a core", make(flat("lora_unet_"), tucker)
    yield "sdxl/LoHa on convolutions", make(flat("lora_unet_"), loha())
    yield "sdxl/LoHa with cores", make(flat("lora_unet_"), loha(core=True))
    yield "sdxl/LoKr on convolutions", make(flat("lora_unet_"), lokr())
    yield "sdxl/LoKr in factors", make(flat("lora_unet_"), lokr("factored"))
    yield "sdxl/LoKr with a core", make(flat("lora_unet_"), lokr("core"))
    yield "sdxl/attention processors", processors
    yield "sdxl/1 x 1 convolutions", one_by_one


FAMILY_CASES: dict[str, Make] = dict(_cases())
