"""FLUX.1's transformer from its published layout, with random weights.

Layer names are the canonical ones of this project, shapes and operations those of FLUX.1: 19
double and 38 single blocks of width 3072, modulation, query and key norms, rotary embedding, joint
attention. Nothing is learned here; it is there to be timed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autolora.runtime.float8 import KERNEL, multiply


@dataclass(frozen=True)
class Sizes:
    """Sizes of a transformer and of what it is given."""

    width: int = 3072
    heads: int = 24
    double_blocks: int = 19
    single_blocks: int = 38
    image_tokens: int = 4096  # 1024 x 1024 pixels
    text_tokens: int = 512
    text_dim: int = 4096
    pooled_dim: int = 768
    patch: int = 64
    batch: int = 1


FLUX = Sizes()
TINY = Sizes(192, 3, 3, 4, 64, 16, 384, 384, 64, batch=2)
BLOCK = Sizes(double_blocks=0, single_blocks=1, image_tokens=192, text_tokens=64)


class Float8Linear(nn.Linear):
    """Weights kept in float8 and widened at every call, by the kernel of the package on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply in the input's dtype."""
        library = KERNEL.get() if x.is_cpu else None
        if library is not None:
            return multiply(library, x, self.weight, self.bias)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Modulation(nn.Module):
    """A layer norm whose scale and shift come from the time."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, parts * width)
        self.parts = parts

    def forward(self, x: Tensor, emb: Tensor) -> tuple[Tensor, ...]:
        """Return the normalized input, modulated, and the remaining parts."""
        shift, scale, *rest = self.linear(F.silu(emb)).unsqueeze(1).chunk(self.parts, -1)
        return (F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift, *rest)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalize without parameters of its own, then modulate."""
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


def attend(qkv: Tensor, heads: int, rope: Tensor) -> Tensor:
    """Attention over ``[B, T, 3 * width]`` with normalized, rotated queries and keys."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = (rotate(F.rms_norm(t, t.shape[-1:]), rope) for t in (q, k))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Apply the rotary embedding, ``rope [2, T, d/2]``."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


class JointAttention(nn.Module):
    """The projections of a double block's attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.a_to_qkv, self.b_to_qkv = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)
        self.a_to_out, self.b_to_out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, a: Tensor, b: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        """Attend over text and image together."""
        joint = attend(torch.cat((self.b_to_qkv(b), self.a_to_qkv(a)), 1), self.heads, rope)
        text, image = joint.split((b.shape[1], a.shape[1]), 1)
        return self.a_to_out(image), self.b_to_out(text)


class DoubleBlock(nn.Module):
    """Image (a) and text (b) with weights of their own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1_a, self.norm1_b = Modulation(width, 6), Modulation(width, 6)
        self.attn = JointAttention(width, heads)
        self.ff_a, self.ff_b = (
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
            for _ in range(2)
        )

    def forward(self, a: Tensor, b: Tensor, emb: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        """Return image and text."""
        image, *image_parts = self.norm1_a(a, emb)
        text, *text_parts = self.norm1_b(b, emb)
        image, text = self.attn(image, text, rope)
        results = []
        for x, y, ff, (gate, shift, scale, gate_ff) in (
            (a, image, self.ff_a, image_parts),
            (b, text, self.ff_b, text_parts),
        ):
            x = x + gate * y
            results.append(x + gate_ff * ff(modulated(x, shift, scale)))
        return results[0], results[1]


class SingleBlock(nn.Module):
    """Text and image in one stream; attention and feed-forward beside each other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.norm = Modulation(width, 3)
        self.to_qkv_mlp = nn.Linear(width, 7 * width)
        self.proj_out = nn.Linear(5 * width, width)

    def forward(self, x: Tensor, emb: Tensor, rope: Tensor) -> Tensor:
        """Return the stream."""
        y, gate = self.norm(x, emb)
        qkv, mlp = self.to_qkv_mlp(y).split((3 * self.width, 4 * self.width), -1)
        joined = torch.cat((attend(qkv, self.heads, rope), F.gelu(mlp, approximate="tanh")), -1)
        return x + gate * self.proj_out(joined)


class FluxTransformer(nn.Module):
    """One denoising step."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        s = self.sizes = sizes
        self.x_embedder = nn.Linear(s.patch, s.width)
        self.context_embedder = nn.Linear(s.text_dim, s.width)
        self.time = nn.Sequential(
            nn.Linear(s.pooled_dim, s.width), nn.SiLU(), nn.Linear(s.width, s.width)
        )
        self.blocks = nn.ModuleList(DoubleBlock(s.width, s.heads) for _ in range(s.double_blocks))
        self.single_blocks = nn.ModuleList(
            SingleBlock(s.width, s.heads) for _ in range(s.single_blocks)
        )
        self.norm_out = Modulation(s.width, 2)
        self.proj_out = nn.Linear(s.width, s.patch)

    def forward(self, latents: Tensor, text: Tensor, pooled: Tensor, rope: Tensor) -> Tensor:
        """Return the velocity, ``[B, image tokens, patch]``."""
        emb = self.time(pooled)
        image, text = self.x_embedder(latents), self.context_embedder(text)
        for block in self.blocks:
            image, text = block(image, text, emb, rope)
        x = torch.cat((text, image), 1)
        for block in self.single_blocks:
            x = block(x, emb, rope)
        return self.proj_out(self.norm_out(x[:, text.shape[1] :], emb)[0])


def build(sizes: Sizes, dtype: torch.dtype, device: torch.device, float8: bool) -> FluxTransformer:
    """Make a model with random weights straight on the device.

    Args:
        sizes: Of the model.
        dtype: It computes in.
        device: It lives on.
        float8: Whether the blocks' linear layers keep their weights in float8.
    """
    with torch.device("meta"):
        model = FluxTransformer(sizes).to(dtype)
    model.requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        for key, parameter in list(module.named_parameters(recurse=False)):
            value = torch.empty(parameter.shape, dtype=dtype, device=device)
            value.normal_(std=0.5 * module.in_features**-0.5, generator=generator)
            stored = float8 and key == "weight" and "blocks." in name
            kept = value.to(torch.float8_e4m3fn) if stored else value
            setattr(module, key, nn.Parameter(kept, requires_grad=False))
        if float8 and "blocks." in name:
            module.__class__ = Float8Linear
    return model.eval()


def inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Return random inputs of one step."""
    generator = torch.Generator(device).manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device, generator=generator)

    tokens, half = sizes.image_tokens + sizes.text_tokens, sizes.width // sizes.heads // 2
    angle = torch.rand(tokens, half, device=device, generator=generator) * 6.28
    return (
        random(sizes.batch, sizes.image_tokens, sizes.patch),
        random(sizes.batch, sizes.text_tokens, sizes.text_dim),
        random(sizes.batch, sizes.pooled_dim),
        torch.stack((angle.cos(), angle.sin())).to(dtype),
    )
