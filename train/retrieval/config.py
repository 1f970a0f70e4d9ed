"""Settings of the retriever's training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autolora.errors import ConfigError
from train.config import read_config

FAMILIES = ("portraits", "weights", "both", "responses")


@dataclass(frozen=True)
class RetrieverTrainConfig:
    """Settings of the retriever's training.

    Attributes:
        pool: Folder of LoRAs with ``<stem>.captions.json`` beside them.
        out: Where the trained retriever is written.
        portraits: Features cache, LoRA name to ``[settings, noises, C, h, w]``; none without it.
        base_model: Name of the base model's configuration; kept as provenance, and used to take
            the activations of captions for ``responses``.
        families: Which inputs are tried: some of ``portraits``, ``weights``, ``both`` (of these
            two) and ``responses``.
        response_layers: Text-side layers whose responses are looked at.
        response_directions: Principal directions of their activations.
        response_steps: Contrastive steps after the closed form.
        response_lr: Learning rate of the text map, relative to the size of its entries.
        response_query_lr: Learning rate of the queries, likewise.
        response_temperature: Initial temperature.
        vocabulary: Common words whose activations are learned from, beside the captions; words
            that name a concept of the test part are left out.
        reserved: Leave out words that name the tiny world's reserved subjects, too.
        extend: A trained retriever to keep; only its encoder of newcomers is fitted, to this pool.
        test_share: Share of concepts that training never sees.
        validation_share: Share of the remaining concepts for early stopping and calibration.
        split_seed: Changes the split by hash.
        probes: Queries per layer.
        sketch: Size of a response's sketch.
        fitted_probes: Use the input directions that the training LoRAs read most as queries.
        portrait_grid: Portraits are averaged down to this many rows and columns.
        dim: Length of an encoder's vectors.
        shrinkage: How far the text head's covariance is drawn to the identity, in [0, 1].
        ridges: Penalties to try, in units of the mean variance.
        components: Principal components that the linear encoder keeps at most.
        width: Channels of the transformer.
        depth: Blocks of the transformer.
        heads: Attention heads.
        dropout: Dropout of the transformer.
        steps: Optimizer steps at most; 0 leaves the transformer out.
        batch: LoRAs per step.
        lr: Learning rate of AdamW.
        weight_decay: Its weight decay.
        temperature: Initial temperature of the contrastive loss.
        evaluate_every: Steps between evaluations on the validation part.
        patience: Evaluations without improvement after which training stops.
        ensemble: Encoders joined at most.
        paper_steps: Steps of the paper's encoder, for comparison; 0 leaves it out.
        paper_width: Its channels; 768 in the paper.
        seed: Seed of all random numbers.
    """

    pool: str
    out: str
    portraits: str = ""
    base_model: str = "tiny"
    families: tuple[str, ...] = FAMILIES
    response_layers: tuple[str, ...] = ("blocks.0.attn.b_to_qkv",)
    response_directions: int = 64
    response_steps: int = 200
    response_lr: float = 0.02
    response_query_lr: float = 0.05
    response_temperature: float = 0.1
    vocabulary: int = 3000
    reserved: bool = False
    extend: str = ""
    test_share: float = 0.2
    validation_share: float = 0.15
    split_seed: str = "0"
    probes: int = 24
    sketch: int = 16
    fitted_probes: bool = True
    portrait_grid: int = 8
    dim: int = 256
    shrinkage: float = 0.3
    ridges: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    components: int = 96
    width: int = 128
    depth: int = 2
    heads: int = 4
    dropout: float = 0.3
    steps: int = 800
    batch: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.05
    temperature: float = 0.07
    evaluate_every: int = 25
    patience: int = 8
    ensemble: int = 4
    paper_steps: int = 600
    paper_width: int = 384
    seed: int = 0

    def __post_init__(self) -> None:
        """Check all values and report every problem at once.

        Raises:
            ConfigError: Naming every setting that is wrong.
        """
        problems = [
            f"{name} must lie between 0 and 1, not {value}"
            for name, value in (
                ("test_share", self.test_share),
                ("validation_share", self.validation_share),
            )
            if not 0 < value < 1
        ]
        positive = (
            "response_directions",
            "probes",
            "sketch",
            "portrait_grid",
            "dim",
            "components",
            "batch",
            "ensemble",
        )
        problems += [
            f"{name} must be at least 1, not {getattr(self, name)}"
            for name in (*positive, "width", "heads", "evaluate_every", "patience")
            if getattr(self, name) < 1
        ]
        if self.width % max(self.heads, 1):
            problems.append(f"width {self.width} must be a multiple of heads {self.heads}")
        if not 0 <= self.shrinkage <= 1:
            problems.append(f"shrinkage must lie between 0 and 1, not {self.shrinkage}")
        if not self.ridges or min(self.ridges) <= 0:
            problems.append("ridges must be positive numbers")
        unknown = [family for family in self.families if family not in FAMILIES]
        if unknown or not self.families:
            problems.append(f"families {list(self.families)} must be some of {', '.join(FAMILIES)}")
        if problems:
            raise ConfigError("Retriever training: " + "; ".join(problems) + ".")


def load_config(path: Path, overrides: dict[str, Any] | None = None) -> RetrieverTrainConfig:
    """Read settings from a YAML file; see `train.config.read_config`."""
    return read_config(RetrieverTrainConfig, path, overrides)
