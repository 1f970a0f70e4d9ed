"""Sizes of FLUX.1 models, read from the shapes of a checkpoint. Nothing here needs torch."""

from __future__ import annotations

from dataclasses import dataclass

from autolora.families.flux1.layers import LAYERS
from autolora.runtime.memory import ModelSizes
from autolora.safetensors_io import Shapes, count_blocks

ROPE_PARTS = (2, 7, 7)
"""Sixteenths of a head's channels that the rotary embedding gives to index, row and column."""


@dataclass(frozen=True)
class FluxSizes:
    """Sizes of a FLUX transformer.

    Attributes:
        width: Channels of a token.
        head_dim: Channels of an attention head.
        double_blocks: Blocks with separate image and text streams.
        single_blocks: Blocks with one stream.
        patch: Channels of a patch of latents that it gives.
        taken: Channels of a patch that it takes; a Fill model takes a picture and its mask, too.
        text_dim: Channels of T5's token states.
        pooled_dim: Channels of CLIP's pooled vector.
        time_dim: Channels of the sinusoidal embedding of time and guidance.
        guidance: Whether the model was distilled to take guidance as an input.
    """

    width: int
    head_dim: int
    double_blocks: int
    single_blocks: int
    patch: int
    text_dim: int
    pooled_dim: int
    time_dim: int
    guidance: bool
    taken: int = 64

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return self.width // self.head_dim

    @property
    def rope_axes(self) -> tuple[int, ...]:
        """Channels per head that encode index, row and column."""
        return tuple(self.head_dim * part // sum(ROPE_PARTS) for part in ROPE_PARTS)

    @classmethod
    def from_shapes(cls, shapes: Shapes) -> FluxSizes:
        """Read the sizes off a transformer's canonical tensors.

        Args:
            shapes: Shapes by canonical name.

        Raises:
            KeyError: A tensor that tells a size is missing.
            ValueError: The sizes do not fit together.
        """
        width, taken = shapes["x_embedder.weight"]
        (head_dim,) = shapes["blocks.0.attn.norm_q_a.weight"]
        if head_dim % 16 or width % head_dim:
            raise ValueError(f"heads of {head_dim} channels do not divide a width of {width}")
        return cls(
            width=width,
            head_dim=head_dim,
            double_blocks=count_blocks(shapes, "blocks"),
            single_blocks=count_blocks(shapes, "single_blocks"),
            patch=shapes["final_proj_out.weight"][0],
            taken=taken,
            text_dim=shapes["context_embedder.weight"][1],
            pooled_dim=shapes["pooled_text_embedder.0.weight"][1],
            time_dim=shapes["time_embedder.timestep_embedder.0.weight"][1],
            guidance="guidance_embedder.timestep_embedder.0.weight" in shapes,
        )

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """``(out, in)`` of every linear layer by canonical name."""
        widths = {
            "d": self.width,
            "patch": self.taken,
            "patch_out": self.patch,
            "text": self.text_dim,
            "pooled": self.pooled_dim,
            "time": self.time_dim,
        }
        counts = {"blocks": self.double_blocks, "single_blocks": self.single_blocks}
        return {
            row.template.replace("{i}", str(i)): (out, inner)
            for row in LAYERS.rows
            if self.guidance or not row.template.startswith("guidance_embedder.")
            for i in range(counts.get(row.group, 1))
            if row.inputs is not None
            and (out := row.out().value(widths)) is not None
            and (inner := row.inputs.value(widths)) is not None
        }

    @property
    def parameters(self) -> int:
        """Number of weights: linear layers with biases, and the norms of queries and keys."""
        linear = sum(out * (inner + 1) for out, inner in self.linear_shapes().values())
        norms = 4 * self.double_blocks + 2 * self.single_blocks
        return linear + norms * self.head_dim


PUBLISHED = FluxSizes(
    width=3072,
    head_dim=128,
    double_blocks=19,
    single_blocks=38,
    patch=64,
    text_dim=4096,
    pooled_dim=768,
    time_dim=256,
    guidance=True,
)
"""FLUX.1-dev's transformer."""
FLUX1_DEV = ModelSizes(
    denoiser=PUBLISHED,
    text_encoder=123_060_480,
    text_encoder_2=4_762_310_656,
    vae=83_819_683,
    vae_channels=128,
)
"""The published sizes, for what is not on this machine; local files tell their own."""


def t5_sizes(shapes: Shapes) -> dict[str, int | float]:
    """Arguments of transformers' ``T5Config`` that follow from a checkpoint's shapes.

    Args:
        shapes: Shapes by published name.

    Raises:
        KeyError: A tensor that tells a size is missing.
    """
    first = "encoder.block.0.layer"
    vocabulary, width = shapes["shared.weight"]
    buckets, heads = shapes[f"{first}.0.SelfAttention.relative_attention_bias.weight"]
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shapes[f"{first}.0.SelfAttention.q.weight"][0] // heads,
        "d_ff": shapes[f"{first}.1.DenseReluDense.wi_0.weight"][0],
        "num_heads": heads,
        "num_layers": count_blocks(shapes, "encoder.block"),
        "relative_attention_num_buckets": buckets,
    }


def clip_sizes(shapes: Shapes) -> dict[str, int]:
    """Arguments of DiffSynth's ``FluxTextEncoderClip`` that follow from a checkpoint's shapes.

    Args:
        shapes: Shapes by DiffSynth's names.

    Raises:
        KeyError: A tensor that tells a size is missing.
    """
    vocabulary, width = shapes["token_embedding.weight"]
    return {
        "embed_dim": width,
        "vocab_size": vocabulary,
        "max_position_embeddings": shapes["position_embeds"][1],
        "num_encoder_layers": count_blocks(shapes, "encoders"),
        "encoder_intermediate_size": shapes["encoders.0.fc1.weight"][0],
    }
